"""A second block on a frozen model, left to right, with several inputs and maps.

First its Transformer learns to predict the next token by a head. This shows what block 2 can know.
Then it is frozen, and a map learns to turn this knowledge into a density.

Block 1 maps z_t to u_t = R_w(z_t), the Rosenblatt transform of sum_k w_k N(z; mu_k, sigma_k^2 I),
with weights w = w(z_<t) of a frozen model. For a sharp codebook u_t lies inside a cell that belongs
to the token, and the cells depend on w. Shape legend: B windows, T tokens, V token types, d
channels, D width.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tarflowlm.baseline import TokenLM
from tarflowlm.config import OptimConfig
from tarflowlm.data import WindowSampler
from tarflowlm.data.windows import Array
from tarflowlm.errors import SILENT, Progress
from tarflowlm.flow import numerics
from tarflowlm.flow.channelwise import Mix1Coupling
from tarflowlm.flow.codebook import Codebook
from tarflowlm.flow.heads import HeadShape
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.transformer import InputMap, Transformer
from tarflowlm.model import LanguageModel, as_flow, seeded
from tarflowlm.model_config import FlowConfig, TransformerConfig
from tarflowlm.training.optim import build_optimizers, norms, schedule, take_step

M = TypeVar("M", bound=nn.Module)
Reads = Literal["noise", "text"]
"""u_<t; or the tokens of z_<t, and the features that block 1 computes of them at the position."""
Maps = Literal["mix1", "key", "cells", "redo"]
"""Mix-1; Mix-1 that is also given w(z_<t) and the cells; Gaussians in the cells of channel 1; R_w'
after the inverse of R_w.
"""
BASELINE_CHANNELS = 16
ROWS = 16
"""Windows that are evaluated at once."""


@dataclass
class Known:
    """Texts as block 1 maps them."""

    below: "Below"
    tokens: Int[Tensor, "B T"]
    z: Float[Tensor, "B T d"]
    features: Float[Tensor, "B T D"]
    """c_t, a function of z_<t."""
    log_w: Float[Tensor, "B T V"]
    """log w(z_<t)."""

    @cached_property
    def noise(self) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B T"]]:
        """u = R_w(z), and log|det du/dz|, computed when a reader or map first needs them."""
        return self.below.noise(self.z, self.log_w)


class Found(NamedTuple):
    """log p(z_t | z_<t) [B, T] by block 1 and by both, and log p(x_t) by the reader's head."""

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
    def forward(self, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"]) -> Known:
        return self.known(tokens, self.codebook.encode(tokens, noise))

    @torch.no_grad()
    def known(self, tokens: Int[Tensor, "B T"], z: Float[Tensor, "B T d"]) -> Known:
        if isinstance(self.model, TokenLM):
            features = self.model.states(tokens[:, :-1])
            return Known(self, tokens, z, features, self.model.head(features).log_softmax(-1))
        block = as_flow(self.model).prior.block(0)
        assert isinstance(block.coupling, MixDCoupling), "block 1 must be tied Mix-d"
        features = block.features(z)
        log_w = block.coupling.weight_head(features).log_softmax(-1)
        return Known(self, tokens, z, features, log_w)

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


class Reader(nn.Module):
    """The Transformer of block 2, with a head that predicts the next token."""

    def __init__(
        self, below: Below, trunk: TransformerConfig, *, layers: int, reads: Reads
    ) -> None:
        super().__init__()
        width = trunk.width
        V = below.codebook.vocab_size
        self.reads = reads
        self.input = InputMap(below.channels, width)
        self.embedding = nn.Embedding(V, width)
        self.skip = nn.Linear(below.width, width)
        self.start = nn.Parameter(torch.randn(width))
        self.transformer = Transformer(trunk, layers)
        self.head = _zeroed(nn.Linear(width, V))

    def forward(self, known: Known) -> Float[Tensor, "B T D"]:
        """c_t of every position."""
        start = self.start.expand(len(known.z), 1, -1)
        if self.reads == "text":
            x = torch.cat((start, self.embedding(known.tokens[:, :-1])), dim=1)
            x = x + self.skip(known.features)
        else:
            u, _ = known.noise
            x = torch.cat((start, self.input(u[:, :-1])), dim=1)
        features: Tensor = self.transformer(x)
        return features

    def log_prob(self, c: Float[Tensor, "B T D"], tokens: Int[Tensor, "B T"]) -> Tensor:
        """log p(x_t | what it reads) [B, T], in nats."""
        return self.head(c).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def _zeroed(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Upper(nn.Module):
    """A map of block 2, whose parameters come from a frozen reader through a small network.

    All maps start as the identity, or close to it. redo is

        u' = R_w'(R_w^-1(u)),    w' = softmax(log w + delta(c)),

    so the stack has the density of one Mix-d block with weights w'.
    """

    def __init__(self, below: Below, reader: Reader, maps: Maps) -> None:
        super().__init__()
        self.maps = maps
        # in a tuple, so that its parameters are not the map's
        self._reader = (reader.eval().requires_grad_(requires_grad=False),)
        V = below.codebook.vocab_size
        trunk = reader.transformer.config
        width = trunk.width
        inputs = width + (2 * V if maps == "key" else 0)
        self.more = nn.Sequential(
            nn.Linear(inputs, 4 * width), nn.GELU(), _zeroed(nn.Linear(4 * width, width))
        )
        # tokens by their first channel, in which Rosenblatt begins
        self.register_buffer("order", below.codebook.mean[:, 0].argsort(), persistent=False)
        self.weights = _zeroed(nn.Linear(width, V))
        if maps in ("mix1", "key"):
            config = FlowConfig(latent_dim=below.channels)
            head = HeadShape(
                width=width,
                hidden=config.head_hidden,
                features=config.head_features,
                noise=0.0,
            )
            self.mix1 = Mix1Coupling(channels=below.channels, components=V, head=head)

    @property
    def reader(self) -> Reader:
        return self._reader[0]

    order: Tensor

    def features(
        self, c: Float[Tensor, "B T D"], log_w: Float[Tensor, "B T V"]
    ) -> Float[Tensor, "B T D"]:
        """c_t of the reader, changed by the map's own network."""
        inputs = [c]
        if self.maps == "key":
            inputs += [log_w.clamp(min=-20.0), self.edges(log_w)]
        return c + self.more(torch.cat(inputs, dim=-1))

    def edges(self, log_w: Float[Tensor, "B T V"]) -> Float[Tensor, "B T V"]:
        """The upper ends of the tokens' cells in channel 1 of u, by the order of their codes."""
        sums = log_w[..., self.order].double().exp().cumsum(-1)
        return torch.special.ndtri(sums.clamp(1e-6, 1 - 1e-6)).to(log_w)

    def redone(
        self, c: Float[Tensor, "B T D"], log_w: Float[Tensor, "B T V"]
    ) -> Float[Tensor, "B T V"]:
        """log w', from c of the reader."""
        return (log_w + self.weights(self.features(c, log_w))).log_softmax(-1)

    def forward(
        self, below: Below, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"]
    ) -> Found:
        """The densities of a text."""
        known = below(tokens, noise)
        log_w = known.log_w
        with torch.no_grad():
            c = self.reader(known)
            by_head = self.reader.log_prob(c, tokens)
        if self.maps == "redo":
            log_p = below.log_prob(known.z, self.redone(c, log_w))
        else:
            u, log_det = known.noise
            features = self.features(c, log_w)
            if self.maps == "cells":
                log_p = log_det + self._in_cells(u, log_w, features)
            else:
                log_p = log_det + self.mix1.log_prob(u, features)
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
    """The latents of a noise, z_t = R_w'^-1(u'_t), by a block 2 that redoes; with None by block 1
    alone, with w.
    """
    z = torch.zeros_like(noise)
    for t in range(noise.shape[1]):
        # values at t and after it have no effect
        so_far = z[:, : t + 1]
        known = below.known(below.codebook.decode(so_far), so_far)
        log_w = known.log_w
        if upper is not None:
            log_w = upper.redone(upper.reader(known), log_w)
        mean, log_std = below.codebook.mean, below.codebook.log_std
        z[:, t] = numerics.rosenblatt_inverse(noise[:, t], log_w[:, t], mean, log_std)
    return z


@dataclass(frozen=True)
class Boosted:
    """The gain of a trained block 2 on windows, in bits per token."""

    below: Tensor
    """[windows], by block 1 alone."""
    both: Tensor
    """[windows], by both blocks."""
    by_head: Tensor
    """[windows], by the reader's own prediction of the tokens: what block 2 knows."""

    @property
    def gain(self) -> tuple[float, float]:
        """Bits per token that block 2 takes off, and the standard error over windows (paired)."""
        gains = self.below - self.both
        return gains.mean().item(), gains.std().item() / math.sqrt(len(gains))


@torch.no_grad()
def evaluate(below: Below, upper: Upper, windows: Int[Tensor, "N T"]) -> Boosted:
    """The bound on windows, with one sample of the posterior from a fixed seed."""
    parts = list[tuple[Tensor, Tensor, Tensor]]()
    for tokens, noise in _noised(windows, below.channels):
        normaliser = below.codebook.log_normaliser(below.codebook.encode(tokens, noise))
        found = upper(below, tokens, noise)
        nats = normaliser - found.below, normaliser - found.both, -found.by_head
        parts.append(tuple(part.mean(-1) / math.log(2) for part in nats))
    return Boosted(*(torch.cat(windows) for windows in zip(*parts, strict=True)))


Loss = Callable[[M, Tensor, Tensor], Tensor]
"""Nats of every token [B, T] of windows, given noise [B, T, d]."""


def reader_loss(below: Below) -> Loss[Reader]:
    def loss(reader: Reader, tokens: Tensor, noise: Tensor) -> Tensor:
        known = below(tokens, noise)
        return -reader.log_prob(reader(known), tokens)

    return loss


def map_loss(below: Below) -> Loss[Upper]:
    return lambda upper, tokens, noise: -upper(below, tokens, noise).both


def fit(
    make: Callable[[], M],
    loss: Loss[M],
    channels: int,
    train: Array,
    valid: Int[Tensor, "N T"],
    *,
    optim: OptimConfig,
    steps: int,
    batch: int,
    seed: int,
    every: int,
    progress: Progress = SILENT,
) -> M:
    """Train a module for `steps` of `batch` windows; returns its state of the best validation.

    The untrained state is validated, too.
    """
    with seeded(seed):
        module = make()
    optimizers = build_optimizers(optim, module)
    sampler = WindowSampler(train, window=valid.shape[1], batch=batch, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    best = copy.deepcopy(module)
    least = math.inf
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            nats = _validated(module, loss, channels, valid)
            if nats < least:
                least = nats
                best = copy.deepcopy(module)
        if step == steps:
            break
        tokens = sampler.next()
        noise = torch.randn(*tokens.shape, channels, generator=generator)
        loss(module, tokens, noise).mean().backward()
        trained = {name: p for name, p in module.named_parameters() if p.grad is not None}
        norm = norms({name: p.grad for name, p in trained.items() if p.grad is not None}).norm()
        lr = optim.lr * schedule(optim, step, steps)
        take_step(optimizers, trained, norm, lr=lr, grad_clip=optim.grad_clip)
        progress.advance(1)
    return best


@torch.no_grad()
def _validated(module: M, loss: Loss[M], channels: int, windows: Tensor) -> float:
    """The mean loss."""
    losses = [loss(module, *batch).mean(-1) for batch in _noised(windows, channels)]
    return torch.cat(losses).mean().item()


def _noised(windows: Int[Tensor, "N T"], channels: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`ROWS` windows at a time, with noise [B, T, d] from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    for tokens in windows.split(ROWS):
        yield tokens, torch.randn(*tokens.shape, channels, generator=generator)
