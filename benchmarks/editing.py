"""A tenth of the words of real texts redrawn: by a flow, by a baseline, by a masked flow.

    python benchmarks/editing.py --flow runs/mini-mixd-s0 --baseline runs/mini-ar-s0 \\
        --judge runs/judge --masked runs/peers/masked.pt

The flow and the baseline draw CANDIDATES for a word given the text before it, and choose one by the
probability of the text after it: `tarflowlm.editing.redraw` with eq. 24 of docs/math.md, and for
the baseline the same weights, prod p(x_t | x_<t) after the word. The masked flow of `peers.py`
masks the word and draws its letters one by one in a random order, given both sides. All edit the
same words, and words keep their length. "left alone" is the text itself. "blind" is the baseline
with a single candidate, which does not see the text after it; "few" is the baseline with two
candidates, the fewest that do.

Columns: unchanged letters of the words; words that the training text has; bits per character of the
whole text by the judge; bits per character of the unedited letters after the first edit, by the
judge, by the baseline and by the flow (its bound); evaluations of the network per word, counted for
every candidate; seconds of CPU per word. Bits are differences from the text left alone, with
standard errors over the same texts. A judge that is trained like the baseline shares its errors, so
it favours the baseline, and Mix-d, which is nearly one.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peers import Masked
from torch import Generator, Tensor

from reproduction.judges import load_judge
from tarflowlm.baseline import TokenLM
from tarflowlm.data import eval_windows, prepare_corpus
from tarflowlm.editing.edits import covered, pick_words, words_of
from tarflowlm.editing.redraw import Candidates, Span, rewrite
from tarflowlm.editing.states import Source, encode
from tarflowlm.evaluation.likelihood import bits
from tarflowlm.generation.particles import resample
from tarflowlm.model import TarFlowLM, as_flow
from tarflowlm.runs.checkpoint import load_checkpoint

CANDIDATES = 32
FEW = 2
SHARE = 0.1
LENGTH = 128
DRAWS = 8  # posterior samples of the flow's bound

Edited = tuple[Tensor, int]
"""A text [T], and the evaluations of the network that it took."""
Editor = Callable[[Tensor, list[Span], Generator], Edited]


def evaluations(spans: list[Span]) -> int:
    """Passes of a left-to-right model for one candidate of each: its letters, then the rest."""
    return sum(stop - start + 1 for start, stop in spans)


@dataclass(frozen=True)
class Flow:
    """Redraws words by `editing.redraw`."""

    model: TarFlowLM

    def __call__(self, text: Tensor, spans: list[Span], generator: Generator) -> Edited:
        source = Source(self.model, encode(self.model, text[None], generator), generator)
        edit = rewrite(source, [spans], Candidates(CANDIDATES, may_repeat=True))
        return edit.tokens[0], CANDIDATES * evaluations(spans)


@dataclass(frozen=True)
class Baseline:
    """Redraws words with the baseline's own weights."""

    model: TokenLM
    candidates: int

    def __call__(self, text: Tensor, spans: list[Span], generator: Generator) -> Edited:
        for start, stop in spans:
            rows = text.repeat(self.candidates, 1)
            for at in range(start, stop):
                weights = self.model.logits(rows[:, : at + 1])[:, at].softmax(-1)
                rows[:, at] = torch.multinomial(weights, 1, generator=generator)[:, 0]
            log_w = self.model.token_log_prob(rows)[:, stop:].sum(-1).double()
            text = rows[resample(log_w, 1, generator)[0]]
        return text, self.candidates * evaluations(spans)


@dataclass(frozen=True)
class MaskedFlow:
    """Masks a word, and draws its letters in a random order."""

    peer: Masked

    def __call__(self, text: Tensor, spans: list[Span], generator: Generator) -> Edited:
        text = text.clone()
        passes = 0
        for start, stop in spans:
            text[start:stop] = self.peer.extra
            for offset in torch.randperm(stop - start, generator=generator).tolist():
                weights = self.peer.logits(text[None])[0, start + offset].softmax(-1)
                text[start + offset] = torch.multinomial(weights, 1, generator=generator)[0]
                passes += 1
        return text, passes


