"""Figure 7: the latents after every block, and floating-point operations."""

from collections.abc import Sequence
from dataclasses import replace

from tarflowlm.data import eval_windows
from tarflowlm.evaluation.blocks import latent_report
from tarflowlm.evaluation.flops import forward_flops, generation_flops, training_flops
from tarflowlm.model import TarFlowLM
from tarflowlm.report.style import SMALL, Figure
from tarflowlm.reproduce.fig6 import more_for_upper_blocks
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings
from tarflowlm.reproduce.write import markdown_table
from tarflowlm.runs.checkpoint import read_run
from tarflowlm.runs.config import RunConfig
from tarflowlm.runs.presets import preset

WINDOWS = 256
METRICS = ("norm", "cosine", "participation_ratio", "centroid_shift", "log_det", "kl", "kl_gain", "nelbo")


def plan(settings: Settings) -> list[Training]:
    prefix = "mini" if settings.scale == "mini" else "owt"
    names = {"affine": "affine", "Mix-1": "mix1", "Mix-d": "mixd"}
    runs = {label: preset(f"{prefix}-{kind}") for label, kind in names.items()}
    if settings.scale == "mini":
        runs |= more_for_upper_blocks(settings)
    return trainings(settings, runs)


def measure(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    rows = []
    for done in finished:
        checkpoint = done.load()
        assert isinstance(checkpoint.model, TarFlowLM)
        windows = eval_windows(done.tokens(checkpoint), checkpoint.run.model.context, WINDOWS)
        for state in latent_report(checkpoint.model, windows, progress=done.counting("latents of windows")):
            row: Row = {"model": done.training.label, "seed": done.training.run.seed, "block": state.block}
            for name in METRICS:
                spread = getattr(state, name)
                row |= {name: None if spread is None else spread.mean, f"{name} ±": spread and spread.std}
            rows.append(row)
    return rows


def flops_table(settings: Settings, finished: Sequence[Finished]) -> str:
    flows = {done.training.label: read_run(done.directory) for done in finished}
    vocab_size = next(iter(flows.values())).model.vocab_size
    runs = {"AR": preset("mini-ar" if settings.scale == "mini" else "owt-ar")} | flows
    rows = [_flops_row(label, run, vocab_size) for label, run in runs.items()]
    return (
        "## Floating-point operations\n\nMillions per token, a multiply-add counted as two; "
        "`tarflowlm.evaluation.flops` has the formulas of both conventions.\n\n" + markdown_table(rows)
    )


def _flops_row(label: str, run: RunConfig, vocab_size: int) -> Row:
    config = replace(run.model, vocab_size=vocab_size)
    scale = 1e-6 / config.context
    return {
        "model": label,
        "forward, the paper's": scale * forward_flops(config, "paper"),
        "forward, full": scale * forward_flops(config),
        "training step of all blocks": scale * training_flops(config),
        "generation": scale * generation_flops(config),
    }


def draw(figure: Figure, rows: Sequence[Row]) -> None:
    metrics = {"norm": "norm", "cosine": "cosine", "participation_ratio": "participation ratio",
               "centroid_shift": "movement of the centroid"}  # fmt: skip
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (name, title) in zip(panels.flat, metrics.items(), strict=True):
        for index, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
            of_model = [r for r in rows if r["model"] == model and r["seed"] == 0 and r[name] is not None]
            values, spreads = ([r[column] for r in of_model] for column in (name, f"{name} ±"))
            # side by side, so that no model hides another
            places = [r["block"] + 0.05 * index for r in of_model]
            axes.errorbar(places, values, spreads, marker="o", markersize=4, capsize=2, label=model)
        axes.set_title(title, fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels[1]:
        axes.set_xlabel("blocks passed (0: latents of the text)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=SMALL)


RECIPE = Recipe(
    name="fig7",
    title="Latents after every block",
    claim="The paper: norms, cosines, participation ratio and centroid movement of the states show what each "
    "block does.",
    plan=plan,
    measure=measure,
    draw=draw,
    text=flops_table,
)
