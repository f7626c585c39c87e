"""A second block on a frozen model, left to right: what it adds, and what it reads.

Block 1 maps z_t to u_t = R_w(z_t), the Rosenblatt transform of sum_k w_k N(z; mu_k, sigma_k^2 I),
with weights w = w(z_<t) of a frozen model. For a sharp codebook u_t lies inside a cell that belongs
to the token, and the cells depend on w (eq. 12a of docs/math.md). A block 2 that reads the text
may have the map (12b),

    u'_t = R_w'(R_w^-1(u_t)),   w' = w'(z_<t) any weights,

so that both blocks have the density of one tied block with the weights w'. Any language model gives
such weights, and the map has nothing to learn. Shape legend: B windows, T tokens, V token types, d
channels, D width.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tarflowlm.baseline import TokenLM
from tarflowlm.config import RunConfig
from tarflowlm.data import Corpus, WindowSampler, eval_windows
from tarflowlm.errors import SILENT, Progress
from tarflowlm.flow import numerics
from tarflowlm.flow.channelwise import Mix1Coupling
from tarflowlm.flow.codebook import Codebook
from tarflowlm.flow.heads import HeadShape
from tarflowlm.flow.inputs import InputMap
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.transformer import Transformer
from tarflowlm.model import LanguageModel, as_flow, seeded
from tarflowlm.model_config import FlowConfig, TransformerConfig
from tarflowlm.training.optim import build_optimizers, norms, schedule, take_step

Reads = Literal["text, features", "text", "noise"]
"""The tokens of z_<t, and what block 1 computes of them at the position; the tokens alone; u_<t."""
CHANNELS, SEPARATION = 16, 24.0
"""Of the codebook of a baseline, whose codes hardly overlap."""
ROWS = 16
"""Windows that are evaluated at once."""
OTHER_WINDOWS = 1000
"""Added to the seed of a run, so that block 2 sees its windows in another order than block 1."""


@dataclass
class Known:
    """Texts as block 1 maps them."""

    below: "Below"
    tokens: Int[Tensor, "B T"]
    z: Float[Tensor, "B T d"]
    features: Float[Tensor, "B T D"]
    """c_t, a function of z_<t."""

    @cached_property
    def log_w(self) -> Float[Tensor, "B T V"]:
        """log w(z_<t)."""
        return self.below.head(self.features).log_softmax(-1)

    @cached_property
    def noise(self) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B T"]]:
        """u of block 1, and log|det du/dz|, in nats."""
        return self.mapped(self.log_w)

    def mapped(
        self, log_w: Float[Tensor, "B T V"]
    ) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B T"]]:
        """R_w(z) with these weights, and its log|det|, in nats."""
        codebook = self.below.codebook
        return numerics.rosenblatt(self.z, log_w, codebook.mean, codebook.log_std)

    def log_prob(self, log_w: Float[Tensor, "B T V"]) -> Float[Tensor, "B T"]:
        """log sum_k w_k N_k(z) with these weights, in nats."""
        codebook = self.below.codebook
        return numerics.mixture_log_prob(self.z, log_w, codebook.mean, codebook.log_std)


class Below(nn.Module):
    """A frozen model of tokens as a tied Mix-d block: its codebook, and w(z_<t).

    A baseline gets a codebook of well separated codes, so it is a block without any training.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        assert model.config.patch == 1, "one token per position"
        self.model = model
        if isinstance(model, TokenLM):
            with seeded(0):
                self.codebook = Codebook(model.config.vocab_size, CHANNELS, separation=SEPARATION)
            self.head = model.head
        else:
            flow = as_flow(model)
            coupling = flow.prior.block(0).coupling
            assert isinstance(coupling, MixDCoupling), "block 1 must be tied Mix-d"
            self.codebook = flow.codebook
            self.head = coupling.weight_head
        self.eval().requires_grad_(requires_grad=False)

    @property
    def channels(self) -> int:
        return self.codebook.mean.shape[1]

    @property
    def width(self) -> int:
        return self.model.config.trunk.width

    @torch.no_grad()
    def forward(self, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"]) -> Known:
        return self.known(tokens, self.codebook.encode(tokens, noise))

    def known(self, tokens: Int[Tensor, "B T"], z: Float[Tensor, "B T d"]) -> Known:
        if isinstance(self.model, TokenLM):
            return Known(self, tokens, z, self.model.states(tokens[:, :-1]))
        return Known(self, tokens, z, as_flow(self.model).prior.block(0).features(z))


class Reader(nn.Module):
    """The Transformer of block 2."""

    def __init__(
        self, below: Below, trunk: TransformerConfig, *, layers: int, reads: Reads
    ) -> None:
        super().__init__()
        width = trunk.width
        self.reads = reads
        self.start = nn.Parameter(torch.randn(width))
        self.transformer = Transformer(trunk, layers)
        if reads == "noise":
            self.input = InputMap(below.channels, width)
        else:
            self.embedding = nn.Embedding(below.codebook.vocab_size, width)
        if reads == "text, features":
            self.skip = nn.Linear(below.width, width)

    def forward(self, known: Known) -> Float[Tensor, "B T D"]:
        """c_t of every position."""
        if self.reads == "noise":
            past = self.input(known.noise[0][:, :-1])
        else:
            past = self.embedding(known.tokens[:, :-1])
        x = torch.cat((self.start.expand(len(past), 1, -1), past), dim=1)
        if self.reads == "text, features":
            x = x + self.skip(known.features)
        features: Tensor = self.transformer(x)
        return features


class Block(nn.Module):
    """A block 2."""

    def log_prob(self, known: Known) -> Float[Tensor, "B T"]:
        """log p(z_t | z_<t) of both blocks, in nats."""
        raise NotImplementedError

    def loss(self, known: Known) -> Float[Tensor, "B T"]:
        """What training lowers, in nats of every token."""
        return -self.log_prob(known)


def _zeroed(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Weights(Block):
    """The map (12b): w' = softmax(head(c)), or softmax(log w + head(c)) if it `adds`.

    The head starts at zero.
    """

    def __init__(self, reader: Reader, vocab_size: int, *, adds: bool = False) -> None:
        super().__init__()
        self.reader = reader
        self.adds = adds
        self.head = _zeroed(nn.Linear(reader.transformer.config.width, vocab_size))

    def features(self, known: Known) -> Float[Tensor, "B T D"]:
        return self.reader(known)

    def log_weights(self, known: Known) -> Float[Tensor, "B T V"]:
        """log w'."""
        logits = self.head(self.features(known))
        return ((known.log_w + logits) if self.adds else logits).log_softmax(-1)

    def log_prob(self, known: Known) -> Float[Tensor, "B T"]:
        return known.log_prob(self.log_weights(known))

    def loss(self, known: Known) -> Float[Tensor, "B T"]:
        """-log w' of the tokens, to which the bound tends for sharp codes (eq. 12)."""
        return -self.log_weights(known).gather(-1, known.tokens[..., None])[..., 0]


class Further(Weights):
    """The map of trained weights, trained on: their Transformer is frozen, a small network changes
    its features, and the map starts as it was.
    """

    def __init__(self, trained: Weights) -> None:
        width = trained.reader.transformer.config.width
        super().__init__(trained.reader, trained.head.out_features, adds=trained.adds)
        self.reader = copy.deepcopy(trained.reader).requires_grad_(requires_grad=False)
        self.head.load_state_dict(trained.head.state_dict())
        last = _zeroed(nn.Linear(4 * width, width))
        self.more = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), last)

    def features(self, known: Known) -> Float[Tensor, "B T D"]:
        c = self.reader(known)
        return c + self.more(c)

    def loss(self, known: Known) -> Float[Tensor, "B T"]:
        """The bound itself."""
        return -self.log_prob(known)


