"""Figures 2 to 4 of the paper: ladder, couplings, components; and progressive training."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from reproduction import measures
from reproduction.plots import plot_curves, plot_over
from reproduction.recipe import (
    RUN_DETAILS,
    Finished,
    Recipe,
    Row,
    Training,
    trainings,
    variant,
    without,
)
from reproduction.settings import Settings, as_flow_config
from tarflowlm.config import RunConfig
from tarflowlm.model_config import Mix1, TokenAffine

SIX = 6
COMPONENTS = (1, 2, 8, 27)
HALF_STEPS = 1300  # for trainings at mini scale that only have to rank models


def plan_fig2(settings: Settings) -> list[Training]:
    """The rungs of the ladder."""
    affine = settings.preset("affine", "owt")
    progressive = settings.preset("mixd", "owt")
    blocks = as_flow_config(affine.model).blocks
    base = variant(affine, "", blocks=tuple(TokenAffine(layers=one.layers) for one in blocks))
    ladder = {
        "base": replace(base, name=affine.name.replace("affine", "base")),
        "+ channel-wise": affine,
        "+ Mix-1": settings.preset("mix1", "owt"),
        "+ Mix-d": joint(progressive),
        "+ progressive": progressive,
    }
    return trainings(settings, ladder)


def joint(progressive: RunConfig) -> RunConfig:
    """The run with all blocks trained together, for the steps and so the tokens of block 1."""
    train = replace(progressive.train, mode="joint", stage_steps=progressive.train.stage_steps[:1])
    return replace(progressive, name=f"{progressive.name}-joint", train=train)


def plan_fig3(settings: Settings) -> list[Training]:
    """Six affine blocks and six Mix-1 blocks of two layers; at mini scale the three of table2."""
    runs = {"affine": settings.preset("affine", "owt"), "Mix-1": settings.preset("mix1", "owt")}
    if settings.scale == "paper":
        runs = {label: _six_blocks(run) for label, run in runs.items()}
    return trainings(settings, runs)


def _six_blocks(run: RunConfig) -> RunConfig:
    block = as_flow_config(run.model).blocks[0]
    return variant(run, "six", blocks=(replace(block, layers=2),) * SIX)


def plan_fig4(settings: Settings) -> list[Training]:
    """Mix-1 with each number of components.

    It has a plain start, and channels that do not see the channels before them.
    """
    run = measures.shortened(settings, settings.preset("mix1", "text8"), HALF_STEPS)
    blocks = [block for block in as_flow_config(run.model).blocks if isinstance(block, Mix1)]
    found = {}
    for k in COMPONENTS:
        blind = tuple(replace(block, components=k, sees_channels=False) for block in blocks)
        found[f"K = {k}"] = variant(run, f"k{k}-features", blocks=blind, starts="first")
    return trainings(settings, found)


def measure_fig4(_settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The number of components, and the bound."""
    rows = []
    for done in finished:
        first = as_flow_config(done.training.run.model).blocks[0]
        assert isinstance(first, Mix1)
        rows.append({"K": first.components} | measures.summary_row(done))
    return rows


def plan_progressive(settings: Settings) -> list[Training]:
    """The same Mix-d model trained progressively and jointly."""
    progressive = settings.preset("mixd", "text8")
    return trainings(settings, {"progressive": progressive, "joint": joint(progressive)})


def measure_progressive(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Final bound, the curves, and the KL divergence after every block."""
    rows = measures.with_curves(settings, finished)
    for row, done in zip(rows, finished, strict=True):
        row |= done.measured("KL divergences", partial(_divergences, done))
    return rows


def _divergences(done: Finished) -> Row:
    return {f"kl after block {state.block}": state.kl.mean for state in measures.latents(done)[1:]}


FIG2 = Recipe(
    name="fig2",
    title="Ladder of ablations",
    claim=(
        "The paper: every addition improves the model: base (one affine map for all channels of a"
        " token), + channel-wise affine (a minor gain), + Mix-1 (a great one), + Mix-d, + "
        "progressive training. (Block 1 sees the same tokens in all of them; progressive training"
        " adds steps for the other blocks, 600 at mini scale. There + Mix-d is no ablation: it "
        "also reads tokens, has its layers in block 1, and half the rate.)"
    ),
    plan=plan_fig2,
    measure=measures.with_curves,
    table=measures.without_curves,
    draw=plot_curves,
    seeds=2,
    clear=("+ channel-wise",),
)

FIG3 = Recipe(
    name="fig3",
    title="Affine against Mix-1 during training",
    claim=(
        "The paper: with six blocks of two layers, Mix-1 reaches a clearly better bound than "
        "affine couplings, in training and in validation (figures 3 and 8). Here three blocks of "
        "1, 1 and 4 layers have as many layers as the baseline."
    ),
    plan=plan_fig3,
    measure=measures.with_curves,
    table=measures.without_curves,
    draw=plot_curves,
)

FIG4 = Recipe(
    name="fig4",
    title="Mixture components",
    claim=(
        "The paper, without a head over channels (the parameters of a channel depend on the "
        "positions before): one component is far worse than any K above 1, and all of those work;"
        " on OpenWebText 64 do as well as all 50,257. (Here `model.starts` is first, and the bits "
        "are bounds.)"
    ),
    plan=plan_fig4,
    measure=measure_fig4,
    table=partial(without, columns=(*RUN_DETAILS, "model", "seed", "")),
    draw=partial(plot_over, column="K", label="mixture components K"),
)

PROGRESSIVE = Recipe(
    name="progressive",
    title="Progressive and joint training",
    claim=(
        "The paper: the ablation is best with progressive training. (Block 1 sees as many tokens "
        "in both. KL divergences are in nats per token, to a prior that ends after that block.)"
    ),
    plan=plan_progressive,
    measure=measure_progressive,
    table=measures.without_curves,
    draw=plot_curves,
    seeds=2,
)
