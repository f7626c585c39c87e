"""The terms of the bound; training curves of bits per character, learning rate and gradient norm, throughput."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tarflowlm.evaluation.blocks import BoundParts
from tarflowlm.report.records import RunRecord, Series, table_html
from tarflowlm.report.style import COLOURS, INK, MUTED, PAPER, SMALL, Axes, Figure, add_legend, line_style, literal


def terms(parts: BoundParts) -> list[tuple[str, float]]:
    """Name and nats per token of each term; their sum is the bound."""
    blocks = [(f"−log|det J|, block {block}", -value) for block, value in enumerate(parts.log_dets, 1)]
    first = [("log q(z|x)", parts.log_q), ("−log N(u; 0, I)", -parts.bases[-1])]
    return [*first, *blocks, ("−log p(x|z)", -parts.reconstruction)]


def draw_blocks(figure: Figure, parts: BoundParts) -> None:
    """A waterfall of the terms, down to the bound, then the gain of every block."""
    upper, lower = figure.subplots(2, height_ratios=(len(parts.log_dets) + 4.0, 1.2 * len(parts.log_dets) + 1))
    _waterfall(upper, parts)
    _gains(lower, parts)


def terms_table(parts: BoundParts) -> str:
    """The terms of the bound, and the bound after each block."""
    rows = [(name, signed(value, 5), signed(parts.bpc(value), 5)) for name, value in terms(parts)]
    rows.append(("KL(q(z|x) ‖ p(z))", f"{parts.kl:.5f}", f"{parts.bpc(parts.kl):.5f}"))
    for blocks, bound in enumerate(parts.bounds):
        last = blocks == len(parts.bounds) - 1
        name = "bound of the model" if last else f"bound of blocks 1 to {blocks}" if blocks else "bound of no block"
        rows.append((name, f"<= {bound:.5f}", f"<= {parts.bpc(bound):.5f}"))
    return table_html(["", "nats per token", "bits per character"], rows)


def _waterfall(axes: Axes, parts: BoundParts) -> None:
    rows = terms(parts)
    position, edges = 0.0, [0.0]
    for row, (_, value) in enumerate(rows):
        axes.barh(row, value, left=position, height=0.62, color=_colour(value))
        position += value
        edges.append(position)
        axes.plot([position, position], [row - 0.31, row + 1.31], color=MUTED, linewidth=0.7)
    axes.barh(len(rows), position, height=0.62, color=INK)
    for row, value in enumerate([value for _, value in rows] + [position]):
        axes.annotate(
            signed(value) if row < len(rows) else f"≤ {value:.4f}", (1, row), xycoords=("axes fraction", "data"),
            xytext=(50, 0), textcoords="offset points", ha="right", va="center", annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(rows) + 1), [*(name for name, _ in rows), "bound"])
    axes.set_ylim(len(rows) + 0.6, -0.6)
    axes.use_sticky_edges = False
    axes.margins(x=0.03)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.grid(axis="y", visible=False)
    axes.set_title("terms of the bound, nats per token")


def _gains(axes: Axes, parts: BoundParts) -> None:
    gains = parts.gains
    room = max([*map(abs, gains), 1e-9])
    for row, gain in enumerate(gains):
        axes.barh(row, gain, height=0.62, color=_colour(gain))
        is_inside = gain > 0.6 * room
        ha, away, color = ("right", -4, PAPER) if is_inside else ("left", 4, INK)
        axes.annotate(
            f"{signed(gain)} nats\n{signed(parts.bpc(gain))} bits per character",
            (gain if is_inside else max(gain, 0), row), xytext=(away, 0), textcoords="offset points",
            ha=ha, va="center", fontsize=SMALL, color=color,
        )  # fmt: skip
    axes.set_yticks(range(len(gains)), [f"block {block}" for block in range(1, len(gains) + 1)])
    axes.set_ylim(len(gains) - 0.4, -0.6)
    axes.set_xlim(min(0.0, *gains) - 0.02 * room, 1.05 * room)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.grid(axis="y", visible=False)
    axes.set_title("gain of each block, nats per token")


def _colour(value: float) -> str:
    return COLOURS[0] if value >= 0 else COLOURS[1]


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign, without one if it rounds to zero."""
    rounded = round(value, digits)
    return f"{'+' if rounded > 0 else '−' if rounded < 0 else ''}{abs(rounded):.{digits}f}"


FAINT = {"linewidth": 0.7, "alpha": 0.45}
"""Style of single values beside their median, and of training batches beside validation."""
MARKED = {"marker": "o", "markersize": 3.5}
STAGE = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (2, 2))}


