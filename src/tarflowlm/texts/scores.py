"""Scores: the bits of every token of texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from torch import Tensor

from tarflowlm.data.prompts import Reading, read
from tarflowlm.errors import SILENT, Progress
from tarflowlm.evaluation.scores import Scores, scores
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.texts.requests import Score, as_texts


def score(request: Score, lm: Checkpoint, progress: Progress = SILENT) -> list["Scored"]:
    """The bits of every text."""
    how = request.normalize
    texts = as_texts("" if request.text is None else request.text, "text")
    readings = [read(lm.tokenizer, text, normalize=how) for text in texts]
    tokens = [reading.tokens for reading in readings]
    found = scores(lm.model, tokens, samples=request.samples, seed=request.seed, progress=progress)
    scored = []
    for reading, one in zip(readings, found, strict=True):
        symbols = [lm.tokenizer.symbols[token] for token in reading.tokens.tolist()]
        scored.append(Scored(one.bits, one.blocks, symbols, reading))
    return scored


@dataclass(frozen=True, repr=False)
class Scored(Scores):
    """The bits of a text, and how the text was read."""

    symbols: Sequence[str]
    """[T]: the tokens, as they are shown."""
    reading: Reading

    @property
    def notice(self) -> str | None:
        """A line if the text is not read as it was given."""
        return self.reading.notice

    @property
    def bits_per_character(self) -> float:
        """Bits per character of the text as it was read."""
        return self.total / len(self.reading.text)

    def heat(self, bits: Tensor, most: float, hot: str = "#d55e00", cold: str = "#0072b2") -> str:
        """The text in HTML on grounds that are hot for many bits [T] and cold below 0.

        `most` bits have the full colour.
        """
        shown = ""
        for symbol, value in zip(self.symbols, bits.tolist(), strict=True):
            share = min(abs(value) / max(most, 1e-9), 1.0)
            ground = f"{hot if value >= 0 else cold} {75 * share:.0f}%,transparent"
            style = f'style="background:color-mix(in srgb,{ground})" title="{value:.2f} bits"'
            shown += f"<span {style}>{escape(symbol)}</span>"
        return shown

    def _repr_html_(self) -> str:
        shown = self.heat(self.bits, most=12.0)
        return f"<pre>{shown}\n{self.sign} {self.total:.1f} bits</pre>"
