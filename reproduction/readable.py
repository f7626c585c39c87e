"""Which noise a small drafter can read: `python -m reproduction.readable english-mini`.

A frozen tied Mix-d block draws text. A drafter reads the block's features at one place s, the last
tokens up to s and the *noise* of the next `AHEAD` places, and names their tokens in one call. If it
is right, the block can check several tokens in one call, and the text stays what steps write: the
noise decides it. A run is the number of right guesses from the first on.

All arms have the same teacher, drafter, batches and steps. The rule, fixed before the runs: a noise
reads better than Gumbel numbers, which every autoregressive model has, if its runs are longer by
more than two standard errors of the paired difference for every seed.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Generator, Tensor, nn

import tarflowlm
from reproduction.ngrams import KneserNey
from reproduction.noises import (
    Codes,
    Gumbel,
    InverseCdf,
    Noise,
    NoNoise,
    Tree,
    huffman,
    readable_tree,
)
from reproduction.results import markdown_table, write
from tarflowlm.cli.main import main, run_command
from tarflowlm.cli.options import Json
from tarflowlm.data import encode_text
from tarflowlm.flow import widen
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.model import as_flow, seeded
from tarflowlm.options import arg
from tarflowlm.schema import Count

AHEAD = 8
"""Places whose tokens a drafter names."""
BEFORE = 8
"""Tokens that it reads."""
LENGTH = 192
"""Tokens of a window of text."""
STARTS = 20
"""Places s of a window."""
ORDER = 5
"""Of the n-grams beside the drafters."""


class Batch(NamedTuple):
    """Places s of windows of real text, n in all."""

    features: Tensor  # [n, D], of the block for the token after s
    before: Tensor  # [n, BEFORE] tokens up to s
    tokens: Tensor  # [n, AHEAD] tokens after s
    log_p: Tensor  # [n, AHEAD, V], the block's own


class Teacher:
    """A frozen tied Mix-d block with the tokens of its own training text."""

    def __init__(self, name: str) -> None:
        lm = tarflowlm.load(name)
        self.model = as_flow(lm.model).requires_grad_(False)
        self.block = self.model.prior.block(0)
        assert isinstance(self.block.coupling, MixDCoupling)
        self.head = self.block.coupling.weight_head
        self.vocab_size = lm.model.config.vocab_size
        self.width = lm.run.model.trunk.width
        self.splits = {
            split: torch.as_tensor(encode_text(lm.run.data, lm.tokenizer, split).astype(np.int64))
            for split in ("train", "test")
        }

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """The features [B, T, D] of the block for texts [B, T], by codes without noise."""
        z = self.model.codebook.encode(x, torch.zeros(*x.shape, self.model.config.latent_dim))
        return self.block.features(z)

    def windows(self, split: str, rows: int, generator: Generator) -> Tensor:
        text = self.splits[split]
        first = torch.randint(len(text) - LENGTH, (rows, 1), generator=generator)
        return text[first + torch.arange(LENGTH)]

    @torch.no_grad()
    def batch(self, split: str, rows: int, generator: Generator) -> Batch:
        x = self.windows(split, rows, generator)
        c = self.features(x)
        row = torch.arange(rows)[:, None]
        places = range(BEFORE, LENGTH - AHEAD)
        s = torch.rand(rows, len(places), generator=generator).argsort(-1)[:, :STARTS] + BEFORE
        after = s[..., None] + torch.arange(1, AHEAD + 1)
        log_p = widen(self.head(c[row[..., None], after])).log_softmax(-1)
        before = x[row[..., None], s[..., None] + torch.arange(1 - BEFORE, 1)]
        return Batch(
            c[row, s + 1].flatten(0, 1),
            before.flatten(0, 1),
            x[row[..., None], after].flatten(0, 1),
            log_p.flatten(0, 1),
        )


class Drafter(nn.Module):
    """Two Transformer layers over features, tokens and the noise of each place; causal."""

    def __init__(self, teacher: Teacher, noise: Noise, width: int) -> None:
        super().__init__()
        self.noise = noise
        self.read = nn.Sequential(nn.Linear(noise.width, width), nn.GELU(), nn.Linear(width, width))
        self.features = nn.Linear(teacher.width, width)
        self.embedding = nn.Embedding(teacher.vocab_size, width)
        self.place = nn.Parameter(0.02 * torch.randn(1 + BEFORE + AHEAD, width))
        layer = nn.TransformerEncoderLayer(
            width, 2, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, teacher.vocab_size)
        self.suits = nn.Linear(width, 1)  # how much the match of noise and token counts
        self.register_buffer("mask", torch.ones(len(self.place), len(self.place)).triu(1).bool())

    def forward(self, batch: Batch, noise: Tensor) -> Tensor:
        """Logits [n, AHEAD, V]."""
        flat = noise.flatten(0, 1)
        read = self.read(self.noise.shown(flat).float()).view(*noise.shape[:2], -1)
        x = torch.cat(
            (self.features(batch.features)[:, None], self.embedding(batch.before), read), 1
        )
        h = self.norm(self.layers(x + self.place, mask=self.mask))[:, -AHEAD:]
        logits = self.head(h)
        match = self.noise.match(flat.float())
        return logits if match is None else logits + self.suits(h) * match.view_as(logits)


class Run(NamedTuple):
    """What a drafter guessed in each window: means over its starts."""

    right: Tensor  # [B, AHEAD]
    bits: Tensor  # [B, AHEAD], left of each place
    length: Tensor  # [B]


def noise_of(noise: Noise, batch: Batch, generator: Generator) -> Tensor:
    """The noise [n, AHEAD, *] of the batch's tokens."""
    flat = noise.of(batch.tokens.flatten(), batch.log_p.flatten(0, 1), generator)
    return flat.view(*batch.tokens.shape, -1).float()


