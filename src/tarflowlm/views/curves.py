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
    literal,
    log_scale,
)

AXES = ("tokens", "seconds")
"""The quantities over which curves can be drawn."""


def draw_bits(figure: Figure, records: Sequence[RunRecord], over: Sequence[str] = AXES) -> None:
    """Bits per character, a panel for each of the axes `over`; training faint, validation marked.

    The legend names every run with its last validation, or its last training batch without one.
    """
    panels = figure.subplots(len(over), sharey=True, squeeze=False)[:, 0]
    for axes, column in zip(panels, over, strict=True):
        for run in records:
            bpc = run.valid["bpc"]
            (line,) = axes.plot(run.valid[column], bpc, marker="o", markersize=3.5)
            line.set_label(_label(run))
            axes.plot(
                run.train[column],
                run.train["bpc"],
                color=line.get_color(),
                linestyle=line.get_linestyle(),
                linewidth=0.7,
                alpha=0.45,
            )
        axes.set_ylabel("bits per character")
        _count_on_x(axes, records, column)
    _limit_bits(panels[0], records)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=SMALL, frameon=False, loc="outside lower center")


def _label(run: RunRecord) -> str:
    bpc = run.valid["bpc"] if len(run.valid["bpc"]) else run.train["bpc"]
    return f"{literal(run.name)} {run.sign.replace('<=', '≤')} {bpc[-1]:.3f}"


def _limit_bits(axes: Axes, records: Sequence[RunRecord]) -> None:
    """Leave the first steps out of the frame; a logarithmic axis if the runs are far apart."""
    shown = []
    for run in records:
        tokens = run.train["tokens"]
        shown += [run.train["bpc"][tokens >= 0.05 * tokens[-1]], run.valid["bpc"]]
    values = np.concatenate(shown)
    low, high = values.min(), values.max()
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
    for run in records:
        for block, line in run.stage_starts:
            x = float(run.train[column][line])
            if any(block == other and abs(x - place) < near for other, place in marked):
                continue
            marked.append((block, x))
            axes.axvline(x, color=MUTED, linewidth=0.8, linestyle=":", zorder=0.5)
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
