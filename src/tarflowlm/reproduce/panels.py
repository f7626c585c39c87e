"""Figure 6 of the paper drawn: for every block the decoded text before and after it, edits marked; page and picture.

Both are made from the rows of `passes.measure_fig6`: one per model, seed and state, noise first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise
from typing import Any

from tarflowlm.report.page import Markup, Page, Section
from tarflowlm.report.style import INK, MUTED, Axes, Figure
from tarflowlm.reproduce.recipe import Row

Spans = list[list[int]]
"""[start, stop) of edited characters in a text, ascending and apart."""

INPUT, INPUT_EDIT = "#00694a", "#b5e3d0"
OUTPUT, OUTPUT_EDIT = "#a8290f", "#f7c5b8"
"""Green for what a block gets, red for what it returns; paler behind edited characters."""

_CSS = f"""
:root {{ --in: {INPUT}; --in-edit: {INPUT_EDIT}; --in-back: #f1faf6; --out: {OUTPUT}; --out-edit: {OUTPUT_EDIT};
        --out-back: #fdf4f2; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --in: #7fd6b3; --in-edit: #0b5a41; --in-back: #12241d; --out: #f4a08c; --out-edit: #7c2410;
          --out-back: #2a1814; }}
}}
.panels {{ display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }}
.panel h3 {{ font-size: 1rem; margin: .3rem 0 0; }} .panel .note {{ margin: 0 0 .4rem; }}
.text {{ border-left: 4px solid; font: .9rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
        margin: 0; overflow-wrap: anywhere; padding: .4rem .6rem; white-space: pre-wrap; }}
