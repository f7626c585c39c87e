"""Figures 2 to 5 of the paper: training ladder, couplings, mixture components, and two tokens at a time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from tarflowlm.config import RunConfig
from tarflowlm.data import eval_windows
from tarflowlm.generation import Watch, generate
from tarflowlm.generation.window import num_positions
from tarflowlm.model import as_flow_config, stack
from tarflowlm.presets import PLAIN_CODEBOOK
from tarflowlm.report.style import Figure
from tarflowlm.reproduce.measures import (
    judge_of,
    judge_training,
    plot_models,
    plot_over,
    shortened,
    summaries,
    summaries_by,
)
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings

BASE, CHANNELWISE = "base", "+ channel-wise"
SIX = 6
COMPONENTS = (1, 2, 4, 8, 16, 27)
ALONE, HEAD, STARTED = "features alone", "with the channels before", "with them, start from the codebook"
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    ALONE: ("-features", {"sees_channels": False, "start": "plain"}),
    HEAD: ("-plain", {"start": "plain"}),
    STARTED: ("", {}),
}
"""Figure 4: what the parameters of a channel see -> suffix of the run, fields of its blocks."""
PREFIXES = (0, 16, 64, 128)
"""Tokens of real text that a continuation is given."""
PROMPTS = 32


def plan_fig2(settings: Settings) -> list[Training]:
    """The five rungs of the ladder."""
    affine, progressive = settings.preset("affine", "owt"), settings.preset("mixd", "owt")
    model = as_flow_config(affine.model).each_block(coupling="token-affine")
    base = replace(affine, name=affine.name.replace("affine", "base"), model=model)
    return trainings(
        settings,
        {
            BASE: base,
            CHANNELWISE: affine,
            "+ Mix-1": settings.preset("mix1", "owt"),
            "+ Mix-d": joint(progressive),
            "+ progressive": progressive,
        },
    )


def joint(progressive: RunConfig) -> RunConfig:
    """The same number of steps, each of which trains all blocks."""
    train = replace(progressive.train, mode="joint", stage_steps=(sum(progressive.train.stage_steps),))
    return replace(progressive, name=f"{progressive.name}-joint", train=train)


def plan_fig3(settings: Settings) -> list[Training]:
    """Six affine blocks and six Mix-1 blocks."""
    return trainings(settings, {"affine": _six_blocks(settings, "affine"), "Mix-1": _six_blocks(settings, "mix1")})


def _six_blocks(settings: Settings, coupling: Literal["affine", "mix1"]) -> RunConfig:
    """Six blocks of two layers; of one layer at mini scale, the depth of the baseline."""
    mini = settings.scale == "mini"
    run = settings.preset(coupling, "owt")
    before = as_flow_config(run.model)
    first, upper = before.blocks[0], before.blocks[-1]
    components = (first.components, *(upper.components,) * (SIX - 1))
    blocks = stack((coupling,) * SIX, (1 if mini else 2,) * SIX, components)
    model = replace(before, blocks=blocks).each_block(start=first.start)
    run = replace(run, name=f"{run.name}-six", model=model)
    return shortened(run) if mini else run


def plan_fig4(settings: Settings) -> list[Training]:
    """Mix-1 with each number of components: without the channels before, as in the paper, and with them."""
    runs = [_components(settings, k, variant) for variant in (ALONE, HEAD) for k in COMPONENTS]
    if settings.scale == "mini":
        # the paper's presets have no such start
        runs.append(_components(settings, COMPONENTS[-1], STARTED))
    return trainings(settings, dict(runs))


def _components(settings: Settings, components: int, variant: str) -> tuple[str, RunConfig]:
    """Label and run: Mix-1 with K components in every block, the learning rate of the codebook the same for all."""
    run = settings.preset("mix1", "text8")
    suffix, fields = HEADS[variant]
    model = as_flow_config(run.model).each_block(components=components, **fields)
    optim = replace(run.optim, codebook_lr_scale=PLAIN_CODEBOOK)
    run = replace(run, name=f"{run.name}-k{components}{suffix}", model=model, optim=optim)
    return f"K = {components}, {variant}", shortened(run) if settings.scale == "mini" else run


def measure_fig4(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The runs' own measurements by K and by what the parameters of a channel see."""
    by_components = summaries_by("K", lambda config: config.blocks[0].components)
    return [row | {"head": row["model"].partition(", ")[2]} for row in by_components(settings, finished)]


