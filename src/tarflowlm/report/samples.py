"""What a model writes: a few samples with a fixed seed, and for stacks of blocks the text after every block."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import torch

from tarflowlm.data import Tokenizer
from tarflowlm.errors import UserError
from tarflowlm.generation import Generation, Watch, generate
from tarflowlm.generation.window import num_positions
from tarflowlm.language_model import LanguageModel
from tarflowlm.progress import Silent
from tarflowlm.report.grid import GridRow, Kind, Token, grid
from tarflowlm.report.page import Markup

NUM, LENGTH, SEED, TEMPERATURE = 3, 256, 0, 0.8
"""Samples, the most tokens of each, and how they are drawn."""

CSS = """
.samples { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
.sample { border-left: 3px solid var(--grid); margin: 0; overflow-wrap: anywhere; padding: .1rem .8rem;
          white-space: pre-wrap; }
"""


@dataclass(frozen=True)
class Samples:
    """Samples of a model."""

    texts: list[str]
    passes: list[list[str]]
    """The symbols of the first sample after every pass, noise first; empty for fewer than two blocks."""
    tokens: int
    """Of each sample."""
    temperature: float


def draw_samples(
    model: LanguageModel, tokenizer: Tokenizer, progress: Callable[[int, int], None] | None = None
) -> Samples:
    """NUM samples of the trained context, or of LENGTH tokens where that is less; always the same for a model.

    At TEMPERATURE, or at 1 for models that refuse another. `progress` gets the number of positions done, over all
    blocks, and their total.
    """
    length = min(LENGTH, model.config.context)

    total, done = num_positions(model, length), itertools.count(1)

    class Bar(Silent):
        def advance(self, count: int = 1) -> None:
            for _ in range(count):
                if progress is not None:
                    progress(min(next(done), total), total)

    bar = Bar()

    def draw(temperature: float) -> Generation:
        return generate(
            model,
            num_tokens=length,
            num=NUM,
            generator=torch.Generator().manual_seed(SEED),
            temperature=temperature,
            watch=Watch(bar),
        )

    temperature = TEMPERATURE
    try:
        result = draw(temperature)
    except UserError:  # before block 1 draws, but perhaps after the blocks above it have
        temperature = 1.0
        result = draw(temperature)
    symbols = tokenizer.symbols
    passes = [[symbols[token] for token in state[0].tolist()] for state in result.passes]
    return Samples([tokenizer.decode(row.tolist()) for row in result.tokens], passes, length, temperature)


def texts_markup(samples: Samples) -> Markup:
    """The texts beside each other, below each other on a phone."""
    body = "".join(f'<p class="sample">{escape(text)}</p>\n' for text in samples.texts)
    return Markup(f'<div class="samples">\n{body}</div>\n')


def passes_markup(samples: Samples, caption: str) -> Markup:
    """The first sample after every block as a grid of coloured tokens."""
    rows = grid(passes_rows(samples.passes))
    return Markup(f"<figure>\n{rows}\n<figcaption>{escape(caption)}</figcaption>\n</figure>\n")


def passes_rows(passes: Sequence[Sequence[str]]) -> list[GridRow]:
    """One row per pass, noise first: what the row changed, and what already is as in the final text."""
    rows, last = [], len(passes) - 1
    for index, symbols in enumerate(passes):
        before = passes[max(index - 1, 0)]
        changed = sum(a != b for a, b in zip(symbols, before, strict=True))
        name = "noise" if index == 0 else f"after block {last - index + 1}: {changed} of {len(symbols)} changed"
        tokens = []
        for symbol, earlier, final in zip(symbols, before, passes[-1], strict=True):
            is_settled = index > 0 and symbol == final
            kind: Kind = "changed" if symbol != earlier else "final" if is_settled else "noise"
            tokens.append(Token(symbol, kind))
        rows.append(GridRow(name, tokens))
    return rows