.in {{ background: var(--in-back); border-color: var(--in); color: var(--in); }}
.out {{ background: var(--out-back); border-color: var(--out); color: var(--out); }}
.text del, .text ins {{ border-bottom: 2px solid; color: inherit; font-weight: 700; text-decoration: none; }}
del {{ background: var(--in-edit); }} ins {{ background: var(--out-edit); }}
.legend {{ display: flex; flex-wrap: wrap; gap: .5rem; }}
"""


@dataclass(frozen=True)
class Marked:
    """A text with edited characters."""

    text: str
    spans: Spans

    def runs(self) -> Iterator[tuple[str, bool]]:
        """The text in pieces, each edited as a whole or not at all."""
        at = 0
        for start, stop in self.spans:
            yield self.text[at:start], False
            yield self.text[start:stop], True
            at = stop
        yield self.text[at:], False


@dataclass(frozen=True)
class Panel:
    """What one block does to a text."""

    title: str
    note: str
    before: Marked
    after: Marked


def pieces(decode: Callable[[Any], str], tokens: Sequence[int]) -> list[str]:
    """The text of each token, so that they add up to the decoded text.

    A character that several tokens share belongs to the token that completes it.
    """
    whole = decode(tokens)
    # an incomplete character shows as more or fewer characters than it becomes
    ends = [min(len(decode(tokens[:n])), len(whole)) for n in range(len(tokens))] + [len(whole)]
    for n in range(len(ends) - 1, 0, -1):
        ends[n - 1] = min(ends[n - 1], ends[n])
    return [whole[start:stop] for start, stop in pairwise(ends)]


def spans_of(parts: Sequence[str], is_edited: Sequence[bool]) -> Spans:
    """The characters of the edited parts of a text."""
    spans: Spans = []
    at = 0
    for part, edited in zip(parts, is_edited, strict=True):
        if edited and part:
            if spans and spans[-1][1] == at:
                spans[-1][1] += len(part)
            else:
                spans.append([at, at + len(part)])
        at += len(part)
    return spans


def panels_of(rows: Sequence[Row]) -> dict[tuple[str, int], list[Panel]]:
    """(model, seed) -> one panel per block in the order of generation, the last block first."""
    return {
        key: [_panel(before, after) for before, after in pairwise(states)]
        for key, states in groupby(rows, lambda row: (row["model"], row["seed"]))
    }


def _panel(before: Row, after: Row) -> Panel:
    edits = f"{after['edits']} of {after['tokens']} tokens edited"
    return Panel(
        title=f"Block {after['block']}, {after['direction']}",
        note=f"{edits}; in all samples, {after['tokens as in the end']:.0%} are now those of the final text",
        before=Marked(_visible(before["text"]), after["replaced"]),
        after=Marked(_visible(after["text"]), after["edited"]),
    )


def _visible(text: str) -> str:
    """Control characters as their pictures, one for one; line ends stay."""
    return "".join(chr(0x2400 + ord(c)) if c < " " and c != "\n" else "␡" if c == "\x7f" else c for c in text)


def panels_page(title: str, notes: Sequence[str], rows: Sequence[Row]) -> str:
    """A self-contained page: for every model and seed, panels side by side, below each other on a narrow screen."""
    legend = (
        '<div class="legend"><p class="text in">input of the block, <del>edited by it</del></p>'
        '<p class="text out">output of the block, <ins>edited by it</ins></p></div>\n'
    )
    sections = [Section("How to read it", notes, [Markup(legend)])]
    for (model, seed), panels in panels_of(rows).items():
        body = "".join(map(_panel_html, panels))
        sections.append(Section(f"{model}, seed {seed}", parts=[Markup(f'<div class="panels">\n{body}</div>\n')]))
    return Page(title, sections, css=_CSS, generator="tarflowlm reproduce").to_html()


def _panel_html(panel: Panel) -> str:
    return (
        f'<article class="panel">\n<h3>{escape(panel.title)}</h3>\n<p class="note">{escape(panel.note)}</p>\n'
        f'<p class="text in" role="group" aria-label="input">{_marked_html(panel.before, "del")}</p>\n'
        f'<p class="text out" role="group" aria-label="output">{_marked_html(panel.after, "ins")}</p>\n</article>\n'
    )


def _marked_html(marked: Marked, tag: str) -> str:
    return "".join(f"<{tag}>{escape(run)}</{tag}>" if edited else escape(run) for run, edited in marked.runs())


WIDTH = 10.0
"""Of the picture, inches."""
COLUMNS, LINES = 43, 6
"""Characters of a line and lines of a text; longer texts are cut."""
_ADVANCE = 0.602
"""Of a monospaced character, in units of the font size."""
_MARGIN, _GAP = 10.0, 2.0
"""Points at the border, and characters between panels."""


def draw_panels(figure: Figure, rows: Sequence[Row]) -> None:
    """The panels of seed 0: a row of panels per model."""
    models = {model: panels for (model, seed), panels in panels_of(rows).items() if seed == 0}
    across = max(map(len, models.values()))
    advance = (72 * WIDTH - 2 * _MARGIN) / (across * (COLUMNS + _GAP) - _GAP)
    size = advance / _ADVANCE
    line = 1.5 * size
    texts = [[marked for panel in panels for marked in (panel.before, panel.after)] for panels in models.values()]
    depths = [max(min(-(-len(marked.text) // COLUMNS), LINES) for marked in of_model) for of_model in texts]
    top = 62.0
    height = top + sum((2 * depth + 4) * line for depth in depths)
    figure.set_layout_engine("none")
    figure.set_size_inches(WIDTH, height / 72)
    # one unit is a point, from the upper left corner
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 72 * WIDTH), ylim=(height, 0))
    axes.axis("off")
    _draw_legend(axes, top - 20, advance)
    y = top
    for (model, panels), depth in zip(models.items(), depths, strict=True):
        y += line
        axes.text(_MARGIN, y, model, fontsize=11, fontweight="bold", color=INK, parse_math=False)
        for number, panel in enumerate(panels):
            x = _MARGIN + number * (COLUMNS + _GAP) * advance
            axes.text(x, y + 1.2 * line, panel.title, fontsize=8.5, color=INK)
            end = x + COLUMNS * advance
            axes.text(end, y + 1.2 * line, panel.note.split(";")[0], fontsize=8.5, color=MUTED, ha="right")
            _draw_marked(axes, x, y + 1.6 * line, advance, line, panel.before, (INPUT, INPUT_EDIT))
            below = y + (depth + 1.9) * line
            _draw_marked(axes, x, below, advance, line, panel.after, (OUTPUT, OUTPUT_EDIT))
        y += (2 * depth + 3) * line


def _draw_legend(axes: Axes, y: float, advance: float) -> None:
    x = _MARGIN
    for colours, word in (((INPUT, INPUT_EDIT), "input"), ((OUTPUT, OUTPUT_EDIT), "output")):
        start, edit = f"{word} of the block, ", "edited by it"
        line = Marked(start + edit, [[len(start), len(start + edit)]])
        _draw_marked(axes, x, y - 10, advance, 14.0, line, colours)
        x += (len(line.text) + 4) * advance


def _draw_marked(
    axes: Axes, x: float, y: float, advance: float, line: float, marked: Marked, colours: tuple[str, str]
) -> None:
    """A text in lines of `COLUMNS` characters from the upper left corner (x, y)."""
    from matplotlib.patches import Rectangle

    colour, behind = colours
    cells = [(c, edited) for run, edited in marked.runs() for c in run.replace("\n", "↵")]
    if len(cells) > COLUMNS * LINES:
        cells = [*cells[: COLUMNS * LINES - 1], ("…", False)]
    style = {"family": "DejaVu Sans Mono", "fontsize": advance / _ADVANCE, "color": colour, "parse_math": False}
    for at, (character, edited) in enumerate(cells):
        left, low = x + at % COLUMNS * advance, y + at // COLUMNS * line
        if edited:
            axes.add_patch(Rectangle((left, low), advance, line, color=behind, linewidth=0, antialiased=False))
        # each alone: a run of them would drift from its places, whose width is not one of whole pixels
        if character != " ":
            axes.text(left, low + 0.74 * line, character, fontweight="bold" if edited else "normal", **style)
