"""Models by others in the shape of ours, trained and measured: the tables of docs/comparison.md.

    pip install flow-matching
    python benchmarks/peers.py --data tales --judge runs/judge --ours runs/mini-ar runs/mini-mixd

This trains two peers, measures them and the finished runs --ours in the same way, and prints a
table. The peers:

gpt2    GPT-2 of `transformers`, with a start token. Its likelihood is exact.
masked  Discrete flow matching with a masked source, which is masked diffusion. Path, loss and
        sampler are from Meta's `flow-matching` (Gat et al. 2024); its licence is CC BY-NC, so
        nothing else here uses it. The posterior is a ModernBERT of `transformers` with attention in
        all directions. The generalised KL loss, averaged over t, is an upper bound on the negative
        log-likelihood (Shaul et al. 2024; with a linear schedule it is MDLM's bound).

Both have the width, layers and heads of mini-ar, its batches in the same order, its optimisers and
its schedule. Their options that only affect speed are set to the faster choice.
"""

import argparse
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # `reproduction` lies beside this folder

from shapes import continued, descend, gpt2, modernbert  # beside this file

from reproduction.judges import load_judge
from reproduction.quality import compare_texts
from tarflowlm.data import Corpus, WindowSampler, eval_windows, prepare_corpus
from tarflowlm.evaluation.likelihood import bits, evaluate
from tarflowlm.files import read_json, replacing, write_json
from tarflowlm.generation import generate
from tarflowlm.model import seeded
from tarflowlm.presets import preset, with_steps
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.training.muon import Muon
from tarflowlm.training.optim import schedule

BATCH, EVAL_BATCH = 64, 32
TIMES = 4  # values of t per window in the bound of the masked flow, one from each quarter of [0, 1]
DENOISING_STEPS = (64, 16)


class Peer(ABC):
    """A model of tokens [B, T] by others. It has one more token, `extra`, which it never writes."""

    is_exact: bool
    """Whether `nats` is the likelihood itself; otherwise it is a bound."""
    model: nn.Module

    def load(self, weights: Path) -> Self:
        """Take the weights that this script left in a file."""
        self.model.load_state_dict(torch.load(weights, weights_only=True))
        self.model.eval()
        return self

    @abstractmethod
    def nats(self, tokens: Tensor, times: int = 1) -> Tensor:
        """The negative log-likelihood of each token [B, T], or a bound on it."""

    @abstractmethod
    def go_on(self, given: Tensor, num: int) -> Tensor:
        """`num` tokens after the tokens `given` [B, T]."""

    def sample(self, batch: int, length: int) -> Tensor:
        return self.go_on(torch.zeros(batch, 0, dtype=torch.int64), length)

    @torch.inference_mode()
    def nats_of_windows(self, windows: Tensor) -> Tensor:
        """`nats` in the mean over each window [B]."""
        return torch.cat(
            [self.nats(part, TIMES).double().mean(1) for part in windows.split(EVAL_BATCH)]
        )


class Gpt2(Peer):
    """Predicts each token from a start token and the tokens before it."""

    is_exact = True

    def __init__(self, config: Any) -> None:
        self.model, self.extra = (
            gpt2(replace(config, vocab_size=config.vocab_size + 1)),
            config.vocab_size,
        )

    def nats(self, tokens: Tensor, times: int = 1) -> Tensor:
        start = torch.full_like(tokens[:, :1], self.extra)
        logits = (
            self.model(input_ids=torch.cat([start, tokens[:, :-1]], 1))
            .logits[..., : self.extra]
            .float()
        )
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(
            tokens.shape
        )

    def go_on(self, given: Tensor, num: int) -> Tensor:
        before = F.pad(given, (1, 0), value=self.extra)
        return continued(self.model, before, num + 1, self.extra)[:, before.shape[1] :]


