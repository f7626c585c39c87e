"""Questions that the paper leaves open: progressive training over time, patch sizes, and a single Mix-1 block."""

from collections.abc import Sequence
from dataclasses import replace

from tarflowlm.config import RunConfig
from tarflowlm.model import as_flow_config, stack
from tarflowlm.presets import PLAIN_CODEBOOK
from tarflowlm.report.records import RunRecord, read_record
from tarflowlm.report.style import Figure
from tarflowlm.reproduce.ablations import joint
from tarflowlm.reproduce.measures import (
    latents,
    plot_models,
    plot_over,
    shortened,
    summaries,
    summaries_by,
    summary_row,
)
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings

MINI_BOUND, PAPER_BOUND = 2.1, 1.4
"""Bits per character of the training text, of which no step at mini scale sees a part twice."""
AVERAGED = 5
"""Lines of metrics.jsonl that a point of the curve averages."""
POINTS = 8
"""Of the curve, evenly spaced."""
PATCHES = (1, 2, 4, 8)
FEW_COMPONENTS = (2, 3, 4)


def plan_progressive(settings: Settings) -> list[Training]:
    """The same Mix-d model trained progressively and jointly."""
    progressive = settings.preset("mixd", "text8")
    return trainings(settings, {"progressive": progressive, "joint": joint(progressive)})


def training_curve(record: RunRecord) -> dict[int, float]:
    """Step -> training bound in bits per character, averaged over the last `AVERAGED` lines up to that step."""
    steps, values = record.train["step"], record.train["bpc"]
    return {
        int(steps[i]): float(values[max(0, i + 1 - AVERAGED) : i + 1].mean())
        for i in range(min(AVERAGED, len(values)) - 1, len(values))
    }


def measure_progressive(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Final bound, steps to a given training bound, KL divergence after every block, and the training curve."""
    bound = MINI_BOUND if settings.scale == "mini" else PAPER_BOUND
    rows = []
    for done in finished:
        curve = training_curve(read_record(done.directory))
        reached = next((step for step, bpc in curve.items() if bpc <= bound), None)
        row = summary_row(done) | {f"steps to {bound}": reached}
        row |= {f"kl after block {state.block}": state.kl.mean for state in latents(done)[1:]}
        for place in range(1, POINTS + 1):
            step = _nearest(curve, place * done.training.run.train.num_steps / POINTS)
            row[f"bpc at {step:,}"] = curve[step]
        rows.append(row)
    return rows


def _nearest(curve: dict[int, float], place: float) -> int:
    return min(curve, key=lambda step: abs(step - place))


def draw_progressive(figure: Figure, rows: Sequence[Row]) -> None:
    """The training curves."""
    axes = figure.subplots()
    for row in rows:
        points = {int(name[7:].replace(",", "")): value for name, value in row.items() if name.startswith("bpc at ")}
        axes.plot(list(points), list(points.values()), "o-", label=f"{row['model']}, seed {row['seed']}")
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("training bits per character, <=")
    axes.legend()


def plan_patches(settings: Settings) -> list[Training]:
    """Mix-d with each patch size."""
    return trainings(settings, {f"P = {patch}": _patched(settings, patch) for patch in PATCHES})


def _patched(settings: Settings, patch: int) -> RunConfig:
    """Mix-d with in-patch weights; all but the patch as with one token at a time."""
    run = settings.preset("mixd", "text8")
    name = run.name if patch == 1 else f"{run.name}-p{patch}"
    return replace(run, name=name, model=replace(run.model, patch=patch))


def plan_one_block(settings: Settings) -> list[Training]:
    """One Mix-1 block with each number of components."""
    return trainings(settings, {f"K = {k}": _one_block(settings, k) for k in FEW_COMPONENTS})


def _one_block(settings: Settings, components: int) -> RunConfig:
    """One Mix-1 block with all layers of the three."""
    run = settings.preset("mix1", "text8")
    before = as_flow_config(run.model)
    layers = sum(block.layers for block in before.blocks)
    model = replace(before, blocks=stack(("mix1",), (layers,), (components,)))
    optim = replace(run.optim, codebook_lr_scale=PLAIN_CODEBOOK)
    run = replace(run, name=f"{run.name}-one-k{components}", model=model, optim=optim)
    return shortened(run) if settings.scale == "mini" else run


PROGRESSIVE = Recipe(
    name="progressive",
    title="Progressive and joint training",
    claim="The paper: the ablation is best with progressive training. (KL divergences are in nats per token, to a "
    "prior that ends after that block. A training step of the first block alone costs less than a joint step.)",
    plan=plan_progressive,
    measure=measure_progressive,
    draw=draw_progressive,
    seeds=2,
)

PATCH_SIZES = Recipe(
    name="patches",
    title="Patch size at one depth",
    claim="Patches of several tokens shorten the sequence. What does each size cost? The paper does not say.",
    plan=plan_patches,
    measure=summaries_by("P", lambda config: config.patch),
    draw=plot_over("P", "tokens per position P"),
)

ONE_BLOCK = Recipe(
    name="one-block",
    title="One Mix-1 block with few components",
    claim="In the paper any K above 1 works in three blocks, without a head over channels. Are two to four "
    "components enough in one, with that head?",
    plan=plan_one_block,
    measure=summaries,
    draw=plot_models(),
)