def plan_fig5(settings: Settings) -> list[Training]:
    """Flows of both couplings and the baseline at patch size 2, and the judge."""
    foil = settings.preset("ar", "owt")
    foil = replace(foil, name=f"{foil.name}-p2", model=replace(foil.model, patch=2, in_patch="independent"))
    mix1 = settings.preset("mix1", "owt")
    runs = {
        "Mix-1, head over the patch": replace(mix1, name=f"{mix1.name}-p2", model=replace(mix1.model, patch=2)),
        "Mix-d, in-patch weights": two_tokens(settings, "autoregressive"),
        "Mix-d, independent weights": two_tokens(settings, "independent"),
        "two-token AR": foil,
    }
    return trainings(settings, runs) + judge_training(settings)


def two_tokens(settings: Settings, in_patch: Literal["autoregressive", "independent"]) -> RunConfig:
    """Mix-d with two tokens per position, whose weights see the earlier token of the patch, or not."""
    run = settings.preset("mixd-p2" if settings.scale == "mini" else "mixd", "owt")
    name = run.name if settings.scale == "mini" else f"{run.name}-p2"
    name += "-independent" if in_patch == "independent" else ""
    return replace(run, name=name, model=replace(run.model, patch=2, in_patch=in_patch))


def measure_fig5(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Perplexity under the judge of prefix and continuation, by model and prefix; real text last."""
    judge, models = judge_of(settings, finished)
    rows: list[Row] = []
    for done in models:
        checkpoint = done.load()
        context = checkpoint.run.model.context
        text = eval_windows(done.tokens(checkpoint), context, PROMPTS)
        for prefix in PREFIXES:
            samples = generate(
                checkpoint.model,
                num=len(text),
                num_tokens=context,
                prompt=text[:, :prefix],
                generator=torch.Generator().manual_seed(0),
                decoder="auto",
                watch=Watch(done.stage_of(f"prefix {prefix}, positions", num_positions(checkpoint.model, context))),
            )
            reading = judge.read([checkpoint.tokenizer.decode(row) for row in samples.tokens.tolist()])
            row = {"model": done.training.label, "seed": done.training.run.seed, "prefix": prefix}
            rows.append(row | {"perplexity": reading.perplexity, "judge": judge.name})
        real = judge.read([checkpoint.tokenizer.decode(row) for row in text.tolist()]).perplexity
    rows += [{"model": "real text", "prefix": prefix, "perplexity": real, "judge": judge.name} for prefix in PREFIXES]
    return rows


def draw_fig5(figure: Figure, rows: Sequence[Row]) -> None:
    """Perplexity over the length of the prefix, one line per model."""
    axes = figure.subplots()
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        axes.plot([row["prefix"] for row in of_model], [row["perplexity"] for row in of_model], "o-", label=model)
    axes.set_xlabel("tokens of real text before the continuation")
    axes.set_ylabel("generative perplexity")
    axes.legend()


FIG2 = Recipe(
    name="fig2",
    title="Ladder of ablations",
    claim="The paper: every addition improves the model: base (one affine map for all channels of a token), + "
    "channel-wise affine, + Mix-1, + Mix-d, + progressive training.",
    plan=plan_fig2,
    measure=summaries,
    draw=plot_models(),
    seeds=2,
    clear=(BASE, CHANNELWISE),
)

FIG3 = Recipe(
    name="fig3",
    title="Affine against Mix-1, six blocks",
    claim="The paper: with six blocks of two layers, Mix-1 reaches a clearly better bound than affine couplings.",
    plan=plan_fig3,
    measure=summaries,
    draw=plot_models(),
)

FIG4 = Recipe(
    name="fig4",
    title="Mixture components",
    claim="The paper, without a head over channels: K = 1 is far worse than any K above 1, and all of those work. "
    f'("{ALONE}" is that model: the parameters of a channel depend on the positions before. With the head they also '
    "see the channels before it.)",
    plan=plan_fig4,
    measure=measure_fig4,
    draw=plot_over("K", "mixture components K", series="head"),
)

FIG5 = Recipe(
    name="fig5",
    title="Two tokens at a time",
    claim="The paper: at patch size 2 the flow's generative perplexity stays good over all prefix lengths; a "
    "baseline that predicts two tokens at once breaks down. (It does not say which coupling the flow has. Its patch "
    "models have a head over all channels of a patch, as Mix-1 has here; its figure 1 has the tokens of a patch "
    "independent in the first blocks.)",
    plan=plan_fig5,
    measure=measure_fig5,
    draw=draw_fig5,
)
