"""A flow block, and the prior: a stack of blocks of alternating direction over patches of tokens.

Shape legend: B batch, T tokens, P patch, N = T / P positions, d channels per token, C = P d,
D width.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.flow import widen
from tarflowlm.flow.codebook import Codebook, NoisyCodebook
from tarflowlm.flow.couplings import Coupling
from tarflowlm.flow.layers import Bijection, Order, Patch
from tarflowlm.flow.numerics import log_standard_normal
from tarflowlm.flow.transformer import KVCache, Transformer
from tarflowlm.model_config import TransformerConfig

Invert = Callable[[int, Tensor], Tensor]
"""Maps the index of a block (0-based) and its noise [B, N, C] to its latents [B, N, C]."""


class InputMap(nn.Module):
    """Latents x [..., C] to Transformer inputs [..., D]: linear(x) + out(gelu(lift(x))).

    docs/math.md, eq. 5. The linear path alone would confine the inputs to a C-dimensional subspace,
    too little for the Transformer where C is small (docs/log.md). The nonlinear path removes that
    limit at the cost of one small product.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, width)
        self.lift = nn.Linear(channels, width)
        self.out = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.linear.weight, std=channels**-0.5)
        nn.init.normal_(self.lift.weight, std=2.0 * channels**-0.5)
        nn.init.normal_(self.out.weight, std=width**-0.5)
        nn.init.zeros_(self.linear.bias)
        nn.init.normal_(self.lift.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.out(F.gelu(self.lift(x)))


class FlowBlock(Bijection):
    """f^(l): an autoregressive flow over N positions of C channels (docs/math.md, eq. 5).

    Position n, counted in the block's own order, is transformed with parameters that depend on the
    positions before n and on the earlier channels of position n. `order` (pi_l) mixes channels and
    reverses positions on input and is undone on output, so every state keeps the layout of the
    tokens and can be decoded by the codebook.

    With a `codebook`, which needs channels that are not mixed, the Transformer also reads an
    embedding of the tokens that the latents before n decode to. They are a function of these
    latents, so the map stays a flow.
    """

    places: Tensor

    def __init__(
        self,
        *,
        trunk: TransformerConfig,
        num_layers: int,
        order: Order,
        coupling: Coupling,
        codebook: Codebook | NoisyCodebook | None = None,
    ) -> None:
        super().__init__()
        channels = len(order.channels)
        self.order = order
        self.input = InputMap(channels, trunk.width)
        self.start = nn.Parameter(torch.randn(trunk.width))
        self.transformer = Transformer(trunk, num_layers)
        self.coupling = coupling
        # in a tuple, so that its parameters are not registered a second time
        self._codebook = (codebook,)
        self.token_embedding: nn.Embedding | None = None
        if codebook is not None:
            assert not order.mixes
            # one embedding for every place of a patch, by the number of the place times V + token
            places = torch.arange(channels // codebook.mean.shape[1]) * codebook.vocab_size
            self.register_buffer("places", places, persistent=False)
            self.token_embedding = nn.Embedding(len(places) * codebook.vocab_size, trunk.width)

    @property
    def keeps_order(self) -> bool:
        """Whether the block works in the order of the tokens and their channels."""
        return not self.order.reverse and not self.order.mixes

    def _inputs(self, h: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch D"]:
        """The Transformer's inputs for the latents of positions."""
        x = widen(self.input(h))
        codebook = self._codebook[0]
        if codebook is None or self.token_embedding is None:
            return x
        with torch.no_grad():
            tokens = codebook.decode(h.unflatten(-1, (-1, codebook.mean.shape[1])))
        return x + self.token_embedding(tokens + self.places).sum(-2)

    def features(self, h: Float[Tensor, "B N C"]) -> Float[Tensor, "B N D"]:
        """Features c_n of all positions, each from the latents before it, in the block's order."""
        return self.features_of(None, h[:, :-1], first=True)

    def forward(
        self, z: Float[Tensor, "B N C"]
    ) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B N"]]:
        """h^(l) from h^(l-1) = z, and the part of every position in log|det J_l|, in nats."""
        h, _ = self.order(z)
        u, log_det = self.coupling(h, self.features(h))
        return self.order.inverse(u), self.order.positions(log_det)

    def log_prob(self, z: Float[Tensor, "B N C"]) -> Float[Tensor, "B N"]:
        """log p(z_n | positions before n in the block's order), in nats.

        Here the block is the last one. Cheaper than `forward`, since it needs no noise.
        """
        h, _ = self.order(z)
        return self.order.positions(self.coupling.log_prob(h, self.features(h)))

    def features_at(
        self, cache: KVCache, previous: Tensor | None, batch: int
    ) -> Float[Tensor, "B D"]:
        """Features c_n of the next position, from the latents [B, C] before it (or None)."""
        x = self.start.expand(batch, -1) if previous is None else self._inputs(previous)
        return cache.extend(x[:, None])[:, 0]

    def features_of(
        self, cache: KVCache | None, past: Float[Tensor, "B given C"], *, first: bool
    ) -> Float[Tensor, "B next D"]:
        """Features of the positions after the cached ones, from the latents `past` before them.

        With `first` they begin with the features of the first position of the sequence: one more
        than there are in `past`.
        """
        x = self._inputs(past)
        if first:
            x = torch.cat((self.start.expand(len(past), 1, -1), x), dim=1)
        return self.transformer(x) if cache is None else cache.extend(x)

    def allocate_cache(self, batch: int, num_positions: int) -> KVCache:
        """An empty KV cache for `num_positions` positions of this block."""
        return KVCache(self.transformer, batch, num_positions, self.start)

    @torch.no_grad()
    def inverse(self, u: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """h^(l-1) from h^(l) = u, position by position, without gradients.

        Other ways to invert a block: `generation/inversion.py`.
        """
        cache = self.allocate_cache(len(u), u.shape[1])
        invert = self.coupling.inverter()
        noise, _ = self.order(u)
        h: list[Tensor] = []
        for u_n in noise.unbind(1):
            features = self.features_at(cache, h[-1] if h else None, len(u))
            h.append(invert(u_n, features, None))
        return self.order.inverse(torch.stack(h, dim=1))


class Prior(nn.Module):
    """The prior p(z): u = f(z) ~ N(0, I) with f = f^(L) o ... o f^(1) (docs/math.md, eq. 4).

    z and u are [B, T, d]; the blocks act on positions of P tokens. All methods raise UserError if P
    does not divide T.

    Example:
        >>> from tarflowlm import FlowConfig, TarFlowLM
        >>> _ = torch.manual_seed(0)
        >>> prior = TarFlowLM(FlowConfig(vocab_size=27)).prior
        >>> noise = torch.randn(2, 6, 8)
        >>> z = prior.inverse(noise)
        >>> u, log_det = prior(z)
        >>> torch.allclose(u, noise, atol=1e-4), log_det.shape
        (True, torch.Size([2]))
    """

    def __init__(self, patch: int, blocks: Iterable[FlowBlock]) -> None:
        super().__init__()
        self.patch = Patch(patch)
        self.blocks = nn.ModuleList(blocks)

    def block(self, index: int) -> FlowBlock:
        block = self.blocks[index]
        assert isinstance(block, FlowBlock)
        return block

    def states(self, z: Float[Tensor, "B T d"]) -> tuple[list[Tensor], list[Tensor]]:
        """The states h^(0) = z, ..., h^(L) = u, and the parts of every log|det J_l|.

        Each state is [B, T, d]; the parts of a log-determinant by position are [B, N], in nats.
        """
        h, _ = self.patch(z)
        states, log_dets = [z], []
        for block in self.blocks:
            h, log_det = block(h)
            states.append(self.patch.inverse(h))
            log_dets.append(log_det)
        return states, log_dets

    def forward(
        self, z: Float[Tensor, "B T d"]
    ) -> tuple[Float[Tensor, "B T d"], Float[Tensor, " B"]]:
        """Noise u = h^(L), and the sum of all log-determinants, in nats."""
        states, log_dets = self.states(z)
        return states[-1], sum((log_det.sum(-1) for log_det in log_dets), start=z.new_zeros(len(z)))

    def descend(
        self,
        state: Float[Tensor, "B T d"],
        invert: Invert,
        *,
        top: int | None = None,
        bottom: int = 0,
    ) -> list[Tensor]:
        """Invert blocks top (by default L), ..., bottom + 1.

        Returns h^(top) = `state`, ..., h^(bottom), each [B, T, d].
        """
        h, _ = self.patch(state)
        states = [state]
        for index in reversed(range(bottom, len(self.blocks) if top is None else top)):
            h = invert(index, h)
            states.append(self.patch.inverse(h))
        return states

    def inverse(self, u: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        """Latents z = h^(0), every block inverted position by position."""
        return self.descend(u, lambda index, h: self.block(index).inverse(h))[-1]

    def log_prob(self, z: Float[Tensor, "B T d"], *, above: int = 0) -> Float[Tensor, " B"]:
        """log p(z), in nats; with `above` of z as the state h^(above) under the blocks above it."""
        first, *rest = (part.sum(-1) for part in self.log_prob_parts(z, above=above))
        return sum(rest, start=first)

    def log_prob_parts(
        self, z: Float[Tensor, "B T d"], *, above: int = 0, frozen: int = 0
    ) -> list[Float[Tensor, "B N"]]:
        """The parts of log p(z) by position, in nats, which sum to it.

        They are the log-determinants of all blocks but the last, and its density (docs/math.md,
        eqs. 4 and 6). The first `frozen` blocks run without a graph: no gradients, no stored
        activations.
        """
        h, _ = self.patch(z)
        parts: list[Tensor] = []
        for index in range(above, len(self.blocks) - 1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= frozen):
                h, log_det = self.block(index)(h)
            parts.append(log_det)
        if above == len(self.blocks):
            return [log_standard_normal(h).sum(-1)]
        return [*parts, self.block(-1).log_prob(h)]
