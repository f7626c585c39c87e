"""Figures of runs: training curves, the gain of every block, and the codebook."""

from collections.abc import Sequence

import numpy as np

from tarflowlm.evaluation.blocks import StateReport
from tarflowlm.evaluation.likelihood import sign_of
from tarflowlm.flow.codebook import Codebook
from tarflowlm.runs.records import RunRecord, Series
from tarflowlm_apps.report.style import (
    COLOURS,
    MUTED,
    PAPER,
    SMALL,
    Axes,
    Figure,
    literal,
    log_scale,
)
from tarflowlm_apps.report.tables import signed

AXES = ("tokens", "seconds")
CURVES = "Faint: training batches; with markers: validation. Flows have upper bounds (≤)."
"""How to read `draw_bits`."""
FEWEST = 4  # validations that make a curve


def draw_bits(figure: Figure, records: Sequence[RunRecord], over: Sequence[str] = AXES) -> None:
    """Bits per character of runs, a panel for each of `over`, names of AXES.

    The legend has the bits of the saved weights, or of the last training batch without validation.
    """
    panels = figure.subplots(len(over), sharey=True, squeeze=False)[:, 0]
    for axes, column in zip(panels, over, strict=True):
        for run in records:
            (line,) = axes.plot(run.valid[column], run.valid["bpc"], marker="o", markersize=3.5)
            style = line.get_linestyle()
            if len(run.valid["bpc"]) < FEWEST:
                # a line between the start and the end would say that training was better all along
                line.set(linestyle="none", markersize=5)
            axes.plot(
                run.train[column],
                run.train["bpc"],
                color=line.get_color(),
                linestyle=style,
                linewidth=0.7,
                alpha=0.45,
            )
            bpc = run.train["bpc"][-1] if run.valid_bpc is None else run.valid_bpc
            sign = sign_of(run.run.model.bound).replace("<=", "≤")
            line.set_label(f"{literal(run.name)} {sign} {bpc:.3f}")
        axes.set_ylabel("bits per character")
        _count_on_x(axes, records, column)
    _limit_bits(panels[0], records)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=SMALL, frameon=False, loc="outside lower center")


def _limit_bits(axes: Axes, records: Sequence[RunRecord]) -> None:
    """Leave the first steps out of the frame; a logarithmic axis if the runs are far apart."""
    shown = []
    for run in records:
        tokens = run.train["tokens"]
        shown += [run.train["bpc"][tokens >= 0.05 * tokens[-1]], run.valid["bpc"]]
    values = np.concatenate(shown)
    low, high = values.min(), values.max()
    if high > 2.5 * low:
        log_scale(axes)
    margin = 0.04 * min(low, high - low) + 1e-6
    axes.set_ylim(low - margin, high + margin)


def _count_on_x(axes: Axes, records: Sequence[RunRecord], column: str) -> None:
    """A scale of tokens or seconds, and a labelled line where a stage of any run begins.

    Stages that begin at about one place share the line of the first.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training" if column == "seconds" else column)
    near = 0.02 * axes.get_xlim()[1]
    marked: list[float] = []
    for run in records:
        block = run.train["block"]
        for line in np.flatnonzero(np.diff(block)):  # the last of a stage
            x = float(run.train[column][line])
            if any(abs(x - place) < near for place in marked):
                continue
            marked.append(x)
            axes.axvline(x, color=MUTED, linewidth=0.8, linestyle=":", zorder=0.5)
            axes.annotate(
                f"block {block[line + 1]:.0f}",
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


def draw_gains(figure: Figure, states: Sequence[StateReport], to_bpc: float) -> None:
    """How much every block lowers the bound: a bar for each, block 1 on top."""
    gains = [state.kl_gain.mean for state in states if state.kl_gain is not None]
    axes = figure.subplots()
    colours = [COLOURS[0] if gain >= 0 else COLOURS[1] for gain in gains]
    axes.barh(range(len(gains)), gains, height=0.62, color=colours)
    axes.set_yticks(range(len(gains)), [f"block {block}" for block in range(1, len(gains) + 1)])
    axes.set_ylim(len(gains) - 0.4, -0.6)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.grid(axis="y", visible=False)
    axes.set_title("saved by each block")
    axes.set_xlabel("nats per token")
    values = [f"{signed(gain)}\n{signed(to_bpc * gain)} bits" for gain in gains]
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(gains)), values)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)


def draw_codebook(
    figure: Figure, codebook: Codebook, symbols: Sequence[str], named: Sequence[int]
) -> None:
    """The projection of mu, with discs of radius sigma around the codes that are `named`."""
    from matplotlib.patches import Circle

    points, shares = project(codebook.mean.detach().cpu().double().numpy())
    std = codebook.log_std.detach().cpu().exp().tolist()
    axes = figure.subplots()
    rest = np.setdiff1d(np.arange(len(points)), named)
    x, y = points.T
    axes.scatter(x[rest], y[rest], s=4, color=MUTED, alpha=0.5, linewidths=0, rasterized=True)
    for code in named[::-1]:  # the first of them on top
        place = (x[code], y[code])
        axes.add_patch(Circle(place, std[code], color=COLOURS[0], alpha=0.14, linewidth=0.8))
        axes.text(
            *place,
            literal(symbols[code].replace(" ", "␣")),
            fontsize=SMALL - 1 if len(rest) else 11,
            ha="center",
            va="center",
            clip_on=True,
        )
    axes.update_datalim(points)
    axes.margins(0.04)
    axes.autoscale_view()
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(f"first principal component ({100 * shares[0]:.0f} % of the variance)")
    axes.set_ylabel(f"second principal component ({100 * shares[1]:.0f} % of the variance)")
    axes.set_title(f"codebook, {len(symbols):,} symbols, discs of one σ")


def project(vectors: Series) -> tuple[Series, list[float]]:
    """Vectors [V, d] on their first two principal axes: [V, 2], and shares of the variance.

    Signs are fixed: the entry of largest magnitude of each axis is positive. The axes are
    orthonormal, so a sphere becomes a disc of the same radius.
    """
    # a channel of zeros gives d = 1 a second axis
    centred = np.pad(vectors - vectors.mean(0), ((0, 0), (0, 1)))
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    axes = directions[:2]
    axes *= np.sign(axes[[0, 1], np.abs(axes).argmax(1)])[:, None]
    variances = singular**2
    return centred @ axes.T, (variances[:2] / variances.sum()).tolist()
