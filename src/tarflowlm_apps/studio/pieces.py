"""Pieces of HTML that the views share; every text is escaped here or in `grid.py`."""

import logging
import re
import shlex
from collections.abc import Callable, Generator, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from tarflowlm.data.tokenizer import Tokenizer
from tarflowlm.errors import UserError, counted
from tarflowlm.model import TarFlowLM
from tarflowlm.terminal.tokens import END, Row, Token, pass_rows
from tarflowlm_apps.grid import CSS, div, noise_of, spans, to_html

STYLE = Path(__file__).with_name("studio.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("studio.js").read_text(encoding="utf-8")
HEAD = f"<style>{STYLE}</style><script>{SCRIPT}</script>"
LOG = logging.getLogger("tarflowlm_apps.studio")

Pages = Generator[str, None, None]
"""The output of a view: pages of HTML, the last one with its result."""


def guarded(view: Callable[..., Pages]) -> Callable[..., Pages]:
    """The view with errors shown on the page, in plain words and without a stack."""

    def safe(*values: object) -> Pages:
        try:
            yield from view(*values)
        except UserError as error:
            text = str(error)
            # unless it begins with a name
            is_word = re.match(r"[a-z]+[ :]", text) is not None
            yield page(notice(text[0].upper() + text[1:] if is_word else text))
        except Exception:
            LOG.exception("a view of the studio failed")
            words = "This did not work. The terminal that started the page shows the error."
            yield page(notice(words))

    return safe


def page(*parts: str) -> str:
    """What a view shows, with a heading for screen readers."""
    heading = '<h2 class="st-unseen">Result</h2>'
    return div("st st-view", f"<style>{CSS}</style>", heading, *parts)


def card(*parts: str) -> str:
    return div("st-card", *parts)


def title(text: str) -> str:
    return f'<h3 class="st-title">{escape(text)}</h3>'


def notice(text: str, words: str = "", link: str = "") -> str:
    """A message, and a remedy in `words` that follow a link, if there is one."""
    text += "" if text.endswith((".", "!", "?")) else "."
    more = f' <a class="st-link" href="{escape(link)}">{escape(words)}</a>' if link else ""
    return f'<div class="st-notice" role="alert">{escape(text)}{more}</div>'


def muted(text: str, name: str = "st-muted") -> str:
    """A line in small type, of a class."""
    return f'<p class="{name}">{escape(text)}</p>'


def copying(text: str) -> str:
    """A button that copies a text."""
    return f'<button type="button" data-copy="{escape(text)}">copy</button>'


def asked(command: Sequence[str], *, link: str = "") -> str:
    """The request above its result: the command that gives the same, and a link to this page."""
    line = " ".join(map(quoted, command))
    more = f'<a href="{escape(link)}">link</a>' if link else ""
    return div("st-asked", f"<code>{escape(line)}</code>", copying(line), more)


def quoted(word: str) -> str:
    """A word of a command in double quotes where these are enough: Windows knows no others."""
    if word == shlex.quote(word) or re.search(r'["$`\\!%]', word):
        return shlex.quote(word)
    return f'"{word}"'


def stage(tokens: Sequence[Token], *, model: str = "") -> str:
    """A text in large type, with a button that copies it.

    Its words can be exchanged if it names the model that wrote it.
    """
    text = "".join(token.symbol for token in tokens).replace("↵\n", "\n").removesuffix(END)
    words = ""
    if model:
        keys = "Arrow keys choose a word, Enter shows other words for it"
        words = f' tabindex="0" role="group" aria-label="{keys}" data-model="{escape(model)}"'
    return f'<div class="st-stage"{words}>{spans(tokens)}</div>{copying(text)}'


def unfinished(tokens: Sequence[Token]) -> str:
    """A text that is being written, with a caret."""
    return div("st-stage", spans(tokens), '<span class="st-caret"></span>')


def facts(*pairs: tuple[str, str]) -> str:
    """Numbers, each with its unit."""
    shown = (f"<span><b>{escape(value)}</b> {escape(words)}</span>" for value, words in pairs)
    return div("st-facts", *shown)


def took(seconds: float) -> tuple[str, str]:
    return f"{1000 * seconds:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s", "in all"


def offers(gap: str, *parts: str) -> str:
    """The content of the list at a word. Its `gap` names the model and the text around the word."""
    return f'<div class="st" data-gap="{escape(gap)}">{"".join(parts)}</div>'


def bar(share: float) -> str:
    """A bar that is filled up to `share`, from 0 to 1."""
    return div("st-bar", f'<i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i>')


def slider(
    rows: Sequence[Row], name: str, summary: str, *, is_open: bool = False, is_kept: bool = False
) -> str:
    """A slider over texts, such as passes; one that `is_open` goes through them once by itself, and
    one that `is_kept` stays where the reader has left it when the page is drawn again.

    The chosen text is on the stage of the same card, all of them are below a `summary`.
    """
    last = len(rows) - 1
    ways = f"{' data-play' if is_open else ''}{' data-kept' if is_kept else ''}"
    control = (
        f'<input type="range" min="0" max="{last}" value="{last}" step="1" '
        f'aria-label="{escape(name)}"{ways}><output>{escape(rows[-1].label)}</output>'
    )
    opened = " open" if is_open else ""
    below = f"<summary>{escape(summary)}</summary>" + div("st-rows", to_html(rows))
    return f"{div('st-slide', control)}<details{opened}>{below}</details>"


BY_BLOCK = "how it was written, block by block"


def columns(shares: Sequence[float], unit: str) -> str:
    """A small chart of shares, which add up to 1, of 1, 2, ... units."""
    most = max(*shares, 1e-9)
    bars = ""
    for number, share in enumerate(shares, 1):
        words = f"{counted(number, unit)}: {share:.0%}"
        ground = f'<i style="height:{100 * share / most:.0f}%"></i>'
        bars += f'<li title="{words}"><b>{share:.0%}</b>{ground}<span>{number}</span></li>'
    return f'<ol class="st-columns" aria-label="shares by number of {unit}s">{bars}</ol>'


def folded(words: str, *parts: str) -> str:
    """Parts that open at a click."""
    return f"<details><summary>{escape(words)}</summary>{''.join(parts)}</details>"


def passes(
    model: TarFlowLM,
    tokenizer: Tokenizer,
    texts: Sequence[Tensor],
    states: Sequence[Tensor],
    *,
    given: Tensor | None = None,
) -> tuple[list[Row], bool]:
    """The rows of a text, each token with p(x|h), and whether there is much to watch.

    `states` are h^(L), ..., h^(0), each [T, d], and `texts` are the decoded states, each [T]. If
    one block writes everything, there is nothing to watch.
    """
    probabilities = []
    for text, state in zip(texts, states, strict=True):
        p = model.codebook.log_posterior(state).exp()
        probabilities.append(p.gather(-1, text[:, None].to(p.device))[:, 0])
    shares = [(after != before).float().mean().item() for before, after in pairwise(texts)]
    # nobody sees a pass that changes fewer tokens
    is_watched = sum(share > 0.005 for share in shares) > 1
    on_host = [text.cpu() for text in texts]
    rows = pass_rows(
        on_host, tokenizer, given=given, noise=noise_of(model, states), probabilities=probabilities
    )
    return rows, is_watched


def key(model: TarFlowLM) -> str:
    """A lesson of the colours of passes, for a stack that fills in."""
    if not model.config.fills_in:
        return ""
    return muted(
        f"Block {model.num_blocks} writes, and leaves noise where it expects an easy letter, one "
        "that follows from the letters before. Block 1 fills in those of which it is sure, in "
        "green. It is not sure of all: there the noise stays, as a wrong letter."
    )