class Mixed(Block):
    """Mix-1 of u_t, with as many components as tokens, close to the identity at the start.

    Its Transformer learns with it, from the density alone.
    """

    def __init__(self, below: Below, reader: Reader) -> None:
        super().__init__()
        self.reader = reader
        config = FlowConfig(latent_dim=below.channels)
        head = HeadShape(
            width=reader.transformer.config.width,
            hidden=config.head_hidden,
            features=config.head_features,
            noise=0.0,
        )
        components = below.codebook.vocab_size
        self.mix1 = Mix1Coupling(channels=below.channels, components=components, head=head)

    def log_prob(self, known: Known) -> Float[Tensor, "B T"]:
        u, log_det = known.noise
        return log_det + self.mix1.log_prob(u, self.reader(known))


@torch.no_grad()
def write(
    below: Below, block: Weights | None, noise: Float[Tensor, "B T d"]
) -> Float[Tensor, "B T d"]:
    """The latents of a noise, z_t = R_w'^-1(u'_t); with None by block 1 alone, with w."""
    z = torch.zeros_like(noise)
    mean, log_std = below.codebook.mean, below.codebook.log_std
    for t in range(noise.shape[1]):
        # values at t and after it have no effect
        so_far = z[:, : t + 1]
        known = below.known(below.codebook.decode(so_far), so_far)
        log_w = known.log_w if block is None else block.log_weights(known)
        z[:, t] = numerics.rosenblatt_inverse(noise[:, t], log_w[:, t], mean, log_std)
    return z


