"""Pieces of HTML that the views share; every text in them is escaped here or in `report/grid.py`."""

import logging
from collections.abc import Callable, Iterator, Sequence
from html import escape

from tarflowlm.errors import UserError
from tarflowlm.report.grid import CSS as TOKEN_CSS
from tarflowlm.report.grid import Row, Token, spans, to_html

LOG = logging.getLogger("tarflowlm.studio")


def guarded(view: Callable[..., Iterator[str]]) -> Callable[..., Iterator[str]]:
    """The view with errors shown on the page, in plain words and without a stack."""

    def safe(*values: object) -> Iterator[str]:
        try:
            yield from view(*values)
        except UserError as error:
            yield page(notice(str(error)))
        except MemoryError:
            yield page(notice("Out of memory: ask for fewer tokens, samples or particles."))
        except Exception:
            LOG.exception("a view of the studio failed")
            yield page(notice("This did not work. The terminal that started the page shows the error."))

    return safe


def page(*parts: str) -> str:
    """The whole of a view."""
    return f'<div class="st st-view"><style>{TOKEN_CSS}</style>{"".join(parts)}</div>'


def card(*parts: str) -> str:
    """Parts in a frame."""
    return f'<div class="st-card">{"".join(parts)}</div>'


def notice(text: str) -> str:
    """A message to the visitor, made a sentence."""
    text = f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "!", "?")) else ".")
    return f'<div class="st-notice" role="alert">{escape(text)}</div>'


def title(text: str) -> str:
    """The name of a card."""
    return f'<div class="st-title">{escape(text)}</div>'


def muted(text: str | None) -> str:
    """A line in small type; nothing for None."""
    return f'<p class="st-muted">{escape(text)}</p>' if text else ""


def stage(tokens: Sequence[Token], *, is_open: bool = False) -> str:
    """A text in large type, with a caret where it is still being written."""
    caret = '<span class="st-caret"></span>' if is_open else ""
    return f'<div class="st-stage">{spans(tokens)}{caret}</div>'


def facts(*pairs: tuple[str, str]) -> str:
    """Numbers and their names."""
    shown = (f"<span>{f'<b>{escape(value)}</b> ' if value else ''}{escape(words)}</span>" for value, words in pairs)
    return f'<div class="st-facts">{"".join(shown)}</div>'


def took(seconds: float) -> tuple[str, str]:
    """The fact of a time."""
    return f"{1000 * seconds:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s", "in all"


def bar(share: float) -> str:
    """A bar that is filled up to `share`, from 0 to 1."""
    return f'<div class="st-bar"><i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></div>'


def slider(rows: Sequence[Row], name: str, *, summary: str, is_open: bool = True) -> str:
    """A slider over `rows`: one of them is on the stage of the same card, and all of them are below."""
    last = len(rows) - 1
    control = (
        f'<div class="st-slide"><input type="range" min="0" max="{last}" value="{last}" step="1" '
        f'aria-label="{escape(name)}"><output>{escape(rows[-1].label)}</output></div>'
    )
    opened, box = " open" if is_open else "", f'<div class="st-rows">{to_html(rows)}</div>'
    return f"{control}<details{opened}><summary>{escape(summary)}</summary>{box}</details>"


def counted(number: int, one: str, many: str = "") -> str:
    """1 token, 2 tokens; `many` where it does not just end in s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
