"""A second block on a frozen model, left to right, by what it reads and how it maps.

Block 1 maps z_t to u_t = R_w(z_t), the Rosenblatt transform of sum_k w_k N(z; mu_k, sigma_k^2 I),
with weights w = w(z_<t) of a frozen model. For a sharp codebook u_t lies inside a cell that belongs
to the token, and the cells depend on w. Shape legend: B windows, T tokens, V token types, d
channels, D width.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tarflowlm.baseline import TokenLM
from tarflowlm.config import OptimConfig
from tarflowlm.data import TokenArray, WindowSampler
from tarflowlm.flow import numerics
from tarflowlm.flow.channelwise import Mix1Coupling
from tarflowlm.flow.codebook import Codebook
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.plan import BlockPlan
from tarflowlm.flow.stack import InputMap
from tarflowlm.flow.transformer import Transformer
from tarflowlm.language_model import LanguageModel, seeded
from tarflowlm.model import as_flow
from tarflowlm.model_config import BlockConfig, FlowConfig, TransformerConfig
from tarflowlm.progress import SILENT, Progress
from tarflowlm.training.optim import build_optimizers, norms, schedule, take_step

Reads = Literal["noise", "text", "key"]
"""u_<t alone; also the tokens of z_<t, and the features that block 1 has of them; also, at the own
position, w(z_<t) and the cells.
"""
Maps = Literal["mix1", "cells", "redo"]
"""Mix-1; Mix-1 whose components stand in the cells of channel 1; R_w' after the inverse of R_w."""
BASELINE_CHANNELS = 16
ROWS = 16
"""Windows that are evaluated at once."""


class Known(NamedTuple):
    """Texts as block 1 maps them."""

    tokens: Int[Tensor, "B T"]
    z: Float[Tensor, "B T d"]
    features: Float[Tensor, "B T D"]
    """c_t, a function of z_<t."""
    log_w: Float[Tensor, "B T V"]
    """log w(z_<t)."""


class Found(NamedTuple):
    """log p(z_t | z_<t) [B, T] by block 1 and by both, and log p(x_t | ...) by block 2's head."""

    below: Tensor
    both: Tensor
    by_head: Tensor


