"""The tables of docs/math.md, section 10: how much every edit of real text keeps, and how likely
its result is.

python examples/measure_edits.py tales [MODEL] [JUDGE] [ROWS] > edits.md

MODEL is english-mini, JUDGE english-mini-ar; ROWS limits the table to rows whose name holds it.
Texts go to stderr.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch

import tarflowlm
from tarflowlm.data import DataConfig, encode_text, eval_windows
from tarflowlm.editing.edits import merge_words, num_words, pick_words, words_of
from tarflowlm.editing.redraw import (
    Candidates,
    informative_level,
    rewrite,
    spaces_of,
    token_costs,
)
from tarflowlm.editing.states import Source, encode, renoise
from tarflowlm.model import LanguageModel
from tarflowlm.objective import log_importance_weights

sys.path.insert(0, str(Path(__file__).parents[1]))  # `reproduction` lies beside this folder

from reproduction.edits import blend, blended_spans, interpolate

TEXTS, LENGTH, SEED, CANDIDATES, TEMPERATURE = 32, 96, 0, 32, 0.7


def main(
    source: str, name: str = "english-mini", judge_name: str = "english-mini-ar", rows: str = ""
) -> None:
    model, tokenizer = tarflowlm.load(name)
    judge, reads = tarflowlm.load(judge_name)
    if tokenizer.kind != "char" or tokenizer.fingerprint != reads.fingerprint:
        sys.exit(f"{name} and {judge_name}: give two models of the same letters")
    spaces = spaces_of(tokenizer.token_bytes)
    # as `tarflowlm edit` does
    usual = TEMPERATURE if model.config.has_token_weights else 1.0
    tokens = encode_text(DataConfig(source=source), tokenizer, "test")
    wide = eval_windows(tokens, 2 * LENGTH, TEXTS)
    space = tokenizer.encode(" ")[0]
    # each text begins with a word
    starts = (wide[:, :LENGTH] == space).int().argmax(1) + 1
    texts = wide.gather(1, starts[:, None] + torch.arange(LENGTH))
    text = encode(model, texts, generator())
    other = encode(model, texts.roll(1, 0), generator())
    words = [words_of([tokenizer.token_bytes[token] for token in row]) for row in texts.tolist()]
    costs, told = token_costs(model, text).tolist(), informative_level(model, text)
    before = [bits(one, texts) for one in (model, judge)]

    def chosen(strength: float, pick: str = "random") -> list:
        g = generator(1)
        return [
            pick_words(
                row, num_words(strength, row), LENGTH, g, costs=cost if pick == "unlikely" else None
            )
            for row, cost in zip(words, costs, strict=True)
        ]

    def show(label: str, edit: Callable[..., torch.Tensor], *how: object) -> None:
        if rows not in label:
            return
        start = time.perf_counter()
        new = edit(*how).cpu()
        seconds = time.perf_counter() - start
        kept = (new == texts).double().mean().item()
        whole = [
            bool((new[i, a:b] == texts[i, a:b]).all())
            for i, row in enumerate(words)
            for a, b in row
        ]
        ratios = [bits(one, new) / old for one, old in zip((model, judge), before, strict=True)]
        print(
            f"| {label} | {kept:.1%} | {sum(whole) / len(whole):.1%} | {ratios[0]:.3f} | "
            f"{ratios[1]:.3f} | {seconds / TEXTS:.1f} |",
            flush=True,
        )
        print(f"{label}: {tokenizer.decode(new[0].tolist())}", file=sys.stderr, flush=True)

    def redrawn(strength: float, pick: str, temperature: float, level: int = told) -> torch.Tensor:
        spans = [
            merge_words(some, row) for some, row in zip(chosen(strength, pick), words, strict=True)
        ]
        return rewrite(
            Source(model, text, generator(2)),
            spans,
            Candidates(CANDIDATES, temperature, level, spaces),
        ).tokens

    def noisy(level: int, strength: float, share: float | None = None) -> torch.Tensor:
        if share is None:
            return renoise(
                Source(model, text, generator(2)), level=level, strength=strength, decoder="auto"
            ).tokens
        each = zip(range(TEXTS), mask(chosen(share)), strict=True)
        return torch.cat(
            [
                renoise(
                    Source(model, text.row(i), generator(2)),
                    level=level,
                    strength=strength,
                    where=where,
                ).tokens
                for i, where in each
            ]
        )

    def arc(level: int, weight: float) -> torch.Tensor:
        source = Source(model, text, generator(2))
        return interpolate(source, other, level=level, weight=weight).tokens

    def blended(weight: float) -> torch.Tensor:
        g, spans = generator(1), []
        for i in range(TEXTS):
            second = words[i - 1]
            count = round(weight * len(second))
            start = int(torch.randint(len(second) - count + 1, (), generator=g))
            spans.append(blended_spans(words[i], second, second[start : start + count], LENGTH))
        return blend(
            Source(model, text, generator(2)),
            other,
            spans,
            Candidates(CANDIDATES, usual, told, spaces),
        ).tokens

    print(f"the original texts: <= {before[0]:.3f} bits per character, judge {before[1]:.3f}\n")
    print("| edit | tokens kept | words kept | bits x | judge's bits x | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    levels = range(model.num_blocks + 1)
    for share in (0.1, 0.25, 0.5, 1.0):
        show(f"redraw, share {share}", redrawn, share, "random", usual)
    if told:
        show("redraw, share 0.1, in the latents", redrawn, 0.1, "random", usual, 0)
    show("redraw, share 0.1, temperature 1", redrawn, 0.1, "random", 1.0)
    show("redraw, share 0.1, the least likely words", redrawn, 0.1, "unlikely", usual)
    for level, strength in product(levels, (0.01, 0.05, 0.1, 0.3, 0.6)):
        show(f"re-noise state {level}, strength {strength}", noisy, level, strength)
    for level in levels:
        show(
            f"re-noise state {level} of a tenth of the words, strength 0.3", noisy, level, 0.3, 0.1
        )
    for level in levels:
        show(f"interpolate states {level}, weight 0.5", arc, level, 0.5)
    for weight in (0.25, 0.5):
        show(f"words of another text, weight {weight}", blended, weight)


def mask(rows: Sequence) -> torch.Tensor:
    found = torch.zeros(len(rows), LENGTH, dtype=torch.bool)
    for i, row in enumerate(rows):
        for start, stop in row:
            found[i, start:stop] = True
    return found


@torch.no_grad()
def bits(model: LanguageModel, tokens: torch.Tensor) -> float:
    log_p = log_importance_weights(model, tokens, samples=8, generator=generator(3)).mean(0)
    nats = -log_p.sum().item()
    return nats / tokens.numel() / math.log(2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + seed)


if __name__ == "__main__":
    main(*sys.argv[1:])