@dataclass(frozen=True)
class Boosted:
    """Bits per token of windows, [windows]: the bound with one sample of the posterior."""

    below: Tensor
    """By block 1 alone."""
    both: Tensor
    """By both blocks."""

    @property
    def gain(self) -> tuple[float, float]:
        """Bits per token that block 2 takes off, and the standard error over windows (paired)."""
        gains = self.below - self.both
        return gains.mean().item(), gains.std().item() / math.sqrt(len(gains))


@torch.no_grad()
def evaluate(below: Below, block: Block, windows: Int[Tensor, "N T"]) -> Boosted:
    """The bound on windows, with noise from a fixed seed."""
    parts = list[tuple[Tensor, Tensor]]()
    for known in _known(below, windows):
        normaliser = below.codebook.log_normaliser(known.z)
        nats = normaliser - known.log_prob(known.log_w), normaliser - block.log_prob(known)
        parts.append((nats[0].mean(-1) / math.log(2), nats[1].mean(-1) / math.log(2)))
    return Boosted(*(torch.cat(windows) for windows in zip(*parts, strict=True)))


def _known(below: Below, windows: Int[Tensor, "N T"]) -> Iterator[Known]:
    """`ROWS` windows at a time, with noise from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    for tokens in windows.split(ROWS):
        yield below(tokens, torch.randn(*tokens.shape, below.channels, generator=generator))


B = TypeVar("B", bound=Block)


def fit(
    make: Callable[[], B],
    below: Below,
    corpus: Corpus,
    run: RunConfig,
    progress: Progress = SILENT,
) -> B:
    """A block 2, trained on a text by the optimiser, seed, batches and steps, or minutes, of a run.

    Minutes are those of one core, whatever else it does meanwhile. Returns the state of the best
    validation; the untrained one is validated, too. `progress` advances by steps, or seconds.
    """
    train = run.train
    context = run.model.context
    with seeded(run.seed):
        block = make()
    optimizers = build_optimizers(run.optim, block)
    seed = run.seed + OTHER_WINDOWS
    sampler = WindowSampler(
        corpus.split("train"),
        window=context,
        batch=train.batch_size,
        seed=seed,
        end=corpus.tokenizer.end,
    )
    valid = eval_windows(corpus.split("valid"), context, train.evaluate_windows)
    generator = torch.Generator().manual_seed(seed)
    began = time.process_time()
    step = done = 0
    end = round(60 * train.minutes) or train.num_steps
    best, least = block, math.inf
    while True:
        if step % train.evaluate_every == 0 or done >= end:
            with torch.no_grad():
                losses = [block.loss(known).mean(-1) for known in _known(below, valid)]
            nats = torch.cat(losses).mean().item()
            if nats < least:
                best, least = copy.deepcopy(block), nats
        if done >= end:
            return best
        tokens = sampler.next()
        noise = torch.randn(*tokens.shape, below.channels, generator=generator)
        block.loss(below(tokens, noise)).mean().backward()
        trained = {name: p for name, p in block.named_parameters() if p.grad is not None}
        norm = norms({name: p.grad for name, p in trained.items() if p.grad is not None}).norm()
        lr = run.optim.lr * schedule(run.optim, done, end)
        take_step(optimizers, trained, norm, lr=lr, grad_clip=run.optim.grad_clip)
        step += 1
        before, done = done, round(time.process_time() - began) if train.minutes else step
        progress.advance(done - before)