class Below(nn.Module):
    """A frozen model of tokens as a tied Mix-d block: its codebook, and w(z_<t).

    A baseline gets a codebook of well separated codes, so it is a block without any training.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(requires_grad=False)
        if isinstance(model, TokenLM):
            self.codebook = Codebook(model.config.vocab_size, BASELINE_CHANNELS)
            self.codebook.requires_grad_(requires_grad=False)
        else:
            self.codebook = as_flow(model).codebook
        assert model.config.patch == 1, "one token per position"

    @property
    def channels(self) -> int:
        return self.codebook.mean.shape[1]

    @torch.no_grad()
    def forward(self, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"]) -> "Known":
        return self.known(tokens, self.codebook.encode(tokens, noise))

    @torch.no_grad()
    def known(self, tokens: Int[Tensor, "B T"], z: Float[Tensor, "B T d"]) -> "Known":
        if isinstance(self.model, TokenLM):
            features = self.model.states(tokens[:, :-1])
            return Known(tokens, z, features, self.model.head(features).log_softmax(-1))
        block = as_flow(self.model).prior.block(0)
        assert isinstance(block.coupling, MixDCoupling), "block 1 must be tied Mix-d"
        features = block.features(z)
        return Known(tokens, z, features, block.coupling.weight_head(features).log_softmax(-1))

    @property
    def width(self) -> int:
        return self.model.config.trunk.width

    def noise(
        self, z: Float[Tensor, "*rows d"], log_w: Float[Tensor, "*rows V"]
    ) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows"]]:
        """u = R_w(z), and log|det du/dz|, in nats."""
        return numerics.rosenblatt(z, log_w, self.codebook.mean, self.codebook.log_std)

    def log_prob(
        self, z: Float[Tensor, "*rows d"], log_w: Float[Tensor, "*rows V"]
    ) -> Float[Tensor, "*rows"]:
        """log sum_k w_k N_k(z), in nats."""
        return numerics.mixture_log_prob(z, log_w, self.codebook.mean, self.codebook.log_std)


class Upper(nn.Module):
    """Block 2: its Transformer reads what `reads` says, and its map is `maps`.

    All maps start as the identity, or close to it. redo is

        u' = R_w'(R_w^-1(u)),    w' = softmax(log w + delta(c)),

    so the stack has the density of one Mix-d block with weights w'. In training every block also
    predicts the next token by a head of its own, so that it knows the language as far as what it
    reads tells, and the gain shows what its map makes of that.
    """

    def __init__(
        self, below: Below, trunk: TransformerConfig, *, layers: int, reads: Reads, maps: Maps
    ) -> None:
        super().__init__()
        self.reads = reads
        self.maps = maps
        V = below.codebook.vocab_size
        channels = below.channels
        width = trunk.width
        self.input = InputMap(channels, width)
        self.embedding = nn.Embedding(V, width)
        self.skip = nn.Linear(below.width, width)
        self.start = nn.Parameter(torch.randn(width))
        self.transformer = Transformer(trunk, layers)
        self.key = nn.Sequential(
            nn.Linear(2 * V, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        # tokens by their first channel, in which Rosenblatt begins
        self.register_buffer("order", below.codebook.mean[:, 0].argsort(), persistent=False)
        self.weights = nn.Linear(width, V)
        self.tokens = nn.Linear(width, V)
        for head in (self.weights, self.tokens):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        blocks = (BlockConfig(), BlockConfig(components=V))
        config = FlowConfig(trunk=trunk, latent_dim=channels, blocks=blocks)
        self.mix1 = Mix1Coupling.build(BlockPlan(config, 1, below.codebook))

    order: Tensor

    def features(self, u: Float[Tensor, "B T d"], known: Known) -> Float[Tensor, "B T D"]:
        """c_t of every position."""
        x = self.input(u[:, :-1])
        if self.reads != "noise":
            x = x + self.embedding(known.tokens[:, :-1])
        x = torch.cat((self.start.expand(len(u), 1, -1), x), dim=1)
        if self.reads != "noise":
            x = x + self.skip(known.features)
        c = self.transformer(x)
        log_w = known.log_w
        if self.reads == "key":
            key = torch.cat((log_w.clamp(min=-20.0), self.edges(log_w)), dim=-1)
            c = c + self.key(key)
        return c

    def edges(self, log_w: Float[Tensor, "B T V"]) -> Float[Tensor, "B T V"]:
        """The upper ends of the tokens' cells in channel 1 of u, by the order of their codes."""
        sums = log_w[..., self.order].double().exp().cumsum(-1)
        return torch.special.ndtri(sums.clamp(1e-6, 1 - 1e-6)).to(log_w)

    def redone(
        self, c: Float[Tensor, "B T D"], log_w: Float[Tensor, "B T V"]
    ) -> Float[Tensor, "B T V"]:
        """log w'."""
        return (log_w + self.weights(c)).log_softmax(-1)

    def forward(
        self, below: Below, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"]
    ) -> Found:
        """The densities of a text."""
        known = below(tokens, noise)
        log_w = known.log_w
        u, log_det = below.noise(known.z, log_w)
        c = self.features(u, known)
        if self.maps == "redo":
            log_p = below.log_prob(known.z, self.redone(c, log_w))
        elif self.maps == "cells":
            log_p = log_det + self._in_cells(u, log_w, c)
        else:
            log_p = log_det + self.mix1.log_prob(u, c)
        by_head = self.tokens(c).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        return Found(below.log_prob(known.z, log_w), log_p, by_head)

    def _in_cells(self, u: Tensor, log_w: Tensor, c: Tensor) -> Tensor:
        """log p(u_t) of one channel: component k has the mean and the spread of N in its cell."""
        assert u.shape[-1] == 1, "the cells of further channels depend on those before"
        mean, log_std = self.cells(log_w)
        log_weights = (log_w + self.weights(c)).log_softmax(-1)[..., self.order]
        density = -0.5 * ((u - mean) * torch.exp(-log_std)).square() - log_std
        return torch.logsumexp(log_weights + density, dim=-1) - 0.5 * math.log(2 * math.pi)

    def cells(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-spread of N(0, 1) inside every cell, by the order of the codes."""
        # E u and E u^2 over a cell from phi and u phi at its ends, in float64
        w = log_w[..., self.order].double().exp()
        ends = F.pad(w.cumsum(-1).clamp(1e-12, 1 - 1e-12), (1, 0), value=1e-12)
        at = torch.special.ndtri(ends)
        phi = torch.exp(-0.5 * at.square()) / math.sqrt(2 * math.pi)
        size = ends.diff(dim=-1).clamp(min=1e-9)
        mean = -phi.diff(dim=-1) / size
        square = 1 - (at * phi).diff(dim=-1) / size
        std = (square - mean.square()).clamp(min=1e-6).sqrt()
        return mean.to(log_w), std.log().to(log_w)


@torch.no_grad()
def write(
    below: Below, upper: Upper | None, noise: Float[Tensor, "B T d"]
) -> Float[Tensor, "B T d"]:
    """The text of a noise, z_t = R_w'^-1(u'_t), by a block 2 that redoes, or with w by block 1
    alone.
    """
    z = torch.zeros_like(noise)
    for t in range(noise.shape[1]):
        # what is at t and after it does not count
        so_far = z[:, : t + 1]
        known = below.known(below.codebook.decode(so_far), so_far)
        log_w = known.log_w
        if upper is not None:
            u, _ = below.noise(so_far, log_w)
            log_w = upper.redone(upper.features(u, known), log_w)
        mean, log_std = below.codebook.mean, below.codebook.log_std
        z[:, t] = numerics.rosenblatt_inverse(noise[:, t], log_w[:, t], mean, log_std)
    return z


@dataclass(frozen=True)
class Boosted:
    """What a trained block 2 gains, over windows: bits per token."""

    below: Tensor
    """[windows], by block 1 alone."""
    both: Tensor
    """[windows], with block 2 on it."""
    by_head: Tensor
    """[windows], by block 2's own prediction of the tokens."""

    @property
    def gain(self) -> tuple[float, float]:
        """Bits per token that block 2 takes off, and the standard error over windows (paired)."""
        gains = self.below - self.both
        return gains.mean().item(), gains.std().item() / math.sqrt(len(gains))


