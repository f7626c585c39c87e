"""Progressive training on and off: how soon a bound is reached, where it ends, and what each block takes off it."""

from collections.abc import Sequence
from functools import partial

from tarflowlm.data import eval_windows
from tarflowlm.evaluation.blocks import latent_report
from tarflowlm.model import TarFlowLM
from tarflowlm.report.records import RunRecord, read_record
from tarflowlm.report.style import Figure
from tarflowlm.reproduce.fig2 import joint
from tarflowlm.reproduce.measures import summary_row
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings
from tarflowlm.runs.presets import preset

WINDOWS = 256
MINI_BOUND, PAPER_BOUND = 2.1, 1.4
"""Bits per character of the training text, which at mini scale no step sees twice."""
AVERAGED = 5
"""Lines of metrics.jsonl that a point of the curve is the mean of."""
POINTS = 8
"""Of the curve, evenly spaced."""


def plan(settings: Settings) -> list[Training]:
    progressive = preset(f"{'mini' if settings.scale == 'mini' else 'text8'}-mixd")
    return trainings(settings, {"progressive": progressive, "joint": joint(progressive)})


def curve(record: RunRecord) -> dict[int, float]:
    """Step -> mean training bound over the last lines up to it, in bits per character."""
    steps, bits = record.train["step"], record.train["bpc"]
    return {
        int(steps[i]): float(bits[max(0, i + 1 - AVERAGED) : i + 1].mean())
        for i in range(min(AVERAGED, len(bits)) - 1, len(bits))
    }


def measure(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    bound = MINI_BOUND if settings.scale == "mini" else PAPER_BOUND
    rows = []
    for done in finished:
        points = curve(read_record(done.directory))
        reached = next((step for step, bits in points.items() if bits <= bound), None)
        row = summary_row(done) | {f"steps to {bound}": reached}
        checkpoint = done.load()
        assert isinstance(checkpoint.model, TarFlowLM)
        windows = eval_windows(done.tokens(checkpoint), checkpoint.run.model.context, WINDOWS)
        states = latent_report(checkpoint.model, windows, progress=done.counting("latents of windows"))
        row |= {f"kl after block {state.block}": state.kl.mean for state in states[1:]}
        for at in (i * done.training.run.train.num_steps / POINTS for i in range(1, POINTS + 1)):
            step = min(points, key=partial(_distance, at))
            row[f"bpc at {step:,}"] = points[step]
        rows.append(row)
    return rows


def _distance(at: float, step: int) -> float:
    return abs(step - at)


def draw(figure: Figure, rows: Sequence[Row]) -> None:
    axes = figure.subplots()
    for row in rows:
        points = {int(name[7:].replace(",", "")): value for name, value in row.items() if name.startswith("bpc at ")}
        axes.plot(list(points), list(points.values()), "o-", label=f"{row['model']}, seed {row['seed']}")
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("training bits per character, <=")
    axes.legend()


RECIPE = Recipe(
    name="progressive",
    title="Progressive and joint training",
    claim="The paper: progressive training is the best rung of the ladder. (The KL divergences are nats per "
    "token, to a prior that ends after that block. Training steps of the first block alone cost less than "
    "joint ones.)",
    plan=plan,
    measure=measure,
    draw=draw,
)
