"""The terms of the bound as a table, and what every block gains as a figure."""

from collections.abc import Sequence

from tarflowlm.evaluation.blocks import StateReport
from tarflowlm.views.page import table_html
from tarflowlm.views.style import COLOURS, MUTED, Figure


def terms_table(states: Sequence[StateReport], to_bpc: float) -> str:
    """The terms of the bound, which add up to it, and the bound after each block.

    A nat per token is `to_bpc` bits per character.
    """
    first = states[0]
    last = states[-1]
    terms = {
        "log q(z|x)": first.kl.mean + first.base.mean,
        "−log N(u; 0, I)": -last.base.mean,
    }
    for state in states:
        if state.log_det is not None:
            terms[f"−log|det J|, block {state.block}"] = -state.log_det.mean
    kl = last.kl.mean
    terms["−log p(x|z)"] = last.nelbo.mean - kl
    rows = [(name, signed(value, 5), signed(to_bpc * value, 5)) for name, value in terms.items()]
    rows.append(("KL(q(z|x) ‖ p(z))", f"{kl:.5f}", f"{to_bpc * kl:.5f}"))
    names = [f"bound of blocks 1 to {state.block}" for state in states]
    names[0] = "bound of no block"
    names[-1] = "bound of the model"
    for name, state in zip(names, states, strict=True):
        bound = state.nelbo.mean
        rows.append((name, f"<= {bound:.5f}", f"<= {to_bpc * bound:.5f}"))
    return table_html(["", "nats per token", "bits per character"], rows)


def draw_gains(figure: Figure, states: Sequence[StateReport], to_bpc: float) -> None:
    """By how much every block lowers the bound: a bar for each, block 1 on top."""
    gains = [state.kl_gain.mean for state in states if state.kl_gain is not None]
    axes = figure.subplots()
    colours = [COLOURS[0] if gain >= 0 else COLOURS[1] for gain in gains]
    axes.barh(range(len(gains)), gains, height=0.62, color=colours)
    axes.set_yticks(range(len(gains)), [f"block {block}" for block in range(1, len(gains) + 1)])
    axes.set_ylim(len(gains) - 0.4, -0.6)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.grid(axis="y", visible=False)
    axes.set_title("gain of each block, nats per token, and bits per character")
    values = [f"{signed(gain)}\n{signed(to_bpc * gain)} bits" for gain in gains]
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(gains)), values)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign, without one if it rounds to zero."""
    rounded = round(value, digits)
    if rounded == 0:
        return f"{0:.{digits}f}"
    return f"{'+' if rounded > 0 else '−'}{abs(rounded):.{digits}f}"