@torch.no_grad()
def evaluate(below: Below, upper: Upper, windows: Int[Tensor, "N T"]) -> Boosted:
    """The bound on windows, with one sample of the posterior from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    parts = list[tuple[Tensor, Tensor, Tensor]]()
    for tokens in windows.split(ROWS):
        noise = torch.randn(*tokens.shape, below.channels, generator=generator)
        normaliser = below.codebook.log_normaliser(below.codebook.encode(tokens, noise))
        found = upper(below, tokens, noise)
        nats = normaliser - found.below, normaliser - found.both, -found.by_head
        parts.append(tuple(part.mean(-1) / math.log(2) for part in nats))
    return Boosted(*(torch.cat(windows) for windows in zip(*parts, strict=True)))


def boost(
    below: Below,
    make: Callable[[], Upper],
    train: TokenArray,
    valid: Int[Tensor, "N T"],
    *,
    optim: OptimConfig,
    steps: int,
    batch: int,
    seed: int,
    every: int,
    progress: Progress = SILENT,
) -> Upper:
    """Train block 2 for `steps` of `batch` windows; returns it as it was at its best validation.

    Best counts from the start on, where the block is the identity.
    """
    with seeded(seed):
        upper = make()
    optimizers = build_optimizers(optim, upper)
    sampler = WindowSampler(train, window=valid.shape[1], batch=batch, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    best = copy.deepcopy(upper)
    least = math.inf
    progress.stage(f"block 2 ({upper.maps}, reads {upper.reads}), steps", steps)
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            bits = evaluate(below, upper, valid).both.mean().item()
            if bits < least:
                least = bits
                best = copy.deepcopy(upper)
        if step == steps:
            break
        tokens = sampler.next()
        noise = torch.randn(*tokens.shape, below.channels, generator=generator)
        found = upper(below, tokens, noise)
        loss = -(found.both + found.by_head).mean()
        loss.backward()
        trained = {name: p for name, p in upper.named_parameters() if p.grad is not None}
        norm = norms({name: p.grad for name, p in trained.items() if p.grad is not None}).norm()
        lr = optim.lr * schedule(optim, step, steps)
        take_step(optimizers, trained, norm, lr=lr, grad_clip=optim.grad_clip)
        progress.advance(1)
    return best
