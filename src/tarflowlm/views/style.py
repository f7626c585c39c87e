"""The look of figures and pages: colours safe for colour-blind readers, labels, legends; HTML
without scripts.
"""

import importlib.util
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from tarflowlm.errors import UserError
from tarflowlm.files import replacing

# matplotlib is optional, so its classes cannot be named in annotations that tests check
Figure = Any
Axes = Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, without yellow and black, which vanish on white or on dark."""
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))
INK, MUTED, GRID, PAPER = "#1b1f24", "#68707a", "#e3e6ea", "#fefefe"
SMALL = 8.0

# colours that an SVG takes from the page, which has one set for light and one for dark
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    COLOURS[0]: "--blue",
}

_STYLE: Any = {
    "figure.facecolor": PAPER,
    "figure.constrained_layout.use": True,
    "axes.facecolor": PAPER,
    "axes.edgecolor": MUTED,
    "axes.prop_cycle": f"cycler(color={COLOURS})",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": SMALL,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": SMALL,
    "text.color": INK,
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "path",
    "svg.hashsalt": "tarflowlm",
}


def check_package(name: str, extra: str) -> None:
    """Raises UserError if an optional package is missing."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"this needs the package {name}: pip install 'tarflowlm[{extra}]'")


def render(
    draw: Callable[[Figure], None],
    path: Path | None,
    *,
    width: float,
    height: float,
    name: str = "",
    dpi: int = 160,
) -> str:
    """Draw a figure of `width` x `height` inches; returns it as SVG for a page that defines the
    colours. `draw` gets an empty figure. A PNG goes to the file `path`, if that is given, and
    replaces it atomically. Ids in the SVG begin with `name`, or else with the name of the file.
    """
    check_package("matplotlib", "plots")
    import matplotlib
    from matplotlib.figure import Figure as New

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # symbols of a vocabulary may be missing from the font; they show as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = New(figsize=(width, height))
        draw(figure)
        # the layout takes half of the time of saving, so compute it once
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        if path is not None:
            with replacing(path) as temporary:
                figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    # for use in a page: no prolog, no fixed size, ids prefixed by the name, colours taken from the
    # page
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = name or (path.stem if path is not None else "figure")
    svg = re.sub(r'((?<= )id="|url\(#|href="#)', lambda m: f"{m[1]}{prefix}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', svg, count=1)


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain round numbers."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of curve number `index`; 18 curves differ."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
    }


def literal(text: str, longest: int = 30) -> str:
    """`text` escaped for matplotlib; the middle of a long text is left out."""
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-longest // 2 + 1 :]}"
    return text.replace("$", r"\$")


GENERATOR = "tarflowlm report"

_CSS = f"""
:root {{ --ink: {INK}; --muted: {MUTED}; --grid: {GRID}; --paper: {PAPER}; --blue: {COLOURS[0]};
        color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e8eb; --muted: #98a1ab; --grid: #33393f; --paper: #16191d; --blue: #3d9be0; }}
}}
body {{ background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
       max-width: 68rem; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
.parts {{ align-items: start; display: grid; gap: 1rem 2rem;
         grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }}
.parts > :not(.picture) {{ grid-column: 1 / -1; }}
figure {{ margin: .5rem 0 1rem; min-width: 0; }} figcaption {{ margin-top: .5rem; }}
figcaption, .note {{ color: var(--muted); font-size: .9rem; max-width: 60rem; }}
svg {{ display: block; height: auto; max-width: 38rem; width: 100%; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ border-bottom: 1px solid var(--grid); padding: .22rem .9rem .22rem 0; text-align: left;
         vertical-align: top; overflow-wrap: anywhere; min-width: 6rem; }}
th {{ font-weight: 600; }} tbody th {{ color: var(--muted); font-weight: 400; }}
summary {{ cursor: pointer; }}
"""


@dataclass(frozen=True)
class Section:
    """Notes, then parts in HTML, under a title. A folded section is closed until the reader opens
    it.
    """

    title: str
    notes: Sequence[str] = ()
    parts: Sequence[str] = ()
    is_folded: bool = False

    def to_html(self) -> str:
        """The section; title and notes are escaped."""
        notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in self.notes)
        body = f'{notes}<div class="parts">\n{"".join(self.parts)}</div>'
        if self.is_folded:
            return f"<details><summary>{escape(self.title)}</summary>\n{body}</details>"
        return f"<section>\n<h2>{escape(self.title)}</h2>\n{body}</section>"


def page_html(title: str, sections: Sequence[Section], css: str, generator: str = GENERATOR) -> str:
    """The whole document; `css` has rules for the parts of the sections."""
    body = "\n".join([f"<h1>{escape(title)}</h1>", *(section.to_html() for section in sections)])
    head = f'<meta charset="utf-8">\n<meta name="generator" content="{generator}">\n<meta name="viewport" content='
    head += f'"width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n<style>{_CSS}{css}</style>'
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def picture_html(name: str, svg: str, caption: str) -> str:
    """A figure with its caption; its name becomes the id."""
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    return f'<figure class="picture" id="{name}">\n{svg}<figcaption>{escape(caption)}</figcaption>\n</figure>\n'