def draw_bits(figure: Figure, records: Sequence[RunRecord], over: Sequence[str] = ("tokens", "seconds")) -> None:
    """Bits per character against tokens or seconds, a panel for each; training faint, validation with markers."""
    panels = figure.subplots(len(over), sharey=True, squeeze=False)[:, 0]
    for axes, column in zip(panels, over, strict=True):
        for index, r in enumerate(records):
            axes.plot(r.train[column], r.train["bpc"], **line_style(index), **FAINT)
            axes.plot(r.valid[column], r.valid["bpc"], **line_style(index), **MARKED)
        axes.set_ylabel("bits per character")
        _count_on_x(axes, column)
    _limit_bits(panels[0], records)
    for axes, column in zip(panels, over, strict=True):
        _mark_stages(axes, records, column)
    last = [(r.valid["bpc"] if len(r.valid["bpc"]) else r.train["bpc"])[-1] for r in records]
    signs = ["=" if r.is_exact else "≤" for r in records]
    names = [f"{literal(r.name)} {sign} {bpc:.3f}" for r, sign, bpc in zip(records, signs, last, strict=True)]
    _explain(figure, records, names, ("training batches", FAINT), ("validation windows", MARKED))


def draw_optimisation(figure: Figure, records: Sequence[RunRecord]) -> None:
    """Learning rate and gradient norm against tokens."""
    upper, lower = figure.subplots(2)
    for index, r in enumerate(records):
        norm = r.train["grad_norm"]
        upper.plot(r.train["tokens"], r.train["lr"], **line_style(index))
        lower.plot(r.train["tokens"], norm, **line_style(index), **FAINT)
        lower.plot(r.train["tokens"], running_median(norm), **line_style(index))
    upper.set_title("learning rate")
    lower.set_title("gradient norm before clipping")
    upper.set_ylim(bottom=0)
    if any((r.train["grad_norm"] > 0).any() for r in records):
        lower.set_yscale("log")
    for axes in (upper, lower):
        _count_on_x(axes)
        _mark_stages(axes, records)
    _explain(figure, records, None, ("gradient norm", FAINT), ("running median", {}))


def draw_throughput(figure: Figure, records: Sequence[RunRecord]) -> None:
    """Tokens per second against tokens; the legend has the median of every stage."""
    axes = figure.subplots()
    for index, r in enumerate(records):
        speed = r.train["tokens_per_second"]
        axes.plot(r.train["tokens"], speed, **line_style(index), **FAINT)
        axes.plot(r.train["tokens"], running_median(speed), **line_style(index))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens per second")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _count_on_x(axes)
    _mark_stages(axes, records, height=0.02)
    medians = [", ".join(f"{m:,.0f}" for m in r.stage_medians("tokens_per_second")) for r in records]
    names = [f"{literal(r.name)}: {median}" for r, median in zip(records, medians, strict=True)]
    _explain(figure, records, names, ("every logged step", FAINT), ("running median", {}))


def running_median(values: Series, width: int = 9) -> npt.NDArray[np.float64]:
    """The median of the `width` values around each value, of fewer at the ends."""
    reach = width // 2
    return np.array([np.median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))])


def _explain(
    figure: Figure, records: Sequence[RunRecord], names: Sequence[str] | None, *kinds: tuple[str, dict[str, Any]]
) -> None:
    """A legend: the colour of every run, what kinds of lines mean, and the mark of a stage if there is one."""
    names = names or [literal(r.name) for r in records]
    entries = [(name, line_style(index)) for index, name in enumerate(names)]
    entries += [(text, {"color": MUTED} | style) for text, style in kinds]
    if any(r.stage_starts for r in records):
        entries.append(("a stage begins", STAGE))
    add_legend(figure, entries)


def _limit_bits(axes: Axes, records: Sequence[RunRecord]) -> None:
    """Leave the first steps out of the frame; use a logarithmic axis if the runs are far apart."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    low = min(float(np.min(lines["bpc"])) for r in records for lines in (r.train, r.valid) if len(lines["bpc"]))
    settled = [r.train["bpc"][r.train["tokens"] >= 0.05 * r.train["tokens"].max()][0] for r in records]
    high = float(max([*settled, *(bpc for r in records for bpc in r.valid["bpc"])]))
    margin = 0.04 * (high - low) + 1e-6
    if low > 0 and high > 2.5 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
        margin = 0.04 * low
    axes.set_ylim(low - margin, high + margin)


def _count_on_x(axes: Axes, column: str = "tokens") -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training" if column == "seconds" else column)


def _mark_stages(axes: Axes, records: Sequence[RunRecord], column: str = "tokens", height: float = 0.98) -> None:
    """A line where a stage of any run begins, labelled at `height`; runs that switch at about one place share it."""
    marked: list[tuple[int, float]] = []
    for block, x in ((block, r.train[column][line]) for r in records for block, line in r.stage_starts):
        if any(block == b and abs(x - other) < 0.02 * axes.get_xlim()[1] for b, other in marked):
            continue
        marked.append((block, x))
        axes.axvline(x, **STAGE, zorder=0.5)
        axes.annotate(
            f"block {block}", (x, height), xycoords=("data", "axes fraction"), xytext=(-2, 0),
            textcoords="offset points", rotation=90, fontsize=SMALL - 1, color=MUTED, ha="right",
            va="top" if height > 0.5 else "bottom", bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
