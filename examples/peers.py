"""Models of others on the text and the budget of the mini presets: the tables of docs/comparison.md.

    pip install flow-matching
    python examples/peers.py --data english27.txt.xz --judge runs/judge --ours runs/mini-ar runs/mini-mixd

trains two peers, measures them and the finished runs --ours in the same way, and prints a table. The peers:

gpt2    GPT-2 of `transformers`, with a start token. Its likelihood is exact.
masked  Discrete flow matching with a masked source, which is masked diffusion: path, loss and sampler of Meta's
        `flow-matching` (Gat et al. 2024; licence CC BY-NC, for which reason nothing else here uses it), posterior by
        a ModernBERT of `transformers` with attention in all directions. Its generalised KL loss, averaged over t, is
        an upper bound on the negative log-likelihood (Shaul et al. 2024; with a linear schedule that of MDLM).

Both have the width, layers and heads of mini-ar, its batches in the same order, its optimisers and its schedule.
"""

import argparse
import json
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tarflowlm.bench.peers import gated_width, gpt2, stepper
from torch import Tensor, nn

from tarflowlm.baseline import BaselineConfig
from tarflowlm.config import RunConfig
from tarflowlm.data import Corpus, WindowSampler, cached_corpus, eval_windows
from tarflowlm.evaluation.judges import Judge, load_judge
from tarflowlm.evaluation.likelihood import bits, evaluate
from tarflowlm.evaluation.quality import TextStatistics, compare_texts
from tarflowlm.generation import generate
from tarflowlm.language_model import seeded
from tarflowlm.presets import preset, with_steps
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.training.muon import Muon
from tarflowlm.training.optim import schedule, set_learning_rate

BATCH, EVAL_BATCH = 64, 32
TIMES = 4
"""Values of t per window in the bound of the masked flow, one from each quarter of [0, 1]."""


class Peer(ABC):
    """A model over `vocab_size` tokens and one more, `extra`, that it never writes."""

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        self.model, self.vocab_size, self.extra = model, vocab_size, vocab_size

    @abstractmethod
    def nats(self, tokens: Tensor, times: int = 1) -> Tensor:
        """(A bound on) the negative log-likelihood of each token [B, T]."""

    @abstractmethod
    def sample(self, batch: int, length: int) -> Tensor:
        """Tokens [batch, length]."""


class Gpt2(Peer):
    """Predicts each token from those before it and a start token."""

    def __init__(self, config: BaselineConfig, vocab_size: int) -> None:
        super().__init__(gpt2(replace(config, vocab_size=vocab_size + 1)), vocab_size)

    def nats(self, tokens: Tensor, times: int = 1) -> Tensor:
        start = torch.full_like(tokens[:, :1], self.extra)
        logits = self.model(input_ids=torch.cat([start, tokens[:, :-1]], 1)).logits[..., : self.vocab_size].float()
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)

    @torch.inference_mode()
    def sample(self, batch: int, length: int) -> Tensor:
        following, drawn = stepper(self.model), [torch.full((batch, 1), self.extra)]
        for _ in range(length):
            logits = following(drawn[-1])[:, : self.vocab_size]
            drawn.append(torch.multinomial(logits.softmax(-1), 1))
        return torch.cat(drawn[1:], 1)


class Masked(Peer):
    """Tokens are masked at random times; the model guesses all masked ones at once."""

    def __init__(self, config: BaselineConfig, vocab_size: int) -> None:
        from flow_matching.loss import MixturePathGeneralizedKL
        from flow_matching.path import MixtureDiscreteProbPath
        from flow_matching.path.scheduler import PolynomialConvexScheduler

        super().__init__(modernbert(config, vocab_size + 1), vocab_size)
        self.path = MixtureDiscreteProbPath(PolynomialConvexScheduler(n=1.0))
        self.loss = MixturePathGeneralizedKL(self.path, reduction="none")
        self.steps = config.context

    def logits(self, tokens: Tensor) -> Tensor:
        """Of p(x_1 | x_t), float32; the mask itself has none."""
        logits = self.model(input_ids=tokens).logits.float()
        return logits.index_fill(-1, torch.tensor([self.extra]), -math.inf)

    def nats(self, tokens: Tensor, times: int = 1) -> Tensor:
        total = torch.zeros(tokens.shape)
        for part in range(times):
            # evenly spread over the batch, too, for less variance
            rows = (torch.arange(len(tokens)) + torch.rand(())) / len(tokens)
            t = ((part + rows) / times).clamp(max=1 - 1e-6)
            x_t = self.path.sample(x_0=torch.full_like(tokens, self.extra), x_1=tokens, t=t).x_t
            # what is not masked is known, and costs nothing
            loss = self.loss(logits=self.logits(x_t), x_1=tokens, x_t=x_t, t=t)
            total = total + torch.where(x_t == self.extra, loss, 0.0) / times
        return total

    @torch.inference_mode()
    def sample(self, batch: int, length: int) -> Tensor:
        from flow_matching.solver import MixtureDiscreteEulerSolver

        def posterior(x: Tensor, t: Tensor) -> Tensor:
            known = F.one_hot(x, self.vocab_size + 1).float()
            return torch.where(x[..., None] == self.extra, self.logits(x).softmax(-1), known)

        solver = MixtureDiscreteEulerSolver(posterior, self.path, self.vocab_size + 1)
        start = torch.full((batch, length), self.extra)
        return solver.sample(x_init=start, step_size=1 / self.steps)