def train(
    teacher: Teacher, noises: dict[str, Noise], args: "Args", seed: int, steps: int
) -> dict[str, Drafter]:
    """A drafter for each noise, all on the same batches."""
    drafters: dict[str, Drafter] = {}
    for name, noise in noises.items():
        with seeded(seed):
            drafters[name] = Drafter(teacher, noise, args.width)
    optimizers = {
        name: torch.optim.AdamW(d.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=0.01)
        for name, d in drafters.items()
    }
    generator = torch.Generator().manual_seed(seed + 1)
    start = time.monotonic()
    for step in range(steps):
        lr = args.lr * min(1, (step + 1) / 30) * min(1, 2 * (1 - step / steps))
        batch = teacher.batch("train", args.rows, generator)
        for name, drafter in drafters.items():
            own = torch.Generator().manual_seed(1000 * seed + step)
            logits = drafter(batch, noise_of(drafter.noise, batch, own))
            loss = F.cross_entropy(logits.flatten(0, 1), batch.tokens.flatten())
            optimizers[name].param_groups[0]["lr"] = lr
            optimizers[name].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
            optimizers[name].step()
        if (step + 1) % 100 == 0:
            print(f"seed {seed}, step {step + 1}: {time.monotonic() - start:.0f} s", flush=True)
    return drafters


