"""The terms of the bound, and what every block gains: a figure and a table."""

from collections.abc import Sequence

from tarflowlm.evaluation.blocks import StateReport
from tarflowlm.evaluation.likelihood import bits
from tarflowlm.views.page import table_html
from tarflowlm.views.style import COLOURS, INK, MUTED, Axes, Figure


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
    rows = terms(states)
    gains = [state.kl_gain.mean for state in states if state.kl_gain is not None]
    upper, lower = figure.subplots(2, height_ratios=(len(rows) + 1, 1.2 * len(gains) + 1))
    upper.set_title("terms of the bound, nats per token")
    position = 0.0
    for row, (_, value) in enumerate(rows):
        upper.barh(row, value, left=position, height=BAR, color=_colour(value))
        position += value
        upper.plot(
            [position, position], [row - BAR / 2, row + 1 + BAR / 2], color=MUTED, linewidth=0.7
        )
    upper.barh(len(rows), position, height=BAR, color=INK)
    names = [*(name for name, _ in rows), "bound"]
    _name_rows(upper, names, [*(signed(value) for _, value in rows), f"≤ {position:.4f}"])

    lower.set_title("gain of each block, nats per token, and bits per character")
    lower.barh(range(len(gains)), gains, height=BAR, color=[_colour(gain) for gain in gains])
    to_bpc = bits(tokens_per_character)
    values = [f"{signed(gain)}\n{signed(to_bpc * gain)} bits" for gain in gains]
    _name_rows(lower, [f"block {block}" for block in range(1, len(gains) + 1)], values)


BAR = 0.62  # height of a bar, where rows are 1 apart


def _name_rows(axes: Axes, names: Sequence[str], values: Sequence[str]) -> None:
    """Rows of bars from the top: their names on the left, their values on the right."""
    rows = range(len(names))
    axes.set_yticks(rows, names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.03)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.grid(axis="y", visible=False)
    right = axes.secondary_yaxis("right")
    right.set_yticks(rows, values)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)


def _colour(value: float) -> str:
    return COLOURS[0] if value >= 0 else COLOURS[1]


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign, without one if it rounds to zero."""
    rounded = round(value, digits)
    if rounded == 0:
        return f"{0:.{digits}f}"
    return f"{'+' if rounded > 0 else '−'}{abs(rounded):.{digits}f}"