class Masked(Peer):
    """Tokens are masked at random times; the model guesses all masked ones at once."""

    is_exact = False

    def __init__(self, config: Any) -> None:
        from flow_matching.loss import MixturePathGeneralizedKL
        from flow_matching.path import MixtureDiscreteProbPath
        from flow_matching.path.scheduler import PolynomialConvexScheduler

        self.model, self.extra = (
            modernbert(replace(config, vocab_size=config.vocab_size + 1)),
            config.vocab_size,
        )
        self.path = MixtureDiscreteProbPath(PolynomialConvexScheduler(n=1.0))
        self.loss = MixturePathGeneralizedKL(self.path, reduction="none")

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of p(x_1 | x_t), float32; the mask itself has none."""
        return (
            self.model(input_ids=tokens)
            .logits.float()
            .index_fill(-1, torch.tensor([self.extra]), -math.inf)
        )

    def nats(self, tokens: Tensor, times: int = 1) -> Tensor:
        """A bound on the negative log-likelihood of each token [B, T], from `times` values of t."""
        total = torch.zeros(tokens.shape)
        for part in range(times):
            # evenly spread over the batch, too, for less variance
            rows = (torch.arange(len(tokens)) + torch.rand(())) / len(tokens)
            t = ((part + rows) / times).clamp(max=1 - 1e-6)
            x_t = self.path.sample(x_0=torch.full_like(tokens, self.extra), x_1=tokens, t=t).x_t
            # a token that is not masked is known, and costs nothing
            loss = self.loss(logits=self.logits(x_t), x_1=tokens, x_t=x_t, t=t)
            total = total + torch.where(x_t == self.extra, loss, 0.0) / times
        return total

    def one_by_one(self, x: Tensor, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [B, V] of the masked tokens of x [B, T] in the order of `places` [B, n], with
        their indices: write the token there before the next. It is the limit of many steps.
        """
        rows = torch.arange(len(x))
        for at in places.T:
            yield self.logits(x)[rows, at], (rows, at)

    @torch.inference_mode()
    def nats_in_order(self, tokens: Tensor, orders: int = 1) -> Tensor:
        """The bound of `nats` by random orders of each row. A few have less noise than many t."""
        total = torch.zeros(tokens.shape)
        for _ in range(orders):
            x = torch.full_like(tokens, self.extra)
            for logits, at in self.one_by_one(x, torch.rand(tokens.shape).argsort(1)):
                x[at] = tokens[at]
                total[at] += F.cross_entropy(logits, tokens[at], reduction="none") / orders
        return total

    @torch.inference_mode()
    def go_on(self, given: Tensor, num: int) -> Tensor:
        x = F.pad(given, (0, num), value=self.extra)
        places = given.shape[1] + torch.rand(len(x), num).argsort(1)
        for logits, at in self.one_by_one(x, places):
            x[at] = logits.softmax(-1).multinomial(1)[:, 0]
        return x[:, given.shape[1] :]

    @torch.inference_mode()
    def sample(self, batch: int, length: int, steps: int = DENOISING_STEPS[0]) -> Tensor:
        from flow_matching.solver import MixtureDiscreteEulerSolver

        def posterior(x: Tensor, t: Tensor) -> Tensor:
            known = F.one_hot(x, self.extra + 1).float()
            return torch.where(x[..., None] == self.extra, self.logits(x).softmax(-1), known)

        solver = MixtureDiscreteEulerSolver(posterior, self.path, self.extra + 1)
        masked = torch.full((batch, length), self.extra)
        return solver.sample(x_init=masked, step_size=1 / steps)


PEERS: dict[str, type[Peer]] = {"gpt2": Gpt2, "masked": Masked}


def load_peers(folder: Path, config: Any) -> dict[str, Peer]:
    """The peers whose weights this script left in `folder`, in the shape of a `BaselineConfig`."""
    files = {name: folder / f"{name}.pt" for name in PEERS}
    found = {name: PEERS[name](config).load(at) for name, at in files.items() if at.exists()}
    if not found:
        raise SystemExit(f"{folder} has no weights of peers: train them with benchmarks/peers.py")
    return found


def train(peer: Peer, corpus: Corpus, run: Any) -> None:
    """Train like `tarflowlm train`: Muon for the matrices of the layers, AdamW for everything
    else.
    """
    named = list(peer.model.named_parameters())
    is_matrix = {name: p.ndim == 2 and (".h." in name or ".layers." in name) for name, p in named}
    matrices, rest = (
        [p for name, p in named if is_matrix[name] is wanted] for wanted in (True, False)
    )
    betas, decay = (0.9, run.optim.beta2), run.optim.weight_decay
    wide, narrow = ([p for p in rest if (p.ndim >= 2) is wanted] for wanted in (True, False))
    groups = [
        {"params": p, "weight_decay": d, "lr_scale": 1.0} for p, d in ((wide, decay), (narrow, 0.0))
    ]
    muon = Muon(
        [{"params": matrices, "lr_scale": 1.0}],
        precision="float32",
        lr=run.optim.lr,
        weight_decay=decay,
    )
    optimizers = [torch.optim.AdamW(groups, betas=betas, eps=1e-10), muon]
    text, window = corpus.split("train"), run.model.context
    batches = WindowSampler(text, window=window, batch=run.train.batch_size, seed=run.seed)
    for step in range(steps := run.train.num_steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = run.optim.lr * schedule(run.optim, step, steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=run.train.precision == "bfloat16"):
            loss = peer.nats(batches.next()).mean()
        descend(loss, peer.model, optimizers, run.optim.grad_clip)
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1} of {steps}: {bits(loss.item()):.3f} bits",
                file=sys.stderr,
                flush=True,
            )


