"""Figure and table of the terms of the bound and of the gain of every block (`evaluation/blocks.py`)."""

from tarflowlm.evaluation.blocks import BoundParts
from tarflowlm.report.page import table_html
from tarflowlm.report.style import COLOURS, INK, MUTED, PAPER, SMALL, Axes, Figure


def terms(parts: BoundParts) -> list[tuple[str, float]]:
    """Name and nats per token of each term; their sum is the bound."""
    blocks = [(f"−log|det J|, block {block}", -value) for block, value in enumerate(parts.log_dets, 1)]
    return [
        ("log q(z|x)", parts.log_q),
        ("−log N(u; 0, I)", -parts.bases[-1]),
        *blocks,
        ("−log p(x|z)", -parts.reconstruction),
    ]


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
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.grid(axis="y", visible=False)
    axes.set_title("terms of the bound, nats per token")


def _gains(axes: Axes, parts: BoundParts) -> None:
    gains = parts.gains
    room = max([*map(abs, gains), 1e-9])
    for row, gain in enumerate(gains):
        axes.barh(row, gain, height=0.62, color=_colour(gain))
        is_inside = gain > 0.6 * room
        axes.annotate(
            f"{signed(gain)} nats\n{signed(parts.bpc(gain))} bits per character",
            (gain if is_inside else max(gain, 0), row),
            xytext=(-4 if is_inside else 4, 0),
            textcoords="offset points",
            ha="right" if is_inside else "left",
            va="center",
            fontsize=SMALL,
            color=PAPER if is_inside else INK,
        )
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
