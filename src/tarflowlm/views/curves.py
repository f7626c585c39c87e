"""Training curves of runs: bits per character over tokens or seconds."""

from collections.abc import Sequence

import numpy as np

from tarflowlm.views.records import RunRecord
from tarflowlm.views.style import (
    MUTED,
    PAPER,
    SMALL,
    Axes,
    Figure,
    dashes_of,
    literal,
    log_scale,
)

AXES = ("tokens", "seconds")
"""What curves can be drawn over."""
THIN = 0.7  # line width of training batches
FAINT = 0.45  # their opacity
MARKER = 3.5  # size of the marks at validations
STAGE_DASHES = (0, (2, 2))


def draw_bits(figure: Figure, records: Sequence[RunRecord], over: Sequence[str] = AXES) -> None:
    """Bits per character, a panel for each of the axes `over`; training faint, validation marked.

    The legend names every run with its last validation, or its last training batch without one.
    """
    panels = figure.subplots(len(over), sharey=True, squeeze=False)[:, 0]
    for axes, column in zip(panels, over, strict=True):
        for index, run in enumerate(records):
            axes.plot(
                run.train[column],
                run.train["bpc"],
                color=f"C{index}",
                linestyle=dashes_of(index),
                linewidth=THIN,
                alpha=FAINT,
            )
            axes.plot(
                run.valid[column],
                run.valid["bpc"],
                color=f"C{index}",
                linestyle=dashes_of(index),
                marker="o",
                markersize=MARKER,
            )
        axes.set_ylabel("bits per character")
        _count_on_x(axes, records, column)
    _limit_bits(panels[0], records)
    _explain(figure, records)


def _explain(figure: Figure, records: Sequence[RunRecord]) -> None:
    """A legend below all panels: the runs, kinds of lines, and the mark of a stage."""
    from matplotlib.lines import Line2D

    lines = []
    for index, run in enumerate(records):
        last = (run.valid["bpc"] if len(run.valid["bpc"]) else run.train["bpc"])[-1]
        name = f"{literal(run.name)} {'=' if run.is_exact else '≤'} {last:.3f}"
        lines.append(
            Line2D([], [], color=f"C{index}", linestyle=dashes_of(index), label=name),
        )
    lines += [
        Line2D([], [], color=MUTED, linewidth=THIN, alpha=FAINT, label="training batches"),
        Line2D([], [], color=MUTED, marker="o", markersize=MARKER, label="validation windows"),
    ]
    if any(run.stage_starts for run in records):
        lines.append(
            Line2D(
                [], [], color=MUTED, linewidth=0.8, linestyle=STAGE_DASHES, label="a stage begins"
            )
        )
    # a character is about half as wide as the font is high, a sample of a line as wide as eight
    longest = max(len(str(line.get_label())) for line in lines)
    columns = int(72 * figure.get_figwidth() // (0.62 * SMALL * (longest + 8)))
    figure.legend(
        handles=lines,
        fontsize=SMALL,
        frameon=False,
        loc="outside lower center",
        ncols=max(1, min(columns, len(lines))),
    )


def _limit_bits(axes: Axes, records: Sequence[RunRecord]) -> None:
    """Leave the first steps out of the frame; a logarithmic axis if the runs are far apart."""
    validations = [float(bpc) for run in records for bpc in run.valid["bpc"]]
    low = min([*validations, *(float(np.min(run.train["bpc"])) for run in records)])
    settled = []
    for run in records:
        tokens = run.train["tokens"]
        settled.append(float(run.train["bpc"][tokens >= 0.05 * tokens.max()][0]))
    high = max([*settled, *validations])
    margin = 0.04 * (high - low) + 1e-6
    if low > 0 and high > 2.5 * low:
        log_scale(axes)
        margin = 0.04 * low
    axes.set_ylim(low - margin, high + margin)


def _count_on_x(axes: Axes, records: Sequence[RunRecord], column: str) -> None:
    """A scale of tokens or seconds, and a labelled line where a stage of any run begins.

    Runs that switch at about one place share the line.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training" if column == "seconds" else column)
    near = 0.02 * axes.get_xlim()[1]
    marked: list[tuple[int, float]] = []
    starts = [
        (block, float(r.train[column][line])) for r in records for block, line in r.stage_starts
    ]
    for block, x in starts:
        if any(block == other and abs(x - place) < near for other, place in marked):
            continue
        marked.append((block, x))
        axes.axvline(x, color=MUTED, linewidth=0.8, linestyle=STAGE_DASHES, zorder=0.5)
        axes.annotate(
            f"block {block}",
            (x, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(-2, 0),
            textcoords="offset points",
            rotation=90,
            fontsize=SMALL - 1,
            color=MUTED,
            ha="right",
            va="top",
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},
        )
