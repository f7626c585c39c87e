"""The style of every figure: colours safe for colour-blind readers, labels, legends, and how figures are saved."""

import importlib.util
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
NARROW = 4.2
"""Inches. On a phone, a figure of this width shows its smallest text at ten pixels."""

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


def render(draw: Callable[[Figure], None], path: Path, *, width: float, height: float) -> str:
    """Draw a figure of `width` x `height` inches, save it to the PNG file `path`, and return it as SVG for a page.

    `draw` gets an empty figure. No global state changes, and the file is replaced atomically. Raises UserError if
    matplotlib is missing.
    """
    with _drawn(draw, width, height) as figure:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
        return _embeddable(figure, path.stem)


def render_narrow(draw: Callable[[Figure], None], name: str, *, height: float) -> str:
    """The figure of `render` as SVG alone, NARROW inches wide, for pages on a phone; its ids begin with `name`."""
    with _drawn(draw, NARROW, height) as figure:
        return _embeddable(figure, name)


@contextmanager
def _drawn(draw: Callable[[Figure], None], width: float, height: float) -> Iterator[Figure]:
    """A figure with its layout, and our style while it is saved."""
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
        yield figure


def _embeddable(figure: Figure, name: str) -> str:
    """A figure as SVG for use in a page: no prolog, ids prefixed by `name`, colours taken from the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'((?<= )id="|url\(#|href="#)', lambda m: f"{m[1]}{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', svg, count=1)


def is_narrow(figure: Figure) -> bool:
    """Whether a figure is for a phone: panels below each other, and names in the legend alone."""
    return bool(figure.get_figwidth() <= NARROW)


def two_panels(
    figure: Figure,
    widths: tuple[float, float] = (1.0, 1.0),
    heights: tuple[float, float] = (1.0, 1.0),
    *,
    sharey: bool = False,
) -> tuple[Axes, Axes]:
    """Two panels side by side with these ratios of widths; in a narrow figure, below each other, of heights."""
    if is_narrow(figure):
        first, second = figure.subplots(2, 1, height_ratios=heights, sharey=sharey)
    else:
        first, second = figure.subplots(1, 2, width_ratios=widths, sharey=sharey)
    return first, second


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


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], *, size: float = SMALL) -> None:
    """Label curves at the right border, without overlaps: (y of the curve's end, text, colour) for each."""
    ends = [end for end in ends if end[1]]
    if not ends:
        return
    figure = axes.figure
    figure.draw_without_rendering()
    points = axes.get_window_extent().height * 72 / figure.dpi
    heights = [axes.transAxes.inverted().transform(axes.transData.transform((0, y)))[1] for y, _, _ in ends]
    lines = [text.count("\n") + 1 for _, text, _ in ends]
    order = sorted(range(len(ends)), key=lambda i: heights[i])
    spans = np.array([1.3 * size * lines[i] / points for i in order])
    for i, y in zip(order, spread(np.array([heights[i] for i in order]), spans), strict=True):
        _, text, colour = ends[i]
        axes.annotate(
            text,
            (1.02, y),
            xycoords="axes fraction",
            color=colour,
            fontsize=size,
            va="center",
            annotation_clip=False,
        )


def spread(
    centres: npt.NDArray[np.float64], spans: npt.NDArray[np.float64], low: float = 0.0, high: float = 1.0
) -> npt.NDArray[np.float64]:
    """Ascending `centres` moved apart so that intervals of lengths `spans` do not overlap, inside [low, high].

    If they do not fit, they extend beyond the upper end.
    """
    placed = np.array(centres, dtype=float)
    for _ in range(2):
        edge = low
        for i, span in enumerate(spans):
            placed[i] = max(placed[i], edge + span / 2)
            edge = placed[i] + span / 2
        edge = max(high, low + spans.sum())
        for i in range(len(spans) - 1, -1, -1):
            placed[i] = min(placed[i], edge - spans[i] / 2)
            edge = placed[i] - spans[i] / 2
    return placed


_REACH = np.repeat([3.0, 6.0, 10.0, 16.0], 16)
"""Points between a point and its label, nearest first, ..."""
_ANGLE = np.tile(np.linspace(0, 2 * np.pi, 16, endpoint=False), 4)
"""... and where around the point the label is."""


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
    taken = [*np.concatenate([centres - 2 * scale, centres + 2 * scale], axis=1)]
    placed = 0
    for centre, point, text in zip(centres, points, texts, strict=True):
        text = literal(text)
        probe = axes.text(0, 0, text, fontsize=size)
        extent = probe.get_window_extent()
        probe.remove()
        half = np.array([extent.width + 2 * scale, 0.9 * extent.height]) / 2
        away = np.stack([np.cos(_ANGLE), np.sin(_ANGLE)], axis=1) * (_REACH[:, None] * scale + half)
        boxes = np.concatenate([centre + away - half, centre + away + half], axis=1)
        free = np.flatnonzero(_inside(boxes, frame) & ~_overlaps(boxes, np.array(taken)))
        if not len(free):
            continue
        taken.append(boxes[free[0]])
        placed += 1
        line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 1}
        axes.annotate(
            text,
            tuple(point),
            xytext=tuple(away[free[0]] / scale),
            textcoords="offset points",
            fontsize=size,
            ha="center",
            va="center",
            arrowprops=line if _REACH[free[0]] > _REACH[0] else None,
        )
    return placed


def _inside(boxes: npt.NDArray[np.float64], frame: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which of the boxes [boxes, 4] (left, low, right, high) lie in the frame [4]."""
    return np.asarray(np.all(boxes[:, :2] >= frame[:2], axis=1) & np.all(boxes[:, 2:] <= frame[2:], axis=1))


def _overlaps(boxes: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which of the boxes [boxes, 4] overlap any of the others [others, 4]."""
    below = np.all(boxes[:, None, :2] < others[None, :, 2:], axis=-1)
    above = np.all(others[None, :, :2] < boxes[:, None, 2:], axis=-1)
    return np.asarray(np.any(below & above, axis=1))
