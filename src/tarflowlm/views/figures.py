"""Figures of the terms of the bound, with a table, of training curves, and of codes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tarflowlm.data import Tokenizer
from tarflowlm.evaluation.blocks import BoundParts
from tarflowlm.language_model import LanguageModel
from tarflowlm.views.records import RunRecord, Series, table_html
from tarflowlm.views.style import (
    COLOURS,
    INK,
    MUTED,
    PAPER,
    SMALL,
    Axes,
    Figure,
    line_style,
    literal,
    log_scale,
)

Indices = npt.NDArray[np.int64]

NAMED = 64  # symbols that are named among the codes


def terms(parts: BoundParts) -> list[tuple[str, float]]:
    """Name and nats per token of each term; their sum is the bound."""
    blocks = [
        (f"−log|det J|, block {block}", -value) for block, value in enumerate(parts.log_dets, 1)
    ]
    first = [("log q(z|x)", parts.log_q), ("−log N(u; 0, I)", -parts.bases[-1])]
    return [*first, *blocks, ("−log p(x|z)", -parts.reconstruction)]


def draw_blocks(figure: Figure, parts: BoundParts) -> None:
    """A waterfall of the terms, down to the bound, then the gain of every block."""
    upper, lower = figure.subplots(
        2, height_ratios=(len(parts.log_dets) + 4.0, 1.2 * len(parts.log_dets) + 1)
    )
    _waterfall(upper, parts)
    _gains(lower, parts)
    for axes in (upper, lower):
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.grid(axis="y", visible=False)


def terms_table(parts: BoundParts) -> str:
    """The terms of the bound, and the bound after each block."""
    rows = [(name, signed(value, 5), signed(parts.bpc(value), 5)) for name, value in terms(parts)]
    rows.append(("KL(q(z|x) ‖ p(z))", f"{parts.kl:.5f}", f"{parts.bpc(parts.kl):.5f}"))
    for blocks, bound in enumerate(parts.bounds):
        last = blocks == len(parts.bounds) - 1
        name = (
            "bound of the model"
            if last
            else f"bound of blocks 1 to {blocks}"
            if blocks
            else "bound of no block"
        )
        rows.append((name, f"<= {bound:.5f}", f"<= {parts.bpc(bound):.5f}"))
    return table_html(["", "nats per token", "bits per character"], rows)


def _waterfall(axes: Axes, parts: BoundParts) -> None:
    rows = terms(parts)
    position = 0.0
    for row, (_, value) in enumerate(rows):
        axes.barh(
            row, value, left=position, height=0.62, color=COLOURS[0] if value >= 0 else COLOURS[1]
        )
        position += value
        axes.plot([position, position], [row - 0.31, row + 1.31], color=MUTED, linewidth=0.7)
    axes.barh(len(rows), position, height=0.62, color=INK)
    for row, value in enumerate([value for _, value in rows] + [position]):
        axes.annotate(
            signed(value) if row < len(rows) else f"≤ {value:.4f}",
            (1, row),
            xycoords=("axes fraction", "data"),
            xytext=(50, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            annotation_clip=False,
        )
    axes.set_yticks(range(len(rows) + 1), [*(name for name, _ in rows), "bound"])
    axes.set_ylim(len(rows) + 0.6, -0.6)
    axes.use_sticky_edges = False
    axes.margins(x=0.03)
    axes.set_title("terms of the bound, nats per token")


def _gains(axes: Axes, parts: BoundParts) -> None:
    gains = parts.gains
    room = max([*map(abs, gains), 1e-9])
    for row, gain in enumerate(gains):
        axes.barh(row, gain, height=0.62, color=COLOURS[0] if gain >= 0 else COLOURS[1])
        x, ha, away, color = (
            (gain, "right", -4, PAPER) if gain > 0.6 * room else (max(gain, 0), "left", 4, INK)
        )
        axes.annotate(
            f"{signed(gain)} nats\n{signed(parts.bpc(gain))} bits per character",
            (x, row),
            xytext=(away, 0),
            textcoords="offset points",
            ha=ha,
            va="center",
            fontsize=SMALL,
            color=color,
        )
    axes.set_yticks(range(len(gains)), [f"block {block}" for block in range(1, len(gains) + 1)])
    axes.set_ylim(len(gains) - 0.4, -0.6)
    axes.set_xlim(min(0.0, *gains) - 0.02 * room, 1.05 * room)
    axes.set_title("gain of each block, nats per token")


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign, without one if it rounds to zero."""
    rounded = round(value, digits)
    return f"{'+' if rounded > 0 else '−' if rounded < 0 else ''}{abs(rounded):.{digits}f}"


