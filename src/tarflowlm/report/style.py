"""The style of every figure: colours safe for colour-blind readers, labels, legends, and how figures are saved."""

import importlib.util
import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper", COLOURS[0]: "--blue"}

_STYLE: Any = {
    "figure.facecolor": PAPER,
    "figure.constrained_layout.use": True,
    "axes.facecolor": PAPER,
    "axes.edgecolor": MUTED,
    "axes.prop_cycle": f"cycler(color={COLOURS})",
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "text.color": INK,
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "tarflowlm",
    "path.simplify": True,
}


def check_matplotlib() -> None:
    """Raises UserError if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("drawing needs the package matplotlib: pip install 'tarflowlm[plots]'")


def render(
    draw: Callable[[Figure], None], path: Path | None, *, width: float, height: float, name: str = "", dpi: int = 160
) -> str:
    """Draw a figure of `width` x `height` inches; returns it as SVG for a page that defines the colours.

    `draw` gets an empty figure. A PNG goes to the file `path`, if that is given, and replaces it atomically. Ids in
    the SVG begin with `name`, or else with the name of the file.
    """
    check_matplotlib()
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
    return _embeddable(buffer.getvalue(), name or (path.stem if path is not None else "figure"))


def _embeddable(svg: str, name: str) -> str:
    """An SVG for use in a page: no prolog, no fixed size, ids prefixed by `name`, colours taken from the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'((?<= )id="|url\(#|href="#)', lambda m: f"{m[1]}{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', svg, count=1)


def add_legend(figure: Figure, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """A legend below all panels: a text, and the style of a line or marker, for each entry."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **style) for _, style in entries]
    longest = max(len(text) for text, _ in entries)
    # a character is about half as wide as the font is high, and a sample of a line has the width of eight
    columns = int(72 * figure.get_figwidth() // (0.62 * SMALL * (longest + 8)))
    figure.legend(
        handles, [text for text, _ in entries], loc="outside lower center", ncols=max(1, min(columns, len(entries))),
        fontsize=SMALL, frameon=False,
    )  # fmt: skip


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of curve number `index`; 18 curves differ."""
    dashes = DASHES[index // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": dashes}


def literal(text: str, longest: int = 30) -> str:
    """`text` escaped for matplotlib; the middle of a long text is left out."""
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-longest // 2 + 1 :]}"
    return text.replace("$", r"\$")


_REACH = np.repeat([3.0, 6.0, 10.0, 16.0], 16)
_ANGLE = np.tile(np.linspace(0, 2 * np.pi, 16, endpoint=False), 4)
"""Candidate places of a label: points between it and its point, nearest first, and the direction."""


def label_points(axes: Axes, points: npt.NDArray[np.float64], texts: Sequence[str], *, size: float = SMALL) -> int:
    """Write `texts` beside their `points` [labels, 2], most important first; returns how many were placed.

    Each label takes the nearest free place, where it covers no earlier label and no labelled point. A thin line
    connects it with its point if they are not adjacent. Labels without a free place are left out.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    frame = np.array(axes.get_window_extent().extents)
    centres = axes.transData.transform(points)
    taken = np.concatenate([centres - 2 * scale, centres + 2 * scale], axis=1)
    num_points = len(taken)
    for centre, point, text in zip(centres, points, texts, strict=True):
        probe = axes.text(0, 0, literal(text), fontsize=size)
        extent = probe.get_window_extent()
        probe.remove()
        half = np.array([extent.width + 2 * scale, 0.9 * extent.height]) / 2
        away = np.stack([np.cos(_ANGLE), np.sin(_ANGLE)], axis=1) * (_REACH[:, None] * scale + half)
        # [places, 4]: left, low, right, high
        boxes = np.concatenate([centre + away - half, centre + away + half], axis=1)
        is_inside = np.all(boxes[:, :2] >= frame[:2], axis=1) & np.all(boxes[:, 2:] <= frame[2:], axis=1)
        beside = np.concatenate([boxes[:, None, :2] >= taken[:, 2:], boxes[:, None, 2:] <= taken[:, :2]], axis=-1)
        free = np.flatnonzero(is_inside & beside.any(-1).all(-1))
        if not len(free):
            continue
        taken = np.concatenate([taken, boxes[free[:1]]])
        line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 1}
        axes.annotate(
            literal(text),
            tuple(point),
            xytext=tuple(away[free[0]] / scale),
            textcoords="offset points",
            fontsize=size,
            ha="center",
            va="center",
            arrowprops=line if _REACH[free[0]] > _REACH[0] else None,
        )
    return len(taken) - num_points
