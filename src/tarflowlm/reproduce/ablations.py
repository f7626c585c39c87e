"""Figures 2 to 5 of the paper (ladder, couplings, components, two tokens at a time), and open
questions: progressive training, patch sizes, what recovers a patch, and the shares of the
blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from tarflowlm.config import RunConfig
from tarflowlm.data import eval_windows
from tarflowlm.evaluation.judges import Judge
from tarflowlm.model_config import as_flow_config, stack
from tarflowlm.presets import PLAIN_CODEBOOK, preset, with_blocks
from tarflowlm.reproduce import states
from tarflowlm.reproduce.recipe import (
    RUN_DETAILS,
    Finished,
    Recipe,
    Row,
    Settings,
    Training,
    trainings,
)
from tarflowlm.views.style import Figure, log_scale

BASE, CHANNELWISE, JOINT = "base", "+ channel-wise", "+ Mix-d"
SIX = 6
COMPONENTS = (1, 2, 8, 27)
PREFIXES, PROMPTS = (
    (0, 16, 64, 128),
    32,
)  # tokens of real text before a continuation, number of continuations
PATCHES = (2, 4)
HALF_STEPS = 1300  # of trainings at mini scale that only have to show an order


def plan_fig2(settings: Settings) -> list[Training]:
    """The five rungs of the ladder."""
    affine, progressive = settings.preset("affine", "owt"), settings.preset("mixd", "owt")
    model = as_flow_config(affine.model).each_block(coupling="token-affine")
    base = replace(affine, name=affine.name.replace("affine", "base"), model=model)
    ladder = {BASE: base, CHANNELWISE: affine, "+ Mix-1": settings.preset("mix1", "owt")}
    return trainings(settings, ladder | {JOINT: joint(progressive), "+ progressive": progressive})


def joint(progressive: RunConfig) -> RunConfig:
    """The steps of block 1, and so its tokens, each of which trains all blocks."""
    train = replace(progressive.train, mode="joint", stage_steps=progressive.train.stage_steps[:1])
    return replace(progressive, name=f"{progressive.name}-joint", train=train)


def plan_fig3(settings: Settings) -> list[Training]:
    """Six affine blocks and six Mix-1 blocks."""
    return trainings(
        settings,
        {"affine": _six_blocks(settings, "affine"), "Mix-1": _six_blocks(settings, "mix1")},
    )


def _six_blocks(settings: Settings, coupling: Literal["affine", "mix1"]) -> RunConfig:
    """Six blocks of two layers with a plain start; of one layer at mini scale, the depth of the
    baseline.
    """
    run = settings.preset(coupling, "owt")
    before = as_flow_config(run.model)
    first, upper = before.blocks[0], before.blocks[-1]
    layers = (1 if settings.scale == "mini" else 2,) * SIX
    blocks = stack((coupling,) * SIX, layers, (first.components, *(upper.components,) * (SIX - 1)))
    model = replace(before, blocks=blocks).each_block(start="plain")
    return states.shortened(settings, replace(run, name=f"{run.name}-six", model=model))


def plan_fig4(settings: Settings) -> list[Training]:
    """Mix-1 with each number of components, a plain start, and channels that do not see those
    before them.
    """
    run, found = states.shortened(settings, settings.preset("mix1", "text8"), 2 * HALF_STEPS), {}
    optim = replace(run.optim, codebook_lr_scale=PLAIN_CODEBOOK)
    for k in COMPONENTS:
        model = as_flow_config(run.model).each_block(
            components=k, start="plain", sees_channels=False
        )
        found[f"K = {k}"] = replace(run, name=f"{run.name}-k{k}-features", model=model, optim=optim)
    return trainings(settings, found)


def plan_fig5(settings: Settings) -> list[Training]:
    """Flows of both couplings and the baseline at patch size 2, and the judge."""
    foil = settings.preset("ar", "owt")
    foil = replace(
        foil, name=f"{foil.name}-p2", model=replace(foil.model, patch=2, in_patch="independent")
    )
    mix1 = settings.preset("mix1", "owt")
    runs = {
        "Mix-1, head over the patch": replace(
            mix1, name=f"{mix1.name}-p2", model=replace(mix1.model, patch=2)
        ),
        "Mix-d, in-patch weights": two_tokens(settings, "autoregressive"),
        "Mix-d, independent weights": two_tokens(settings, "independent"),
        "two-token AR": foil,
    }
    return trainings(settings, runs) + states.judge_training(settings)


def two_tokens(settings: Settings, in_patch: Literal["autoregressive", "independent"]) -> RunConfig:
    """Mix-d with two tokens per position, whose weights see the earlier token of the patch, or
    not.
    """
    run = settings.preset("mixd-p2" if settings.scale == "mini" else "mixd", "owt")
    name = run.name if settings.scale == "mini" else f"{run.name}-p2"
    name += "-independent" if in_patch == "independent" else ""
    return replace(run, name=name, model=replace(run.model, patch=2, in_patch=in_patch))


def measure_fig5(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The judge's perplexity of the continuation alone, given the prefix, by model and prefix; real
    text last.
    """
    judge, models = states.judge_of(settings, finished)
    rows: list[Row] = []
    for done in models:
        checkpoint = done.load()
        context, decode = checkpoint.run.model.context, checkpoint.tokenizer.decode
        text = eval_windows(done.tokens(checkpoint), context, PROMPTS)
        for prefix in PREFIXES:
            prompt, what = text[:, :prefix], f" after a prefix of {prefix}"
            found = states.sample(
                done, checkpoint, len(text), context, prompt=prompt, what=what
            ).tokens.cpu()
            row = {"model": done.training.label, "seed": done.training.run.seed}
            rows.append(row | _continued(judge, decode, found, prefix))
    # the models have one test text
    return rows + [
        {"model": "real text"} | _continued(judge, decode, text, prefix) for prefix in PREFIXES
    ]


