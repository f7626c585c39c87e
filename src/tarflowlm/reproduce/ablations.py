"""Figures 2 to 5 of the paper (ladder, couplings, components, two tokens at a time), and three open questions:
progressive training over time, patch sizes, and a single Mix-1 block."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from tarflowlm.config import RunConfig, as_flow_config, stack
from tarflowlm.data import eval_windows
from tarflowlm.presets import PLAIN_CODEBOOK
from tarflowlm.report.records import RunRecord, read_record
from tarflowlm.report.style import Figure
from tarflowlm.reproduce import states
from tarflowlm.reproduce.recipe import RUN_DETAILS, Finished, Recipe, Row, Settings, Training, trainings

BASE, CHANNELWISE = "base", "+ channel-wise"
SIX = 6
COMPONENTS = (1, 2, 4, 8, 16, 27)
ALONE, HEAD, STARTED = "features alone", "with the channels before", "with them, start from the codebook"
HEADS: dict[str, tuple[str, dict[str, Any]]] = {ALONE: ("-features", {"sees_channels": False, "start": "plain"})}
HEADS |= {HEAD: ("-plain", {"start": "plain"}), STARTED: ("", {})}
"""Figure 4: inputs of the parameters of a channel -> suffix of the run, fields of its blocks."""
PREFIXES, PROMPTS = (0, 16, 64, 128), 32  # tokens of real text before a continuation, number of continuations
MINI_BOUND, PAPER_BOUND = 2.1, 1.4  # bits per character of the training text, seen once at most at mini scale
AVERAGED, POINTS = 5, 8  # lines of metrics.jsonl averaged in a point of the curve; evenly spaced points of it
PATCHES = (2, 4, 8)
FEW_COMPONENTS = (2, 3, 4)


def plan_fig2(settings: Settings) -> list[Training]:
    """The five rungs of the ladder."""
    affine, progressive = settings.preset("affine", "owt"), settings.preset("mixd", "owt")
    model = as_flow_config(affine.model).each_block(coupling="token-affine")
    base = replace(affine, name=affine.name.replace("affine", "base"), model=model)
    ladder = {BASE: base, CHANNELWISE: affine, "+ Mix-1": settings.preset("mix1", "owt")}
    return trainings(settings, ladder | {"+ Mix-d": joint(progressive), "+ progressive": progressive})


def joint(progressive: RunConfig) -> RunConfig:
    """The same number of steps, each of which trains all blocks."""
    train = replace(progressive.train, mode="joint", stage_steps=(sum(progressive.train.stage_steps),))
    return replace(progressive, name=f"{progressive.name}-joint", train=train)


def plan_fig3(settings: Settings) -> list[Training]:
    """Six affine blocks and six Mix-1 blocks."""
    return trainings(settings, {"affine": _six_blocks(settings, "affine"), "Mix-1": _six_blocks(settings, "mix1")})


def _six_blocks(settings: Settings, coupling: Literal["affine", "mix1"]) -> RunConfig:
    """Six blocks of two layers; of one layer at mini scale, the depth of the baseline."""
    run = settings.preset(coupling, "owt")
    before = as_flow_config(run.model)
    first, upper = before.blocks[0], before.blocks[-1]
    layers = (1 if settings.scale == "mini" else 2,) * SIX
    blocks = stack((coupling,) * SIX, layers, (first.components, *(upper.components,) * (SIX - 1)))
    model = replace(before, blocks=blocks).each_block(start=first.start)
    return states.shortened(settings, replace(run, name=f"{run.name}-six", model=model))


def plan_fig4(settings: Settings) -> list[Training]:
    """Mix-1 with each number of components: without the channels before, as in the paper, and with them."""
    runs = [_components(settings, k, variant) for variant in (ALONE, HEAD) for k in COMPONENTS]
    if settings.scale == "mini":
        # the paper's presets have no such start
        runs.append(_components(settings, COMPONENTS[-1], STARTED))
    return trainings(settings, dict(runs))


def _components(settings: Settings, components: int, variant: str) -> tuple[str, RunConfig]:
    """Label and run: Mix-1 with K components in every block, the learning rate of the codebook the same for all."""
    run, (suffix, fields) = settings.preset("mix1", "text8"), HEADS[variant]
    model = as_flow_config(run.model).each_block(components=components, **fields)
    optim = replace(run.optim, codebook_lr_scale=PLAIN_CODEBOOK)
    run = replace(run, name=f"{run.name}-k{components}{suffix}", model=model, optim=optim)
    return f"K = {components}, {variant}", states.shortened(settings, run)


def measure_fig4(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The runs' own measurements by K and by the inputs of the parameters of a channel."""
    rows = states.summaries_by(settings, finished, column="K", value=lambda config: config.blocks[0].components)
    return [row | {"head": row["model"].partition(", ")[2]} for row in rows]


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
    return trainings(settings, runs) + states.judge_training(settings)