def measure(
    name: str, bpc: str, model: nn.Module, draw: Callable[..., Tensor], text: Tensor, *readers: Any
) -> str:
    """Print the row of samples, as many as `text` [N, T] has, and return the row of the text.
    `readers` are a tokenizer and a judge.
    """
    start = time.perf_counter()
    samples = torch.cat([draw(len(part), text.shape[1]) for part in text.split(BATCH)])
    rate = samples.numel() / (time.perf_counter() - start)
    drawn, real, similarity = compare_texts(samples, text, *readers)
    parameters = sum(p.numel() for p in model.parameters())
    entropies = f"{drawn.entropy:.3f} | {drawn.word_entropy:.3f}"
    print(
        f"| {name} | {parameters:,} | {bpc} | {drawn.perplexity:.3f} | {similarity:.3f} | "
        f"{entropies} | {rate:,.0f} |",
        flush=True,
    )
    entropies = f"{real.entropy:.3f} | {real.word_entropy:.3f}"
    return f"| real text | | | {real.perplexity:.3f} | 1 | {entropies} | |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", required=True, help="text in lower case, split as tarflowlm splits it"
    )
    parser.add_argument(
        "--judge", required=True, help="run of a baseline on another text, or one of transformers"
    )
    parser.add_argument(
        "--ours", nargs="*", default=[], type=Path, help="finished runs of tarflowlm"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/peers"), help="weights of the peers, trained once"
    )
    parser.add_argument("--steps", type=int, help="fewer, for a quick look")
    parser.add_argument("--windows", type=int, default=4096)
    parser.add_argument("--num", type=int, default=500, help="samples")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], default="float32", help="of training"
    )
    args = parser.parse_args()
    run = preset("mini-ar") if args.steps is None else with_steps(preset("mini-ar"), args.steps)
    run = replace(run, train=replace(run.train, precision=args.precision))
    corpus, judge = prepare_corpus(replace(run.data, source=args.data)), load_judge(args.judge)
    # before any training
    import flow_matching  # noqa: F401

    ours = {directory: load_checkpoint(directory) for directory in args.ours}
    for directory, lm in ours.items():
        if lm.tokenizer.fingerprint != corpus.tokenizer.fingerprint:
            sys.exit(f"{directory} has other tokens than {args.data}: give models of these")
    windows, text = (
        eval_windows(corpus.split("test"), run.model.context, num)
        for num in (args.windows, args.num)
    )
    config = replace(run.model, vocab_size=corpus.tokenizer.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    how = {"data": args.data, "steps": run.train.num_steps, "precision": args.precision}
    options = args.out / "options.json"
    has_weights = any(args.out.glob("*.pt"))
    if has_weights and not (options.exists() and read_json(options) == how):
        sys.exit(f"{args.out} holds peers that were trained with other options: give another --out")
    write_json(options, how)
    print(
        "| model | parameters | bits per character | perplexity | MAUVE | entropy | of words | "
        "tokens/s |"
    )
    print("|" + " --- |" * 8)
    for name, kind in PEERS.items():
        weights = args.out / f"{name}.pt"
        if not weights.exists():
            with seeded(run.seed):
                peer = kind(config)
                train(peer, corpus, run)
            with replacing(weights) as temporary:
                torch.save(peer.model.state_dict(), temporary)
    for name, peer in load_peers(args.out, config).items():
        with seeded(run.seed):
            nats = peer.nats_of_windows(windows)
        bpc = f"{bits(nats.mean().item()):.4f} ± {bits(nats.std().item()) / len(nats) ** 0.5:.4f}"
        draws = {name: peer.sample}
        if not peer.is_exact:
            bpc, draws = (
                f"<= {bpc}",
                {f"{name}, {n} steps": partial(peer.sample, steps=n) for n in DENOISING_STEPS},
            )
        for label, draw in draws.items():
            with seeded(run.seed):
                real = measure(label, bpc, peer.model, draw, text, corpus.tokenizer, judge)
    for directory, lm in ours.items():
        model, generator = lm.model, torch.Generator().manual_seed(run.seed)
        found = evaluate(model, windows, torch.from_numpy(corpus.tokenizer.characters_per_token))

        def draw(
            batch: int, length: int, model: Any = model, generator: torch.Generator = generator
        ) -> Tensor:
            return generate(
                model, num_tokens=length, num=batch, generator=generator, decoder="auto"
            ).tokens

        bpc = f"{'' if model.is_exact else '<= '}{found.bpc:.4f} ± {bits(found.stderr):.4f}"
        real = measure(directory.name, bpc, model, draw, text, corpus.tokenizer, judge)
    print(real)


if __name__ == "__main__":
    main()