def _continued(
    judge: Judge, decode: Callable[[list[int]], str], tokens: Tensor, prefix: int
) -> Row:
    before, after = (
        [decode(row) for row in part.tolist()] for part in tokens.tensor_split([prefix], dim=1)
    )
    perplexity = judge.read(after, after=before).perplexity
    return {"prefix": prefix, "perplexity": perplexity, "judge": judge.name}


def table_fig5(rows: Sequence[Row]) -> list[Row]:
    """One row per model and seed, one column per prefix."""
    table: dict[Any, Row] = {}
    for row in rows:
        key = {"model": row["model"], "seed": row.get("seed")}
        table.setdefault(tuple(key.values()), key)[f"prefix {row['prefix']}"] = row["perplexity"]
    return list(table.values())


def draw_fig5(figure: Figure, rows: Sequence[Row]) -> None:
    """Perplexity over the length of the prefix, one line per model."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        curves.setdefault(row["model"], []).append((row["prefix"], row["perplexity"]))
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=name)
    log_scale(axes)
    axes.set(
        xlabel="tokens of real text before the continuation",
        ylabel="perplexity of the continuation",
    )
    axes.legend()


def plan_progressive(settings: Settings) -> list[Training]:
    """The same Mix-d model trained progressively and jointly."""
    progressive = settings.preset("mixd", "text8")
    return trainings(settings, {"progressive": progressive, "joint": joint(progressive)})


def measure_progressive(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Final bound, the curves, and the KL divergence after every block."""
    rows = states.with_curves(settings, finished)
    for row, done in zip(rows, finished, strict=True):
        row |= {
            f"kl after block {state.block}": state.kl.mean for state in states.latents(done)[1:]
        }
    return rows


def plan_patches(settings: Settings) -> list[Training]:
    """Mix-d with in-patch weights and each patch size; all but the patch as with one token at a
    time.
    """
    run = settings.preset("mixd", "text8")
    wider = {
        p: replace(run, name=f"{run.name}-p{p}", model=replace(run.model, patch=p)) for p in PATCHES
    }
    return trainings(
        settings, {"P = 1": run} | {f"P = {p}": patched for p, patched in wider.items()}
    )


def plan_in_patch(settings: Settings) -> list[Training]:
    """Patches of two in a stack whose last block is the deepest: tokens apart in block 1 or
    together, channels mixed or not; and Mix-d with the tokens apart.
    """
    run = (
        preset("mini-mix1-deep-last")
        if settings.scale == "mini"
        else settings.preset("mix1", "text8")
    )
    found = {"Mix-d, tokens apart": two_tokens(settings, "independent")}
    for how in ("together", "apart"):
        for mixed in (True, False):
            first, *upper = as_flow_config(run.model).blocks
            blocks = (replace(first, sees_tokens=how == "together"), *upper)
            model = replace(as_flow_config(run.model), patch=2, blocks=blocks, channel_mix=mixed)
            name = f"{run.name}-p2-{how}{'' if mixed else '-unmixed'}"
            label = (
                f"Mix-1, tokens {how} in block 1, channels {'mixed' if mixed else 'as they are'}"
            )
            found[label] = replace(run, name=name, model=model)
    if settings.scale == "mini":
        found = {label: replace(r, name=f"{r.name}-half") for label, r in found.items()}
    found = {label: states.shortened(settings, r, HALF_STEPS) for label, r in found.items()}
    return trainings(settings, found) + states.judge_training(settings)


