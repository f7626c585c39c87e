"""Samples of a model for a report: a few with a fixed seed, and the first one after every block."""

from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.errors import UserError
from tarflowlm.generation import Generation, Watch, generate
from tarflowlm.language_model import LanguageModel
from tarflowlm.progress import SILENT, Progress
from tarflowlm.report.grid import CSS as GRID_CSS
from tarflowlm.report.grid import pass_rows, to_html

NUM, LENGTH, SEED, TEMPERATURE = 3, 256, 0, 0.8
"""Samples, the most tokens of each, and how they are drawn."""

CSS = f"""{GRID_CSS}
.samples {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }}
.sample {{ border-left: 3px solid var(--grid); margin: 0; overflow-wrap: anywhere; padding: .1rem .8rem;
          white-space: pre-wrap; }}
"""


@dataclass(frozen=True)
class Samples:
    """Samples of a model."""

    texts: list[str]
    passes: list[Tensor]
    """The tokens [T] of the first sample after every pass, noise first; empty for fewer than two blocks."""
    tokens: int
    """Length of each sample."""
    temperature: float


def draw_samples(model: LanguageModel, tokenizer: Tokenizer, progress: Progress = SILENT) -> Samples:
    """NUM samples of the trained context, or of LENGTH tokens where that is less; always the same for a model.

    At TEMPERATURE, or at 1 for models that refuse another.
    """
    length = min(LENGTH, model.config.context)

    def draw(temperature: float) -> Generation:
        return generate(
            model,
            num_tokens=length,
            num=NUM,
            generator=torch.Generator().manual_seed(SEED),
            temperature=temperature,
            watch=Watch(progress),
        )

    temperature = TEMPERATURE
    try:
        result = draw(temperature)
    except UserError:
        temperature = 1.0
        result = draw(temperature)
    passes = [state[0] for state in result.passes] if model.num_blocks > 1 else []
    return Samples([tokenizer.decode(row.tolist()) for row in result.tokens], passes, length, temperature)


def texts_html(samples: Samples) -> str:
    """The texts beside each other, stacked on a phone."""
    body = "".join(f'<p class="sample">{escape(text)}</p>\n' for text in samples.texts)
    return f'<div class="samples">\n{body}</div>\n'


def passes_html(samples: Samples, tokenizer: Tokenizer, caption: str) -> str:
    """The first sample after every block as a grid of coloured tokens."""
    grid = to_html(pass_rows(samples.passes, tokenizer))
    return f"<figure>\n{grid}\n<figcaption>{escape(caption)}</figcaption>\n</figure>\n"