@torch.no_grad()
def measure(teacher: Teacher, drafters: dict[str, Drafter], args: "Args") -> dict[str, Run]:
    """Each drafter on the same windows of the test split."""
    found: dict[str, list[Run]] = {name: [] for name in drafters}
    generator = torch.Generator().manual_seed(0)
    for part in range(args.windows // args.rows):
        batch = teacher.batch("test", args.rows, generator)
        for name, drafter in drafters.items():
            own = torch.Generator().manual_seed(part)
            logits = drafter(batch, noise_of(drafter.noise, batch, own))
            right = (logits.argmax(-1) == batch.tokens).float()
            nats = F.cross_entropy(logits.mT, batch.tokens, reduction="none")
            length = right.cumprod(-1).sum(-1)
            by_window = [x.unflatten(0, (args.rows, STARTS)).mean(1) for x in (right, nats, length)]
            found[name].append(Run(by_window[0], by_window[1] / math.log(2), by_window[2]))
    return {
        name: Run(*(torch.cat(parts) for parts in zip(*runs, strict=True)))
        for name, runs in found.items()
    }


def ngram_runs(teacher: Teacher, args: "Args") -> Tensor:
    """Run lengths [B] of 5-grams that draw one after another, with the text's Gumbel numbers."""
    model = KneserNey(teacher.splits["train"].numpy(), teacher.vocab_size, ORDER)
    batch = teacher.batch("test", args.windows, torch.Generator().manual_seed(0))
    chosen = slice(None, None, STARTS)  # one start of a window: many tokens are tried
    gumbel = noise_of(Gumbel(teacher.vocab_size), batch, torch.Generator().manual_seed(0))[chosen]
    text, tokens = batch.before[chosen, 1 - ORDER :], batch.tokens[chosen]
    right = torch.zeros(tokens.shape)
    every = torch.arange(teacher.vocab_size)
    for place in range(AHEAD):
        past = text[:, None, 1 - ORDER :].expand(-1, teacher.vocab_size, -1)
        tried = torch.cat((past, every.expand(len(text), -1)[..., None]), -1)
        p = torch.from_numpy(model.probabilities(tried.flatten().numpy())[ORDER - 1 :: ORDER])
        guess = (p.view(len(text), -1).log() + gumbel[:, place]).argmax(-1)
        right[:, place] = guess == tokens[:, place]
        text = torch.cat((text, guess[:, None]), 1)
    return right.cumprod(-1).sum(-1)


@torch.no_grad()
def jacobi_runs(teacher: Teacher, args: "Args") -> Tensor:
    """Tokens [B] that one call of the block itself adds, which reads its own last guesses.

    Jacobi rounds under the Gumbel numbers of the text: all `AHEAD` places are guessed anew in each
    call, until they stand.
    """
    generator = torch.Generator().manual_seed(0)
    x = teacher.windows("test", args.windows, generator)
    first = LENGTH - AHEAD
    log_p = widen(teacher.head(teacher.features(x)[:, first:])).log_softmax(-1)
    tokens = x[:, first:]
    noise = Gumbel(teacher.vocab_size)
    g = noise.of(tokens.flatten(), log_p.flatten(0, 1), generator).view_as(log_p)
    guess = x.clone()
    guess[:, first:] = x[:, first - 1 : first]
    rounds = torch.zeros(len(x))
    while (wrong := (guess != x).any(-1)).any():
        log_p = widen(teacher.head(teacher.features(guess)[:, first:])).log_softmax(-1)
        guess[:, first:] = (log_p + g).argmax(-1)
        rounds += wrong
    return AHEAD / rounds


@torch.no_grad()
def tree_of(teacher: Teacher, blind: Drafter, args: "Args", seed: int) -> Tree:
    """Codes for a reader who has what a drafter without noise knows."""
    generator = torch.Generator().manual_seed(seed + 7)
    p: list[Tensor] = []
    q: list[Tensor] = []
    while sum(map(len, p)) < args.contexts:
        batch = teacher.batch("train", args.rows, generator)
        logits = blind(batch, noise_of(blind.noise, batch, generator))
        p.append(batch.log_p.exp().flatten(0, 1))
        q.append(logits.softmax(-1).flatten(0, 1))
    return Tree(readable_tree(torch.cat(p)[: args.contexts], torch.cat(q)[: args.contexts]))


def rows_of(teacher: Teacher, args: "Args", seed: int) -> list[dict[str, object]]:
    """Train all arms with one seed and measure them."""
    V = teacher.vocab_size
    blind = train(teacher, {"none": NoNoise()}, args, seed, args.steps)
    tree = tree_of(teacher, blind["none"], args, seed)
    frequencies = torch.bincount(teacher.splits["train"], minlength=V).double() + 1e-3
    with seeded(seed):
        noises: dict[str, Noise] = {
            "Gumbel numbers": Gumbel(V),
            "d = 1, in the order of ids": InverseCdf(torch.arange(V)),
            "d = 1, in the order of the tree": InverseCdf(tree.order),
            **{f"d = {d}, spread codes": Codes(V, d) for d in args.dims},
            "codes on Huffman's tree": Tree(huffman(frequencies)),
            "codes on a readable tree": tree,
        }
    drafters = blind | train(teacher, noises, args, seed, args.steps)
    runs = measure(teacher, drafters, args)
    rivals = runs["Gumbel numbers"]
    rows: list[dict[str, object]] = []
    for name, run in runs.items():
        ahead = run.length - rivals.length
        error = ahead.std() / math.sqrt(len(ahead))
        gained = (runs["none"].bits - run.bits).mean(0)
        rows.append(
            {
                "noise": name,
                "seed": seed,
                "numbers": drafters[name].noise.width,
                "run": run.length.mean().item(),
                "±": (run.length.std() / math.sqrt(len(ahead))).item(),
                "over Gumbel": ahead.mean().item(),
                "± ": error.item(),
                "tokens a call": 1 + run.length.mean().item(),
                **{f"right at {j}": run.right.mean(0)[j - 1].item() for j in (1, 2, 4, AHEAD)},
                **{f"bits read at {j}": gained[j - 1].item() for j in (1, 2, 4, AHEAD)},
            }
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class Args(Json):
    """Which noise of a tied Mix-d block a small drafter can read."""

    model: Annotated[tyro.conf.Positional[str], arg("MODEL")]
    """A flow of one tied Mix-d block."""
    out: Path = field(default=Path("docs/reproduce"))
    """Folder of the page."""
    steps: Count = 600
    seeds: Count = 2
    width: Count = 64
    rows: Count = 8
    """Windows of a batch."""
    windows: Count = 192
    """Windows of the test split."""
    contexts: Count = 4096
    """Places that the readable tree is made from."""
    dims: tuple[int, ...] = (2, 8, 16)
    lr: float = 3e-3


def run(args: Args) -> None:
    teacher = Teacher(args.model)
    rows: list[dict[str, object]] = []
    for seed in range(args.seeds):
        rows += rows_of(teacher, args, seed)
        write(args.out / f"readable-{args.model}.md", markdown_table(rows))
    ngrams, jacobi = ngram_runs(teacher, args), jacobi_runs(teacher, args)
    extra: Sequence[dict[str, object]] = [
        {"noise": f"{ORDER}-grams, one after another, Gumbel numbers", "run": ngrams.mean().item()},
        {"noise": "Jacobi rounds of the block itself", "tokens a call": jacobi.mean().item()},
    ]
    write(args.out / f"readable-{args.model}.md", markdown_table([*rows, *extra]))
    print(markdown_table([*rows, *extra]))


def compare(argv: list[str]) -> None:
    """Train and measure drafters with these words."""
    run_command(sys.modules[__name__], argv, "python -m reproduction.readable")


if __name__ == "__main__":
    main(dispatch=compare)