FAINT = {
    "linewidth": 0.7,
    "alpha": 0.45,
}  # single values beside their median, training batches beside validation
MARKED = {"marker": "o", "markersize": 3.5}
STAGE = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (2, 2))}


def draw_bits(
    figure: Figure, records: Sequence[RunRecord], over: Sequence[str] = ("tokens", "seconds")
) -> None:
    """Bits per character against tokens or seconds, a panel for each; training faint, validation
    with markers.
    """
    panels = figure.subplots(len(over), sharey=True, squeeze=False)[:, 0]
    for axes, column in zip(panels, over, strict=True):
        for index, r in enumerate(records):
            axes.plot(r.train[column], r.train["bpc"], **line_style(index), **FAINT)
            axes.plot(r.valid[column], r.valid["bpc"], **line_style(index), **MARKED)
        axes.set_ylabel("bits per character")
        _count_on_x(axes, records, column)
    _limit_bits(panels[0], records)
    last = [(r.valid["bpc"] if len(r.valid["bpc"]) else r.train["bpc"])[-1] for r in records]
    names = [
        f"{literal(r.name)} {'=' if r.is_exact else '≤'} {b:.3f}"
        for r, b in zip(records, last, strict=True)
    ]
    _explain(figure, records, names, ("training batches", FAINT), ("validation windows", MARKED))


