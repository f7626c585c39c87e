"""Training curves: bits per character, learning rate and gradient norm, throughput."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tarflowlm.report.records import RunRecord, Series
from tarflowlm.report.style import (
    MUTED,
    PAPER,
    SMALL,
    Axes,
    Figure,
    add_legend,
    is_narrow,
    label_ends,
    line_style,
    literal,
    two_panels,
)

FAINT = {"linewidth": 0.7, "alpha": 0.45}
"""Of single values beside their median, and of training batches beside validation."""
MARKED = {"marker": "o", "markersize": 3.5}
STAGE = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (2, 2))}


def draw_bits(figure: Figure, records: Sequence[RunRecord]) -> None:
    """Bits per character against tokens and against seconds; training faint, validation with markers."""
    left, right = two_panels(figure, sharey=True)
    ends = []
    for index, r in enumerate(records):
        style = line_style(index)
        for axes, x, x_valid in (
            (left, r.train["tokens"], r.valid["tokens"]),
            (right, r.seconds, r.valid_seconds),
        ):
            axes.plot(x, r.train["bpc"], **style, **FAINT)
            axes.plot(x_valid, r.valid["bpc"], **style, **MARKED)
        last = r.valid["bpc"] if len(r.valid["bpc"]) else r.train["bpc"]
        sign = "=" if r.is_exact else "≤"
        ends.append((float(last[-1]), f"{_label(figure, r)} {sign} {last[-1]:.3f}".strip(), style["color"]))
    _limit_bits(left, records)
    for axes in (left, right) if is_narrow(figure) else (left,):
        axes.set_ylabel("bits per character")
    left.set_xlabel("tokens")
    right.set_xlabel("seconds of training")
    for axes, column in ((left, 1), (right, 2)):
        _thousands(axes)
        _mark_stages(axes, [[(start[0], start[column]) for start in r.stage_starts] for r in records])
    _explain(figure, records, ("training batches", FAINT), ("validation windows", MARKED))
    for axes in (left, right) if is_narrow(figure) else (right,):
        label_ends(axes, ends)


def draw_optimisation(figure: Figure, records: Sequence[RunRecord]) -> None:
    """Learning rate and gradient norm against tokens."""
    left, right = two_panels(figure)
    ends = []
    for index, r in enumerate(records):
        style = line_style(index)
        left.plot(r.train["tokens"], r.train["lr"], **style)
        norm = r.train["grad_norm"]
        right.plot(r.train["tokens"], norm, **style, **FAINT)
        right.plot(r.train["tokens"], running_median(norm), **style)
        ends.append((float(running_median(norm)[-1]), _label(figure, r), style["color"]))
    left.set_title("learning rate")
    right.set_title("gradient norm before clipping")
    left.set_ylim(bottom=0)
    if any((r.train["grad_norm"] > 0).any() for r in records):
        right.set_yscale("log")
    for axes, height in ((left, None), (right, 0.98)):
        axes.set_xlabel("tokens")
        _thousands(axes)
        _mark_stages(axes, [[(b, tokens) for b, tokens, _ in r.stage_starts] for r in records], height=height)
    _explain(figure, records, ("gradient norm", FAINT), ("running median", {}))
    label_ends(right, ends)


def draw_throughput(figure: Figure, records: Sequence[RunRecord]) -> None:
    """Tokens per second against tokens; labels give the median of every stage."""
    axes = figure.subplots()
    ends = []
    for index, r in enumerate(records):
        style, speed = line_style(index), r.train["tokens_per_second"]
        axes.plot(r.train["tokens"], speed, **style, **FAINT)
        axes.plot(r.train["tokens"], running_median(speed), **style)
        between = "\n" if is_narrow(figure) else ", "
        medians = between.join(f"{m:,.0f}" for m in r.stage_medians("tokens_per_second"))
        ends.append((float(running_median(speed)[-1]), f"{_label(figure, r)}\n{medians}".strip(), style["color"]))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens per second")
    axes.set_xlabel("tokens")
    _thousands(axes, y=True)
    _mark_stages(axes, [[(b, tokens) for b, tokens, _ in r.stage_starts] for r in records], height=0.02)
    _explain(figure, records, ("every logged step", FAINT), ("running median", {}))
    label_ends(axes, ends)


def _label(figure: Figure, record: RunRecord) -> str:
    """The run's name beside its curve; a narrow figure has no room for it and names runs in the legend."""
    return "" if is_narrow(figure) else literal(record.name)


def _explain(figure: Figure, records: Sequence[RunRecord], *kinds: tuple[str, dict[str, Any]]) -> None:
    """A legend: the colour of every run, what kinds of lines mean, and the mark of a stage if there is one."""
    entries = [(literal(r.name), line_style(index)) for index, r in enumerate(records)]
    entries += [(text, {"color": MUTED} | style) for text, style in kinds]
    if any(r.stage_starts for r in records):
        entries.append(("a stage begins", STAGE))
    add_legend(figure, entries)


def running_median(values: Series, width: int = 9) -> npt.NDArray[np.float64]:
    """The median of the `width` values around each value, of fewer at the ends."""
    reach = width // 2
    return np.array([np.median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))])


def _limit_bits(axes: Axes, records: Sequence[RunRecord]) -> None:
    """Leave the first steps out of the frame; use a logarithmic axis if the runs are far apart."""
    every = np.concatenate([np.concatenate([r.train["bpc"], r.valid["bpc"]]) for r in records])
    tops = []
    for r in records:
        settled = r.train["bpc"][r.train["tokens"] >= 0.05 * r.train["tokens"].max()]
        tops.append(max([settled[0], *r.valid["bpc"]]))
    low, high = float(every.min()), float(max(tops))
    if low > 0 and high > 2.5 * low:
        from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0.96 * low, 1.04 * high)
    else:
        margin = 0.04 * (high - low) + 1e-6
        axes.set_ylim(low - margin, high + margin)


def _thousands(axes: Axes, *, y: bool = False) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    if y:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _mark_stages(axes: Axes, starts: Sequence[Sequence[tuple[int, float]]], *, height: float | None = 0.98) -> None:
    """A line where a stage of any run begins, labelled at `height`; runs that switch at about one place share it."""
    span = axes.get_xlim()[1]
    marked: list[tuple[int, float]] = []
    for block, x in (start for run in starts for start in run):
        if not any(block == b and abs(x - other) < 0.02 * span for b, other in marked):
            marked.append((block, x))
            axes.axvline(x, **STAGE, zorder=0.5)
            if height is None:
                continue
            axes.annotate(
                f"block {block}",
                (x, height),
                xycoords=("data", "axes fraction"),
                xytext=(-2, 0),
                textcoords="offset points",
                rotation=90,
                fontsize=SMALL - 1,
                color=MUTED,
                ha="right",
                va="top" if height > 0.5 else "bottom",
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},
            )
