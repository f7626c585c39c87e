"""A small network that guesses the tokens of the coming positions of block 1 from their noise.

Given its noise, a text is a deterministic function, and all of the noise is there from the start. So a guess needs no
sampling: the network reads the noise of W positions and predicts what block 1 will make of it. Block 1 then checks
the guess (`generation/drafted.py`), so a poor draft costs time and never changes a text.

Shape legend: R rows, N positions, k positions read before the first draft, W draft positions, P tokens per position,
d channels per token, C = P d, D width of block 1's features, E width of the draft, EP = E + P, V vocabulary.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.errors import UserError
from tarflowlm.flow.cached import KVCache
from tarflowlm.flow.stack import InputMap
from tarflowlm.flow.transformer import Transformer, TransformerConfig

WAVES = 5
"""Frequencies pi 2^0, ..., at which a wave reads Phi(u): thresholds between tokens lie anywhere in (0, 1)."""
WAVE_CHANNELS = 3
"""Channels of a token that are read by waves: the first ones decide which token it is, the others follow from it."""
WIDTHS, START_WIDTH = (-7.0, 1.0), -3.0
"""Bounds of log s, and where it starts."""
FLOOR = 1e-5
"""Least probability between two thresholds; the logits of a token's own speak below."""


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """Shape of a draft network."""

    layers: int = 2
    """Transformer layers."""
    trunk: TransformerConfig = field(default_factory=TransformerConfig)
    """Shape of its Transformer."""
    past: int = 6
    """Positions before the first draft whose features and latents are read, k. They hold what block 1 knows of all
    positions before them, so few suffice."""
    ahead: int = 10
    """Positions drafted at most, W."""

    def __post_init__(self) -> None:
        for name in ("layers", "past", "ahead"):
            if getattr(self, name) < 1:
                raise UserError(f"draft.{name} {getattr(self, name)}: must be at least 1")


class Draft(nn.Module):
    """Logits of the tokens at W coming positions, from their noise and the k positions before them.

    One causal Transformer has an input per position n: what is known of it, that is block 1's features c_n and the
    latents z_n or a vector that stands for an open position, and the noise u_(n+1) of the next one, whose token the
    output at n predicts. From a frontier f on it reads k known positions, then W - 1 open ones. What lies before the
    first position of a text counts as zero features and zero latents.

    The first channel of a token's noise decides most of which token it is: Phi(u_1) falls between two cumulative
    weights, of tokens in the order of their means in this channel (docs/math.md, eq. 9). So an output gives weights
    with cumulative sums C_j, a width s of their uncertainty, and logits r_j of its own, by rank j:

        logit_j = log( sigmoid((C_j - Phi(u_1)) / s) - sigmoid((C_(j-1) - Phi(u_1)) / s) ) + r_j
    """

    rank: Tensor
    """Place of every token in the order of the means of channel 1, [V]."""

    def __init__(self, config: DraftConfig, *, features: int, patch: int, means: Float[Tensor, "V d"]) -> None:
        """`features`: the width D of block 1; `means`: those of the codebook."""
        super().__init__()
        self.config, self.patch = config, patch
        self.vocab_size, self.latent_dim = means.shape
        self.register_buffer("rank", means[:, 0].argsort().argsort())
        width, channels = config.trunk.width, patch * self.latent_dim
        self.waves = min(WAVE_CHANNELS, self.latent_dim)
        self.from_features = nn.Linear(features, width)
        self.from_latents = InputMap(channels, width)
        self.from_noise = nn.Sequential(
            nn.Linear(2 * channels + 2 * WAVES * patch * self.waves, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )
        self.open = nn.Parameter(torch.randn(width))
        self.transformer = Transformer(config.trunk, config.layers)
        self.head = nn.Linear(width, patch * (2 * self.vocab_size + 1))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.bias.view(patch, -1)[:, -1] = START_WIDTH

    def read_noise(self, u: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows EP"]:
        """Inputs of noise u, and Phi(u_1) of each of the P tokens behind them.

        Inputs are made of u, 2 Phi(u) - 1, and waves of Phi(u) of the first channels of every token.
        """
        uniform = torch.special.ndtr(u)
        tokens = uniform.unflatten(-1, (self.patch, self.latent_dim))
        first = tokens[..., : self.waves].flatten(-2)
        angle = (first[..., None] * (math.pi * 2.0 ** torch.arange(WAVES, device=u.device))).flatten(-2)
        inputs = self.from_noise(torch.cat((u, 2 * uniform - 1, angle.sin(), angle.cos()), -1))
        return torch.cat((inputs, tokens[..., 0]), -1)

    def read_past(self, features: Float[Tensor, "*rows D"], z: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows E"]:
        """Inputs of past positions, from block 1's features c_n and the latents z_n that came of them."""
        return self.from_features(features) + self.from_latents(z)

    def allocate_cache(self, rows: int) -> KVCache:
        """For `forward` without gradients on so many rows, in fewer operations."""
        return KVCache(self.transformer, rows, self.config.past + self.config.ahead - 1, self.head.weight)

    def forward(
        self,
        past: Float[Tensor, "R k E"],
        noise: Float[Tensor, "R M EP"],
        cache: KVCache | None = None,
        *,
        first: int = 0,
    ) -> Float[Tensor, "R outputs P V"]:
        """Logits of the tokens at the positions of `noise` from its entry `first` on.

        `past`: positions f - k to f - 1, as `read_past` gives them; `noise`: positions f - k + 1 on, as `read_noise`
        does. The first k - 1 outputs are guesses of tokens before the frontier, from what came before each.
        """
        k, inputs = past.shape[1], noise[..., : -self.patch]
        x = torch.cat((inputs[:, :k] + past, inputs[:, k:] + self.open), 1)
        if cache is None:
            h = self.transformer(x)
        else:
            # every call stands alone
            cache.rewind(0)
            h = cache.extend(x)
        out = self.head(h[:, first:]).unflatten(-1, (self.patch, -1))
        weights, own, width = out.split((self.vocab_size, self.vocab_size, 1), -1)
        uniform = noise[:, first:, -self.patch :, None]
        below = torch.sigmoid((weights.softmax(-1).cumsum(-1) - uniform) * torch.exp(-width.clamp(*WIDTHS)))
        between = below - F.pad(below[..., :-1], (1, 0))
        return (torch.log(between.clamp(min=FLOOR)) + own)[..., self.rank]
