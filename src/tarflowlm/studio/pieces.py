"""Pieces of HTML that the views share; every text in them is escaped here or in
`views/grid.py`.
"""

import logging
import shlex
from collections.abc import Callable, Generator, Iterator, Sequence
from html import escape
from importlib.resources import files

from tarflowlm.errors import UserError
from tarflowlm.views import grid
from tarflowlm.views.grid import Row, Token

FILES = files("tarflowlm.studio")
STYLE = FILES.joinpath("studio.css").read_text(encoding="utf-8")
SCRIPT = FILES.joinpath("studio.js").read_text(encoding="utf-8")
HEAD = f"<style>{STYLE}</style><script>{SCRIPT}</script>"
LOG = logging.getLogger("tarflowlm.studio")


def guarded(view: Callable[..., Iterator[str]]) -> Callable[..., Generator[str, None, None]]:
    """The view with errors shown on the page, in plain words and without a stack."""

    def safe(*values: object) -> Generator[str, None, None]:
        try:
            yield from view(*values)
        except UserError as error:
            yield page(notice(str(error)))
        except Exception:
            LOG.exception("a view of the studio failed")
            yield page(
                notice("This did not work. The terminal that started the page shows the error.")
            )

    return safe


def page(*parts: str) -> str:
    return f'<div class="st st-view"><style>{grid.CSS}</style>{"".join(parts)}</div>'


def card(*parts: str) -> str:
    return f'<div class="st-card">{"".join(parts)}</div>'


def asked(*words: object, link: str = "") -> str:
    """The request above its result: the command that gives the same, to copy, and a link to this
    page.
    """
    command = escape(shlex.join(["tarflowlm", *map(str, words)]))
    more = f'<a href="{escape(link)}">link</a>' if link else ""
    return f'<div class="st-asked"><code>{command}</code>{copying(command)}{more}</div>'


def copying(escaped: str) -> str:
    """A button that copies a text."""
    return f'<button type="button" data-copy="{escaped}">copy</button>'


def notice(text: str) -> str:
    """A message to the visitor."""
    text += "" if text.endswith((".", "!", "?")) else "."
    return f'<div class="st-notice" role="alert">{escape(text)}</div>'


def title(text: str) -> str:
    return f'<div class="st-title">{escape(text)}</div>'


def muted(text: str | None) -> str:
    """A line in small type; nothing for None."""
    return f'<p class="st-muted">{escape(text)}</p>' if text else ""


def stage(tokens: Sequence[Token], *, is_open: bool = False) -> str:
    """A text in large type, with a caret where it is still being written, or a button that copies
    it.
    """
    caret = '<span class="st-caret"></span>' if is_open else ""
    copy = (
        ""
        if is_open
        else copying(escape("".join(token.symbol for token in tokens).replace("↵\n", "\n")))
    )
    return f'<div class="st-stage">{grid.spans(tokens)}{caret}</div>{copy}'


def facts(*pairs: tuple[str, str]) -> str:
    shown = (
        f"<span>{f'<b>{escape(value)}</b> ' if value else ''}{escape(words)}</span>"
        for value, words in pairs
    )
    return f'<div class="st-facts">{"".join(shown)}</div>'


def took(seconds: float) -> tuple[str, str]:
    return f"{1000 * seconds:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s", "in all"


def bar(share: float) -> str:
    """A bar that is filled up to `share`, from 0 to 1."""
    return f'<div class="st-bar"><i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></div>'


def slider(rows: Sequence[Row], name: str, *, summary: str, is_open: bool = True) -> str:
    """A slider over `rows`: one of them is on the stage of the same card, and all of them are
    below. If it `is_open`, it goes through them once by itself.
    """
    last, plays = len(rows) - 1, " data-play" * is_open
    field = f'<input type="range" min="0" max="{last}" value="{last}" step="1" aria-label="{escape(name)}"{plays}>'
    control = f'<div class="st-slide">{field}<output>{escape(rows[-1].label)}</output></div>'
    opened, box = " open" if is_open else "", f'<div class="st-rows">{grid.to_html(rows)}</div>'
    return f"{control}<details{opened}><summary>{escape(summary)}</summary>{box}</details>"


def counted(number: int, one: str, many: str = "") -> str:
    """1 token, 2 tokens; `many` where it does not just end in s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
