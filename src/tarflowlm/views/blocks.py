"""The terms of the bound, and what every block gains: a figure and a table."""

from collections.abc import Sequence

from tarflowlm.evaluation.blocks import StateReport
from tarflowlm.evaluation.likelihood import bits
from tarflowlm.views.page import table_html
from tarflowlm.views.style import COLOURS, INK, MUTED, PAPER, SMALL, Axes, Figure


def terms(states: Sequence[StateReport]) -> list[tuple[str, float]]:
    """Name and nats per token of each term; their sum is the bound."""
    first = states[0]
    last = states[-1]
    return [
        ("log q(z|x)", first.kl.mean + first.base.mean),
        ("−log N(u; 0, I)", -last.base.mean),
        *(
            (f"−log|det J|, block {state.block}", -state.log_det.mean)
            for state in states
            if state.log_det is not None
        ),
        ("−log p(x|z)", last.nelbo.mean - last.kl.mean),
    ]


def terms_table(states: Sequence[StateReport], tokens_per_character: float) -> str:
    """The terms of the bound, and the bound after each block."""
    to_bpc = bits(tokens_per_character)
    rows = [(name, signed(value, 5), signed(to_bpc * value, 5)) for name, value in terms(states)]
    kl = states[-1].kl.mean
    rows.append(("KL(q(z|x) ‖ p(z))", f"{kl:.5f}", f"{to_bpc * kl:.5f}"))
    names = [f"bound of blocks 1 to {state.block}" for state in states]
    names[0] = "bound of no block"
    names[-1] = "bound of the model"
    for name, state in zip(names, states, strict=True):
        bound = state.nelbo.mean
        rows.append((name, f"<= {bound:.5f}", f"<= {to_bpc * bound:.5f}"))
    return table_html(["", "nats per token", "bits per character"], rows)


def draw_blocks(figure: Figure, states: Sequence[StateReport], tokens_per_character: float) -> None:
    """A waterfall of the terms, down to the bound, then the gain of every block."""
    blocks = len(states) - 1
    upper, lower = figure.subplots(2, height_ratios=(blocks + 4.0, 1.2 * blocks + 1))
    _waterfall(upper, states)
    _gains(lower, states, bits(tokens_per_character))
    for axes in (upper, lower):
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.grid(axis="y", visible=False)


def _waterfall(axes: Axes, states: Sequence[StateReport]) -> None:
    rows = terms(states)
    position = 0.0
    shown = []
    for row, (_, value) in enumerate(rows):
        axes.barh(row, value, left=position, height=0.62, color=_colour(value))
        position += value
        axes.plot([position, position], [row - 0.31, row + 1.31], color=MUTED, linewidth=0.7)
        shown.append(signed(value))
    axes.barh(len(rows), position, height=0.62, color=INK)
    shown.append(f"≤ {position:.4f}")
    for row, text in enumerate(shown):
        axes.annotate(
            text,
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


def _gains(axes: Axes, states: Sequence[StateReport], to_bpc: float) -> None:
    gains = [state.kl_gain.mean for state in states if state.kl_gain is not None]
    room = max([*map(abs, gains), 1e-9])
    for row, gain in enumerate(gains):
        axes.barh(row, gain, height=0.62, color=_colour(gain))
        is_inside = gain > 0.6 * room  # the text is in its bar if that is long enough
        axes.annotate(
            f"{signed(gain)} nats\n{signed(to_bpc * gain)} bits per character",
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
    axes.set_title("gain of each block, nats per token")


def _colour(value: float) -> str:
    return COLOURS[0] if value >= 0 else COLOURS[1]


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign, without one if it rounds to zero."""
    rounded = round(value, digits)
    if rounded == 0:
        return f"{0:.{digits}f}"
    return f"{'+' if rounded > 0 else '−'}{abs(rounded):.{digits}f}"
