"""The look of figures: colours safe for colour-blind readers, and SVG that fits a page."""

import io
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tarflowlm.errors import check_package
from tarflowlm.files import replacing

# matplotlib is optional: tests, which check annotations at run time, may run without it
if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:
    Figure = Axes = object

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""By Okabe and Ito, without yellow and black, which vanish on white or on dark."""
MUTED = "#68707a"
PAPER = "#fefefe"
SMALL = 8.0
LOCK = threading.Lock()

VARIABLES = {
    "#1b1f24": "--ink",
    MUTED: "--muted",
    "#e3e6ea": "--grid",
    PAPER: "--paper",
    COLOURS[0]: "--blue",
}
"""Colours that an SVG takes from its page, which has a light and a dark set."""


def render(
    draw: Callable[[Figure], None],
    name: str,
    folder: Path | None = None,
    *,
    width: float,
    height: float,
) -> str:
    """Draw a figure of `width` x `height` inches as SVG for a page that defines the colours.

    `draw` gets an empty figure. NAME.png in the `folder`, if one is given, is replaced. Ids in the
    SVG begin with `name`.
    """
    check_package("matplotlib", "plots")
    from matplotlib import style
    from matplotlib.figure import Figure as New

    # the settings of matplotlib belong to the whole process
    with LOCK, style.context("tarflowlm_apps.report.figures"), warnings.catch_warnings():
        # symbols of a vocabulary may be missing from the font; they show as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = New(figsize=(width, height))
        draw(figure)
        # the layout takes half of the time of saving, so compute it once
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        if folder is not None:
            with replacing(folder / f"{name}.png") as temporary:
                figure.savefig(temporary, format="png", metadata={"Software": None})
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_a_page(buffer.getvalue(), name)


def _for_a_page(svg: str, prefix: str) -> str:
    """An SVG without prolog and fixed size; ids have a prefix, colours are the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'((?<= )id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', svg, count=1)


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain round numbers."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def literal(text: str) -> str:
    """`text` escaped for matplotlib; the middle of a long text is left out."""
    if len(text) > 30:
        text = f"{text[:15]}…{text[-14:]}"
    return text.replace("$", r"\$")
