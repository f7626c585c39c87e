"""Pieces of HTML that the views share; every text in them is escaped here or in
`views/grid.py`.
"""

import logging
import shlex
from collections.abc import Callable, Generator, Iterator, Sequence
from html import escape

from tarflowlm.errors import UserError
from tarflowlm.views import grid
from tarflowlm.views.grid import Row, Token

CSS = """
:root { color-scheme: light; } .dark { color-scheme: dark; }
.gradio-container { --st-ink: light-dark(#1b1f24, #e6e8eb); --st-muted: light-dark(#5c646d, #a0a8b1);
  --st-line: light-dark(#e3e6ea, #33393f); --st-ground: light-dark(#f7f8f9, #1c2025);
  --st-blue: light-dark(#0072b2, #56b4e9); --st-warm: light-dark(#d55e00, #ff9a4d); }
.gradio-container .app.fillable { max-width: 1240px; margin: 0 auto; padding: 20px 24px; }
.st { color: var(--st-ink); font: 15px/1.55 system-ui, sans-serif;
  display: flex; flex-direction: column; gap: .9rem; }
.st-head { font-size: 1.35rem; font-weight: 650; letter-spacing: -.01em; }
.st-head span { font-size: .95rem; font-weight: 400; color: var(--st-muted); margin-left: .6rem; letter-spacing: 0; }
.st-title { font-weight: 600; font-size: 1rem; margin-bottom: .35rem; }
.st-muted, .st p.st-muted { color: var(--st-muted); font-size: 13.5px; margin: .25rem 0; }
.st-card { border: 1px solid var(--st-line); border-radius: 10px; padding: .9rem 1.1rem; margin: 0;
  background: light-dark(#fff, #16191d); }
.st-stage { font: 1.22rem/1.6 ui-serif, Georgia, "Times New Roman", serif; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; min-height: 2em; }
.st-caret { border-left: 2px solid var(--st-blue); margin-left: 1px; }
.st-facts { display: flex; flex-wrap: wrap; gap: .15rem 1.3rem; margin-top: .55rem; color: var(--st-muted);
  font-size: 13px; font-variant-numeric: tabular-nums; }
.st-facts b { color: var(--st-ink); font-weight: 600; }
.st-bar { height: 6px; border-radius: 3px; background: var(--st-line); overflow: hidden; margin: .5rem 0 .3rem; }
.st-bar i { display: block; height: 100%; background: var(--st-blue); border-radius: 3px; }
.st-notice { border-left: 4px solid var(--st-warm); background: var(--st-ground); padding: .6rem .9rem;
  border-radius: 4px; overflow-wrap: anywhere; }
.st-slide { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: .2rem 1rem; align-items: center;
  margin: .8rem 0 .2rem; padding-top: .6rem; border-top: 1px solid var(--st-line); }
.st-slide input { width: 100%; accent-color: var(--st-blue); height: 1.4rem; }
.st-slide output { color: var(--st-muted); font-size: 13px; font-variant-numeric: tabular-nums; min-width: 13.5rem; }
.st details summary { cursor: pointer; color: var(--st-muted); font-size: 13.5px; padding: .2rem 0; }
.st-stage i { display: none; }
.st-rows .tl-row.st-at { background: var(--st-ground); box-shadow: -3px 0 0 var(--st-blue); }
.st-choice { display: grid; grid-template-columns: 7.5rem minmax(0, 1fr); gap: .1rem 1rem; padding: .55rem 0;
  border-top: 1px solid var(--st-line); align-items: start; }
.st-choice:first-child { border-top: 0; }
.st-choice .st-stage { font-size: 1.08rem; min-height: 0; }
.st-share { font-size: 13px; color: var(--st-muted); font-variant-numeric: tabular-nums; }
.st-share b { color: var(--st-ink); font-size: 15px; }
.st-pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .9rem; }
.st-heat { font: 14.5px/1.9 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; }
.st-heat span { border-radius: 2px; padding: .12em 0; }
.st-scale { display: inline-block; width: 9rem; height: .7rem; border-radius: 3px; vertical-align: -1px;
  margin: 0 .45rem; border: 1px solid var(--st-line); }
.st table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; width: 100%; }
.st th, .st td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--st-line);
  vertical-align: top; min-width: 6.5rem; }
.st th { font-weight: 600; color: var(--st-muted); }
.st .table { overflow-x: auto; }
.st-asked { display: flex; flex-wrap: wrap; gap: .3rem .7rem; align-items: baseline; font-size: 12.5px; }
.st-asked code { color: var(--st-muted); overflow-wrap: anywhere; flex: 1 1 16rem; background: none; }
.st button, .st-asked a { font: 12.5px system-ui, sans-serif; color: var(--st-blue); background: none; border: 0;
  padding: .2rem 0; cursor: pointer; }
.st-figure { --ink: var(--st-ink); --muted: var(--st-muted); --grid: var(--st-line); --paper: transparent;
  --blue: var(--st-blue); max-width: 36rem; }
.st-figure svg { display: block; width: 100%; height: auto; }
@media (max-width: 640px) {
  .gradio-container .app.fillable { padding: 12px 8px; } .st-head span { display: block; margin: 0; }
  .st-card { padding: .7rem .75rem; } .st-stage { font-size: 1.1rem; }
  .st-choice { grid-template-columns: minmax(0, 1fr); } .st-slide { grid-template-columns: minmax(0, 1fr); }
  .st-slide output { min-width: 0; }
}
"""

SCRIPT = """
const show = (slider) => {
  const card = slider.closest('.st-card'), rows = card.querySelectorAll('.tl-row'), row = rows[slider.value];
  if (!row) return;
  card.querySelector('.st-stage').replaceChildren(...row.querySelector('.tl-text').cloneNode(true).childNodes);
  card.querySelector('output').textContent = row.querySelector('.tl-label').textContent;
  rows.forEach((other) => other.classList.toggle('st-at', other === row));
};
const play = (slider, at) => {  // every pass once, until the reader takes the slider
  if (!slider.isConnected || !('play' in slider.dataset) || at > slider.max) return;
  slider.value = at;
  show(slider);
  setTimeout(play, 900, slider, at + 1);
};
document.addEventListener('input', ({target}) => {
  if (!target.matches || !target.matches('.st-slide input')) return;
  delete target.dataset.play;
  show(target);
});
document.addEventListener('click', ({target}) => {
  const copied = target.closest('[data-copy]'), token = target.closest('.st-heat span');
  if (copied) navigator.clipboard.writeText(copied.dataset.copy).then(() => { copied.textContent = 'copied'; });
  if (token) token.closest('.st-heat').nextElementSibling.textContent = `${token.textContent}: ${token.title}`;
  if (window.innerWidth <= 640 && target.closest('button.primary'))
    [...document.querySelectorAll('.st-view')].find((view) => view.offsetParent).scrollIntoView({behavior: 'smooth'});
});
new MutationObserver((changes) => changes.forEach(({addedNodes}) => addedNodes.forEach((node) => {
  const slider = node.querySelector && node.querySelector('.st-slide input[data-play]');
  if (slider && !window.matchMedia('(prefers-reduced-motion: reduce)').matches) play(slider, 0);
}))).observe(document.documentElement, {childList: true, subtree: true});
"""

HEAD = f"<style>{CSS}</style><script>{SCRIPT}</script>"
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
