"""Figure 7: the latents after every block."""

from collections.abc import Sequence
from typing import Any

from tarflowlm.data import eval_windows
from tarflowlm.evaluation.latents import latent_report
from tarflowlm.model import TarFlowLM
from tarflowlm.presets import preset
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings

WINDOWS = 256
METRICS = ("norm", "cosine", "participation_ratio", "centroid_shift", "log_det", "kl", "kl_gain", "nelbo")


def plan(settings: Settings) -> list[Training]:
    prefix = "mini" if settings.scale == "mini" else "owt"
    names = {"affine": "affine", "Mix-1": "mix1", "Mix-d": "mixd"}
    return trainings(settings, {label: preset(f"{prefix}-{kind}") for label, kind in names.items()})


def measure(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    rows = []
    for done in finished:
        checkpoint = done.load()
        assert isinstance(checkpoint.model, TarFlowLM)
        windows = eval_windows(done.tokens(checkpoint), checkpoint.run.model.context, WINDOWS)
        for state in latent_report(checkpoint.model, windows):
            row: Row = {"model": done.training.label, "seed": done.training.run.seed, "block": state.block}
            for name in METRICS:
                spread = getattr(state, name)
                row |= {name: None if spread is None else spread.mean, f"{name} ±": spread and spread.std}
            rows.append(row)
    return rows


def draw(axes: Any, rows: Sequence[Row]) -> None:
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model and row["seed"] == 0]
        axes.errorbar(
            [row["block"] for row in of_model],
            [row["participation_ratio"] for row in of_model],
            [row["participation_ratio ±"] for row in of_model],
            marker="o",
            capsize=3,
            label=model,
        )
    axes.set_xlabel("blocks passed (0: latents of the text)")
    axes.set_ylabel("participation ratio")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    axes.grid(alpha=0.3)


RECIPE = Recipe(
    name="fig7",
    title="Latents after every block",
    claim="norms, cosines, participation ratio and centroid movement of the states show what each block does.",
    plan=plan,
    measure=measure,
    draw=draw,
)