def modernbert(config: BaselineConfig, vocab_size: int) -> nn.Module:
    """A ModernBERT of our shape, with full attention in every layer.

    Weights start larger than its default of 0.02, which is for width 768: at width 128 the model with that start
    still knew nothing but the frequencies of letters after 900 steps.
    """
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    trunk = config.trunk
    theirs = ModernBertConfig(
        vocab_size=vocab_size, max_position_embeddings=config.context, hidden_size=trunk.width,
        num_hidden_layers=config.layers, num_attention_heads=trunk.num_heads,
        intermediate_size=gated_width(trunk), layer_types=["full_attention"] * config.layers,
        initializer_range=trunk.width**-0.5, attn_implementation="sdpa",
        pad_token_id=None, bos_token_id=None, eos_token_id=None, cls_token_id=None, sep_token_id=None,
    )  # fmt: skip
    return ModernBertForMaskedLM(theirs)


def train(peer: Peer, corpus: Corpus, run: RunConfig) -> None:
    """As `tarflowlm train`: Muon for the matrices of the layers, AdamW for everything else."""
    named = list(peer.model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and (".h." in name or ".layers." in name)]
    taken = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": run.optim.weight_decay, "lr_scale": 1.0},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    betas = (run.optim.beta1, run.optim.beta2)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=betas, eps=1e-10)]
    muon = [{"params": matrices, "lr_scale": 1.0}]
    optimizers.append(Muon(muon, precision="float32", weight_decay=run.optim.weight_decay, momentum=0.95))
    steps, half = run.train.num_steps, run.train.precision == "bfloat16"
    batches = WindowSampler(
        corpus.split("train"), window=run.model.context, batch=run.train.batch_size, seed=run.seed
    )
    start, losses = time.perf_counter(), []
    for step in range(steps):
        set_learning_rate(optimizers, run.optim.lr * schedule(run.optim, step, steps))
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            loss = peer.nats(batches.next()).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(peer.model.parameters(), run.optim.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            recent = bits(sum(losses[-100:]) / 100)
            seconds = time.perf_counter() - start
            say(f"step {step + 1} of {steps}: {recent:.3f} bits, {seconds:.0f} s")


@torch.inference_mode()
def bound(peer: Peer, windows: Tensor) -> tuple[float, float]:
    """(A bound on) bits per token over windows of real text, and its standard error."""
    nats = torch.cat([peer.nats(part, TIMES).double().mean(1) for part in windows.split(EVAL_BATCH)])
    return bits(nats.mean().item()), bits(nats.std().item()) / len(nats) ** 0.5


class Measurements:
    """Likelihood, samples and their quality, of one model after the other, on the same windows of real text."""

    def __init__(self, corpus: Corpus, judge: Judge, run: RunConfig, *, windows: int, num: int) -> None:
        self.tokenizer, self.judge, self.run, self.num = corpus.tokenizer, judge, run, num
        self.length = run.model.context
        self.windows = eval_windows(corpus.split("test"), self.length, windows)
        self.text = eval_windows(corpus.split("test"), self.length, num)
        self.rows: list[str] = []
        self.real: TextStatistics | None = None

    def peer(self, name: str, peer: Peer, out: Path, denoising_steps: Sequence[int]) -> None:
        """A row for each number of denoising steps; samples go to `out`."""
        peer.model.eval()
        with seeded(self.run.seed):
            found = bound(peer, self.windows)
        for steps in denoising_steps if isinstance(peer, Masked) else [None]:
            label = name if steps is None else f"{name}, {steps} steps"
            if isinstance(peer, Masked) and steps is not None:
                peer.steps = steps
            with seeded(self.run.seed):
                samples = self._row(label, "" if steps is None else "<= ", found, peer.model, peer.sample)
            texts = [json.dumps({"text": self.tokenizer.decode(row)}) + "\n" for row in samples.tolist()]
            (out / f"{label.replace(', ', '-').replace(' ', '-')}.jsonl").write_text("".join(texts))

    def ours(self, directory: Path) -> None:
        """The row of a finished run."""
        model = load_checkpoint(directory).model
        measured = evaluate(model, self.windows, torch.from_numpy(self.tokenizer.characters_per_token))
        generator = torch.Generator().manual_seed(self.run.seed)

        def draw(batch: int, length: int) -> Tensor:
            return generate(model, num_tokens=length, num=batch, generator=generator, decoder="auto").tokens

        found = (measured.bpc, bits(measured.stderr))
        self._row(directory.name, "" if model.is_exact else "<= ", found, model, draw)

    def _row(
        self,
        name: str,
        sign: str,
        bpc: tuple[float, float],
        model: nn.Module,
        draw: Callable[[int, int], Tensor],
    ) -> Tensor:
        start, parts = time.perf_counter(), []
        for at in range(0, self.num, BATCH):
            parts.append(draw(min(BATCH, self.num - at), self.length))
            say(f"{name}: {min(at + BATCH, self.num)} of {self.num} samples")
        samples = torch.cat(parts)
        rate = samples.numel() / (time.perf_counter() - start)
        drawn, self.real, similarity = compare_texts(samples, self.text, self.tokenizer, self.judge)
        size = sum(p.numel() for p in model.parameters())
        self.rows.append(
            f"| {name} | {size:,} | {sign}{bpc[0]:.4f} ± {bpc[1]:.4f} | {drawn.perplexity:.3f} | {similarity:.3f} | "
            f"{drawn.entropy:.3f} | {drawn.word_entropy:.3f} | {rate:,.0f} |"
        )
        say(self.rows[-1])
        return samples

    def table(self) -> str:
        """Markdown, with real text as the last row."""
        real = self.real
        assert real is not None, "nothing measured"
        head = "| model | parameters | bits per character | perplexity | MAUVE | entropy | of words | tokens/s |"
        last = f"| real text | | | {real.perplexity:.3f} | 1 | {real.entropy:.3f} | {real.word_entropy:.3f} | |"
        return "\n".join([head, "|" + " --- |" * 8, *self.rows, last])


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="text in lower case; its splits are those of tarflowlm")
    parser.add_argument("--judge", required=True, help="run of a baseline on another text, or one of transformers")
    parser.add_argument("--ours", nargs="*", default=[], type=Path, help="finished runs of tarflowlm")
    parser.add_argument("--peers", nargs="*", default=["gpt2", "masked"], choices=["gpt2", "masked"])
    parser.add_argument("--out", type=Path, default=Path("runs/peers"), help="weights, trained once, and samples")
    parser.add_argument("--denoising-steps", type=int, nargs="*", default=[64, 16])
    parser.add_argument("--lr", type=float, help="peak rate of the peers; the default is that of mini-ar")
    parser.add_argument("--steps", type=int, help="fewer, for a quick look")
    parser.add_argument("--windows", type=int, default=4096)
    parser.add_argument("--num", type=int, default=500, help="samples")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of training")
    args = parser.parse_args(argv)
    run = preset("mini-ar")
    run = run if args.steps is None else with_steps(run, args.steps)
    run = replace(run, train=replace(run.train, precision=args.precision))
    run = run if args.lr is None else replace(run, optim=replace(run.optim, lr=args.lr))
    corpus = cached_corpus(args.data, run.data.tokenizer)
    judge = load_judge(args.judge, torch.device("cpu"))
    measurements = Measurements(corpus, judge, run, windows=args.windows, num=args.num)
    args.out.mkdir(parents=True, exist_ok=True)
    shape, vocab_size = run.model, corpus.tokenizer.vocab_size
    assert isinstance(shape, BaselineConfig)
    for name in args.peers:
        weights = args.out / f"{name}.pt"
        with seeded(run.seed):
            peer = Gpt2(shape, vocab_size) if name == "gpt2" else Masked(shape, vocab_size)
            if weights.exists():
                peer.model.load_state_dict(torch.load(weights, weights_only=True))
            else:
                train(peer, corpus, run)
                torch.save(peer.model.state_dict(), weights)
        measurements.peer(name, peer, args.out, args.denoising_steps)
    for directory in args.ours:
        measurements.ours(directory)
    print(measurements.table())


if __name__ == "__main__":
    main()