def _explain(
    figure: Figure,
    records: Sequence[RunRecord],
    names: Sequence[str],
    *kinds: tuple[str, dict[str, Any]],
) -> None:
    """A legend below all panels: the colours of the runs, kinds of lines, and the mark of a stage
    if there is one.
    """
    from matplotlib.lines import Line2D

    entries = [(name, line_style(index)) for index, name in enumerate(names)]
    entries += [(text, {"color": MUTED} | look) for text, look in kinds]
    if any(r.stage_starts for r in records):
        entries.append(("a stage begins", STAGE))
    handles, texts = [Line2D([], [], **look) for _, look in entries], [text for text, _ in entries]
    # a character is about half as wide as the font is high, and a sample of a line has the width of
    # eight
    columns = int(72 * figure.get_figwidth() // (0.62 * SMALL * (max(map(len, texts)) + 8)))
    place: dict[str, Any] = {
        "loc": "outside lower center",
        "ncols": max(1, min(columns, len(entries))),
    }
    figure.legend(handles, texts, fontsize=SMALL, frameon=False, **place)


def _limit_bits(axes: Axes, records: Sequence[RunRecord]) -> None:
    """Leave the first steps out of the frame; use a logarithmic axis if the runs are far apart."""
    low = min(
        float(np.min(lines["bpc"]))
        for r in records
        for lines in (r.train, r.valid)
        if len(lines["bpc"])
    )
    settled = [
        r.train["bpc"][r.train["tokens"] >= 0.05 * r.train["tokens"].max()][0] for r in records
    ]
    high = float(max([*settled, *(bpc for r in records for bpc in r.valid["bpc"])]))
    margin = 0.04 * (high - low) + 1e-6
    if low > 0 and high > 2.5 * low:
        log_scale(axes)
        margin = 0.04 * low
    axes.set_ylim(low - margin, high + margin)


def _count_on_x(axes: Axes, records: Sequence[RunRecord], column: str = "tokens") -> None:
    """A scale of tokens or seconds, and a line where a stage of any run begins, labelled at its
    top; runs that switch at about one place share it.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training" if column == "seconds" else column)
    marked: list[tuple[int, float]] = []
    for block, x in (
        (block, r.train[column][line]) for r in records for block, line in r.stage_starts
    ):
        if any(block == b and abs(x - other) < 0.02 * axes.get_xlim()[1] for b, other in marked):
            continue
        marked.append((block, x))
        axes.axvline(x, **STAGE, zorder=0.5)
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


@dataclass(frozen=True)
class Codes:
    """One vector for every token: mu_k of a codebook, or the input embedding of a baseline."""

    symbols: list[str]  # [V]
    points: Series  # [V, 2]: coordinates along the two directions of largest variance
    explained: tuple[float, float]  # shares of the variance along these directions
    std: Series | None  # [V]: sigma_k; None for an embedding
    named: Indices  # the tokens that are named, most frequent first, or the first of the vocabulary

    @property
    def noun(self) -> str:
        return "codebook" if self.std is not None else "input embedding"


def codes_of(model: LanguageModel, tokenizer: Tokenizer, counts: Indices | None) -> Codes:
    """The codes of a model; `counts` [V] are the frequencies of the tokens, if known."""
    vectors, log_std = model.token_vectors()
    std = None if log_std is None else log_std.detach().cpu().double().exp().numpy()
    points, explained = project(vectors.detach().cpu().double().numpy())
    order = np.arange(len(points)) if counts is None else np.argsort(-counts, kind="stable")
    return Codes(
        [symbol.replace(" ", "␣") for symbol in tokenizer.symbols],
        points,
        explained,
        std,
        order[:NAMED],
    )


def project(vectors: Series) -> tuple[Series, tuple[float, float]]:
    """Coordinates [V, 2] of vectors [V, d], d >= 1, on their first two principal axes; shares of
    the variance. Signs are fixed: the entry of largest magnitude of each axis is positive. The axes
    are orthonormal, so a sphere becomes a disc of the same radius.
    """
    # d = 1 has no second axis
    centred = np.pad(vectors - vectors.mean(0), ((0, 0), (0, max(0, 2 - vectors.shape[1]))))
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:2]
    signs = np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(1)])
    shares = np.square(singular) / max(np.square(singular).sum(), 1e-300)
    return centred @ (directions * signs[:, None]).T, (float(shares[0]), float(shares[1]))


def draw_codes(figure: Figure, codes: Codes) -> None:
    """The projection, with discs of radius sigma around the codes that are named."""
    from matplotlib.collections import EllipseCollection

    axes, shown = figure.subplots(), codes.named
    rest = np.setdiff1d(np.arange(len(codes.points)), shown)
    axes.scatter(*codes.points[rest].T, s=4, color=MUTED, alpha=0.5, linewidths=0, rasterized=True)
    if codes.std is not None:
        radius = codes.std[shown]
        circles = EllipseCollection(
            2 * radius,
            2 * radius,
            np.zeros(len(shown)),
            units="xy",
            offsets=codes.points[shown],
            offset_transform=axes.transData,
            color=COLOURS[0],
            alpha=0.14,
            linewidths=0.8,
        )
        axes.add_collection(circles)
        for side in (-1, 1):
            axes.update_datalim(codes.points[shown] + side * radius[:, None])
    axes.margins(0.04)
    axes.autoscale_view()
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(f"first principal component ({100 * codes.explained[0]:.0f} % of the variance)")
    axes.set_ylabel(
        f"second principal component ({100 * codes.explained[1]:.0f} % of the variance)"
    )
    for i in shown[::-1]:
        # the most frequent on top
        place: dict[str, Any] = {"ha": "center", "va": "center", "clip_on": True}
        axes.text(
            *codes.points[i],
            literal(codes.symbols[i]),
            fontsize=SMALL - 1 if len(rest) else 11,
            **place,
        )
    discs = ", discs of one σ" if codes.std is not None else ""
    axes.set_title(f"{codes.noun}, {len(codes.symbols):,} symbols{discs}")