def two_tokens(settings: Settings, in_patch: Literal["autoregressive", "independent"]) -> RunConfig:
    """Mix-d with two tokens per position, whose weights see the earlier token of the patch, or not."""
    run = settings.preset("mixd-p2" if settings.scale == "mini" else "mixd", "owt")
    name = run.name if settings.scale == "mini" else f"{run.name}-p2"
    name += "-independent" if in_patch == "independent" else ""
    return replace(run, name=name, model=replace(run.model, patch=2, in_patch=in_patch))


def measure_fig5(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Perplexity under the judge of prefix and continuation, by model and prefix; real text last."""
    judge, models = states.judge_of(settings, finished)
    rows: list[Row] = []
    for done in models:
        checkpoint = done.load()
        context, tokenizer = checkpoint.run.model.context, checkpoint.tokenizer
        text = eval_windows(done.tokens(checkpoint), context, PROMPTS)
        for prefix in PREFIXES:
            prompt, what = text[:, :prefix], f" after a prefix of {prefix}"
            found = states.sample(done, checkpoint, len(text), context, prompt=prompt, what=what)
            judged = judge.read([tokenizer.decode(row) for row in found.tokens.tolist()])
            row = {"model": done.training.label, "seed": done.training.run.seed, "prefix": prefix}
            rows.append(row | {"perplexity": judged.perplexity, "judge": judge.name})
        real = judge.read([tokenizer.decode(row) for row in text.tolist()]).perplexity
    rows += [{"model": "real text", "prefix": prefix, "perplexity": real, "judge": judge.name} for prefix in PREFIXES]
    return rows


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
    _plot_lines(figure, curves, "tokens of real text before the continuation", "generative perplexity")


def _plot_lines(figure: Figure, curves: Mapping[str, Sequence[tuple[int, float]]], x_name: str, y_name: str) -> None:
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=name)
    axes.set(xlabel=x_name, ylabel=y_name)
    axes.legend()


def plan_progressive(settings: Settings) -> list[Training]:
    """The same Mix-d model trained progressively and jointly."""
    progressive = settings.preset("mixd", "text8")
    return trainings(settings, {"progressive": progressive, "joint": joint(progressive)})


def training_curve(record: RunRecord) -> dict[int, float]:
    """Step -> training bound in bits per character, averaged over the last `AVERAGED` lines up to that step."""
    steps, values = record.train["step"], record.train["bpc"]
    ends = range(min(AVERAGED, len(values)), len(values) + 1)
    return {int(steps[end - 1]): float(values[max(0, end - AVERAGED) : end].mean()) for end in ends}


def measure_progressive(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Final bound, steps to a given training bound, KL divergence after every block, and the training curve."""
    bound = MINI_BOUND if settings.scale == "mini" else PAPER_BOUND
    rows = []
    for done in finished:
        curve = training_curve(read_record(done.directory))
        reached = next((step for step, bpc in curve.items() if bpc <= bound), None)
        row = states.summary_row(done) | {f"steps to {bound}": reached}
        row |= {f"kl after block {state.block}": state.kl.mean for state in states.latents(done)[1:]}
        for place in range(1, POINTS + 1):
            goal = place * done.training.run.train.num_steps / POINTS
            _, step = min((abs(step - goal), step) for step in curve)
            row[f"bpc at {step:,}"] = curve[step]
        rows.append(row)
    return rows


def draw_progressive(figure: Figure, rows: Sequence[Row]) -> None:
    """The training curves."""
    curves = {}
    for row in rows:
        points = [(int(name[7:].replace(",", "")), bpc) for name, bpc in row.items() if name.startswith("bpc at ")]
        curves[f"{row['model']}, seed {row['seed']}"] = points
    _plot_lines(figure, curves, "optimiser steps", "training bits per character, <=")


def plan_patches(settings: Settings) -> list[Training]:
    """Mix-d with in-patch weights and each patch size; all but the patch as with one token at a time."""
    run = settings.preset("mixd", "text8")
    wider = {p: replace(run, name=f"{run.name}-p{p}", model=replace(run.model, patch=p)) for p in PATCHES}
    return trainings(settings, {"P = 1": run} | {f"P = {p}": patched for p, patched in wider.items()})


def plan_one_block(settings: Settings) -> list[Training]:
    """One Mix-1 block with each number of components."""
    return trainings(settings, {f"K = {k}": _one_block(settings, k) for k in FEW_COMPONENTS})


def _one_block(settings: Settings, components: int) -> RunConfig:
    """One Mix-1 block with all layers of the three."""
    run = settings.preset("mix1", "text8")
    before = as_flow_config(run.model)
    layers = (sum(block.layers for block in before.blocks),)
    model = replace(before, blocks=stack(("mix1",), layers, (components,)))
    optim = replace(run.optim, codebook_lr_scale=PLAIN_CODEBOOK)
    return states.shortened(settings, replace(run, name=f"{run.name}-one-k{components}", model=model, optim=optim))


FIG2 = Recipe(
    name="fig2", title="Ladder of ablations",
    claim="The paper: every addition improves the model: base (one affine map for all channels of a token), + "
    "channel-wise affine, + Mix-1, + Mix-d, + progressive training.",
    plan=plan_fig2, measure=states.summaries, draw=states.plot_models, seeds=2, clear=(BASE, CHANNELWISE),
)  # fmt: skip

FIG3 = Recipe(
    name="fig3", title="Affine against Mix-1, six blocks",
    claim="The paper: with six blocks of two layers, Mix-1 reaches a clearly better bound than affine couplings.",
    plan=plan_fig3, measure=states.summaries, draw=states.plot_models,
)  # fmt: skip

FIG4 = Recipe(
    name="fig4", title="Mixture components",
    claim="The paper, without a head over channels: K = 1 is far worse than any K above 1, and all of those work. "
    f'("{ALONE}" is that model: the parameters of a channel depend on the positions before. With the head they also '
    "see the channels before it.)",
    plan=plan_fig4, measure=measure_fig4, hidden=(*RUN_DETAILS, "model", "seed", ""),
    draw=partial(states.plot_over, column="K", label="mixture components K", series="head"),
)  # fmt: skip

FIG5 = Recipe(
    name="fig5", title="Two tokens at a time",
    claim="The paper: at patch size 2 the flow's generative perplexity stays good over all prefix lengths; a "
    "baseline that predicts two tokens at once breaks down. (It does not say which coupling the flow has. Its patch "
    "models have a head over all channels of a patch, as Mix-1 has here; its figure 1 has the tokens of a patch "
    "independent in the first blocks.)",
    plan=plan_fig5, measure=measure_fig5, table=table_fig5, draw=draw_fig5,
)  # fmt: skip

PROGRESSIVE = Recipe(
    name="progressive", title="Progressive and joint training",
    claim="The paper: the ablation is best with progressive training. (KL divergences are in nats per token, to a "
    "prior that ends after that block. A training step of the first block alone costs less than a joint step.)",
    plan=plan_progressive, measure=measure_progressive, draw=draw_progressive, seeds=2,
)  # fmt: skip

PATCH_SIZES = Recipe(
    name="patches", title="Patch size at one depth",
    claim="Patches of several tokens shorten the sequence. What does each size cost? The paper does not say.",
    plan=plan_patches, measure=partial(states.summaries_by, column="P", value=lambda config: config.patch),
    draw=partial(states.plot_over, column="P", label="tokens per position P"),
)  # fmt: skip

ONE_BLOCK = Recipe(
    name="one-block", title="One Mix-1 block with few components",
    claim="In the paper any K above 1 works in three blocks, without a head over channels. Are two to four "
    "components enough in one, with that head?",
    plan=plan_one_block, measure=states.summaries, draw=states.plot_models,
)  # fmt: skip