def measure_in_patch(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The bound of each model beside what figure 5 measures."""
    judged = {
        (row["model"], row["seed"]): row for row in table_fig5(measure_fig5(settings, finished))
    }
    rows = [states.summary_row(done) for done in finished if done.training.label != "judge"]
    return [row | judged[row["model"], row["seed"]] for row in rows]


def plan_shares(settings: Settings) -> list[Training]:
    """Mix-d with most of its layers in the last block, trained progressively, jointly, and with
    codes that overlap; and block 1 alone, with its layers and with all of the stack's. Block 1 sees
    as many tokens in each.
    """
    run = settings.preset("mixd", "text8")
    layers, K = ((1, 1, 4), 27) if settings.scale == "mini" else ((2, 2, 8), 64)
    blocks, first = stack(("mixd", "mix1", "mix1"), layers, (0, K, K)), run.train.stage_steps[0]
    model = replace(as_flow_config(run.model), blocks=blocks, channel_mix=None)
    steps = replace(run.train, stage_steps=(first, first // 2, first // 2))
    deep = replace(run, name=f"{run.name}-deep-last", model=model, train=steps)
    deep = states.shortened(settings, deep, 2 * HALF_STEPS)
    soft = replace(deep, name=f"{deep.name}-soft", model=replace(model, separation=4.0))
    soft = replace(soft, optim=replace(run.optim, codebook_lr_scale=0.0))
    found = {"progressive": deep, "joint": joint(deep), "progressive, codes 4 sigma apart": soft}
    for count in (layers[0], sum(layers)):
        alone = replace(model, blocks=(replace(blocks[0], layers=count),))
        one = replace(with_blocks(deep, 1), name=f"{run.name}-one-l{count}", model=alone)
        found[f"block 1 alone, {count} layer{'s' * (count > 1)}"] = one
    return trainings(settings, found)


def measure_shares(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The bound, and the nats per token that every block takes off the KL divergence."""
    return [states.summary_row(done) | states.gains(done) for done in finished]


FIG2 = Recipe(
    name="fig2",
    title="Ladder of ablations",
    claim="The paper: every addition improves the model: base (one affine map for all channels of a token), + "
    "channel-wise affine (a minor gain), + Mix-1 (a great one), + Mix-d, + progressive training. (Block 1 sees the "
    "same tokens in all of them; progressive training adds a few steps for the other blocks.)",
    plan=plan_fig2,
    measure=states.with_curves,
    table=states.without_curves,
    draw=states.plot_curves,
    seeds=2,
    clear=(BASE, CHANNELWISE, JOINT),
)

FIG3 = Recipe(
    name="fig3",
    title="Affine against Mix-1, six blocks",
    claim="The paper: with six blocks of two layers, Mix-1 reaches a clearly better bound than affine couplings, in "
    "training and in validation (figures 3 and 8).",
    plan=plan_fig3,
    measure=states.with_curves,
    table=states.without_curves,
    draw=states.plot_curves,
)

FIG4 = Recipe(
    name="fig4",
    title="Mixture components",
    claim="The paper, without a head over channels (the parameters of a channel depend on the positions before): one "
    "component is far worse than any K above 1, and all of those work; on OpenWebText 64 do as well as all 50,257. "
    "The letters of english27 alone, without their order, have 4.12 bits, pairs of neighbours 3.42.",
    plan=plan_fig4,
    hidden=(*RUN_DETAILS, "model", "seed", ""),
    measure=partial(
        states.summaries_by, column="K", value=lambda config: config.blocks[0].components
    ),
    draw=partial(states.plot_over, column="K", label="mixture components K"),
)

FIG5 = Recipe(
    name="fig5",
    title="Two tokens at a time",
    claim="The paper: at patch size 2 the flow's generative perplexity stays good over all prefix lengths; a "
    "baseline that predicts two tokens at once breaks down. (It does not say which coupling the flow has. Its patch "
    "models have a head over all channels of a patch, as Mix-1 has here, which starts from the codebook. Its figure "
    "1 has the tokens of a patch independent in the first blocks. The judge scores the continuation alone.)",
    plan=plan_fig5,
    measure=measure_fig5,
    table=table_fig5,
    draw=draw_fig5,
)

PROGRESSIVE = Recipe(
    name="progressive",
    title="Progressive and joint training",
    claim="The paper: the ablation is best with progressive training. (Block 1 sees as many tokens in both. KL "
    "divergences are in nats per token, to a prior that ends after that block.)",
    plan=plan_progressive,
    measure=measure_progressive,
    table=states.without_curves,
    draw=states.plot_curves,
    seeds=2,
    clear=("joint",),
)

PATCH_SIZES = Recipe(
    name="patches",
    title="Patch size at one depth",
    claim="Patches of several tokens shorten the sequence. What does each size cost? The paper does not say.",
    plan=plan_patches,
    measure=partial(states.summaries_by, column="P", value=lambda config: config.patch),
    draw=partial(states.plot_over, column="P", label="tokens per position P"),
)

IN_PATCH = Recipe(
    name="in-patch",
    title="What recovers a patch",
    claim="The paper: where the first blocks treat the tokens of a patch as independent, later blocks and channel "
    "mixing recover what binds them. Bounds, and what figure 5 measures, in a stack whose last block is the deepest.",
    plan=plan_in_patch,
    measure=measure_in_patch,
)

SHARES = Recipe(
    name="shares",
    title="The paper's shares of layers in Mix-d",
    claim="The paper gives Mix-1 most of its layers in the last block, and for Mix-d no shares. Do the blocks above "
    "a shallow Mix-d block take over what it lacks?",
    plan=plan_shares,
    measure=measure_shares,
    draw=states.plot_models,
)