def flow_costs(model: TarFlowLM, rows: Tensor) -> Tensor:
    """A bound on -log p of every token [B, T], in nats: the mean over `DRAWS` posterior samples."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(rows.shape)
    for _ in range(DRAWS):
        total += model.bound(rows, model.draw_noise(rows, generator), per_token=True)
    return total / DRAWS


def spread(values: Tensor) -> str:
    """Mean and standard error over texts, as a cell."""
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flow", type=Path, required=True, help="finished run of Mix-d")
    parser.add_argument("--baseline", type=Path, required=True, help="finished run of the baseline")
    parser.add_argument("--judge", required=True, help="finished run of another baseline")
    parser.add_argument("--masked", type=Path, help="weights of peers.py, in the baseline's shape")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    checkpoint = load_checkpoint(args.baseline)
    baseline = checkpoint.model
    assert isinstance(baseline, TokenLM)
    flow = as_flow(load_checkpoint(args.flow).model)
    judge = load_judge(args.judge)
    tokenizer = checkpoint.tokenizer
    corpus = prepare_corpus(checkpoint.run.data, tokenizer)
    texts = eval_windows(corpus.split("test"), LENGTH, args.texts)
    # the beginning of the training text is enough for its words
    known = set(tokenizer.decode(corpus.split("train")[:4_000_000].tolist()).split())

    editors: dict[str, Editor] = {
        "left alone": lambda text, _spans, _generator: (text, 0),
        "blind": Baseline(baseline, 1),
        "baseline, few": Baseline(baseline, FEW),
        "baseline": Baseline(baseline, CANDIDATES),
        "flow": Flow(flow),
    }
    if args.masked is not None:
        editors["masked flow"] = MaskedFlow(Masked(baseline.config).load(args.masked))

    generator = torch.Generator().manual_seed(args.seed)
    spans = []
    for text in texts.tolist():
        words = words_of([tokenizer.decode([token]).encode() for token in text])
        count = max(1, round(SHARE * len(words)))
        spans.append(pick_words(words, count, LENGTH, generator))
    num_words = sum(map(len, spans))

    names = ["kept", "known words", "judge", "context: judge", "baseline", "flow, <="]
    print("| | " + " | ".join([*names, "evaluations", "seconds"]) + " |")
    print("| --- " * (len(names) + 3) + "|")
    alone: list[Tensor] = []
    for name, edit in editors.items():
        generator = torch.Generator().manual_seed(args.seed)
        began = time.process_time()
        rows = []
        passes = 0
        for number, (text, chosen) in enumerate(zip(texts, spans, strict=True), start=1):
            edited, cost = edit(text, chosen, generator)
            rows.append(edited)
            passes += cost
            if number % 32 == 0:
                print(f"{name}: {number} of {len(texts)} texts", file=sys.stderr, flush=True)
        seconds = time.process_time() - began
        after = torch.stack(rows)
        inside = torch.stack([covered(chosen, LENGTH) for chosen in spans])
        kept = ((after == texts) & inside).sum(1) / inside.sum(1)
        drawn = [
            [tokenizer.decode(row[start:stop].tolist()) for start, stop in chosen]
            for row, chosen in zip(after, spans, strict=True)
        ]
        real = [sum(word in known for word in words) / len(words) for words in drawn]
        behind = ~inside
        for row, chosen in zip(behind, spans, strict=True):
            row[: chosen[0][1]] = False
        own = judge.score(after)[0].nan_to_num()
        costs = (own, -baseline.token_log_prob(after), flow_costs(flow, after))
        context = [(bits(cost) * behind).sum(1) / behind.sum(1).clamp(min=1) for cost in costs]
        measured = [bits(own).mean(1), *context]
        shown_bits = measured
        if alone:
            shown_bits = [now - before for now, before in zip(measured, alone, strict=True)]
        else:
            alone = measured
        cells = [kept, torch.tensor(real), *shown_bits]
        shown = [spread(cell.double()) for cell in cells]
        per_word = [f"{passes / num_words:.1f}", f"{seconds / num_words:.3f}"]
        print("| " + " | ".join([name, *shown, *per_word]) + " |", flush=True)


if __name__ == "__main__":
    main()
