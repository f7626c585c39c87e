"""Figure 5 of the paper, two tokens at a time; patch sizes; and how a stack recovers a patch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from reproduction import measures, tables
from reproduction.ablations import HALF_STEPS
from reproduction.judges import Judge
from reproduction.plots import plot_models, plot_over
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
from reproduction.settings import Corpus, Settings, as_flow_config
from tarflowlm.config import RunConfig
from tarflowlm.data import eval_windows
from tarflowlm.model_config import InPatch, Mix1, MixD
from tarflowlm.presets import preset
from tarflowlm_apps.report.style import SMALL, Figure, log_scale

PREFIXES = (0, 16, 64, 128)  # tokens of real text before a continuation
SIZES = (2, 4, 8)  # tokens per position, next to one
SHOWN_QUALITY = ("perplexity", "perplexity ±", "MAUVE", "entropy")
HEAD = "head over the patch"
TOGETHER, APART = "Mix-d, in-patch weights", "Mix-d, independent weights"
PROMPTS = 32  # continuations of each model and prefix


def plan_fig5(settings: Settings) -> list[Training]:
    """Flows of both couplings and the baseline at patch sizes 1 and 2, and the judge."""
    foil = settings.preset("ar", "owt")
    mix1 = settings.preset("mix1", "owt")
    one_way = variant(mix1, "one-way", alternate=False)
    runs = {
        "AR": foil,
        "Mix-1": mix1,
        "Mix-1, left to right": one_way,
        "Mix-d": settings.preset("mixd", "owt"),
        f"Mix-1, {HEAD}": variant(mix1, "p2", patch=2),
        f"Mix-1, left to right, {HEAD}": variant(one_way, "p2", patch=2),
        TOGETHER: two_tokens(settings, "autoregressive", "owt"),
        APART: two_tokens(settings, "independent", "owt"),
        "two-token AR": variant(foil, "p2", patch=2, in_patch="independent"),
    }
    return trainings(settings, runs) + measures.judge_training(settings)


def two_tokens(settings: Settings, in_patch: InPatch, corpus: Corpus) -> RunConfig:
    """Mix-d with two tokens per position, whose weights see the earlier token, or not."""
    if settings.scale == "mini":
        run = preset("mini-mixd-p2")
    else:
        run = variant(settings.preset("mixd", corpus), "p2", patch=2)
    if in_patch == "autoregressive":
        return run
    first, *others = as_flow_config(run.model).blocks
    assert isinstance(first, MixD)
    return variant(run, in_patch, blocks=(replace(first, in_patch=in_patch), *others))


def measure_fig5(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The judge's perplexity of the continuation alone, by model and prefix; real text last."""
    judge, models = measures.judge_of(settings, finished)
    rows = [
        measures.first_columns(done) | row
        for done in models
        for row in done.measured("continuations", partial(_continuations, done, judge))
    ]
    # the models have one test text
    some = models[0]
    of_text = some.measured("judged text", partial(_judged_text, some, judge))
    return rows + [{"model": "real text"} | row for row in of_text]


def _continuations(done: Finished, judge: Callable[[], Judge]) -> list[Row]:
    checkpoint = done.load()
    context = checkpoint.run.model.context
    text = eval_windows(done.tokens(checkpoint), context, PROMPTS)
    rows = []
    for prefix in PREFIXES:
        found = measures.sample(
            done,
            checkpoint,
            len(text),
            context,
            prompt=text[:, :prefix],
            what=f" after a prefix of {prefix}",
        )
        rows.append(_continued(judge(), checkpoint.tokenizer.decode, found.tokens.cpu(), prefix))
    return rows


def _judged_text(done: Finished, judge: Callable[[], Judge]) -> list[Row]:
    checkpoint = done.load()
    text = eval_windows(done.tokens(checkpoint), checkpoint.run.model.context, PROMPTS)
    decode = checkpoint.tokenizer.decode
    return [_continued(judge(), decode, text, prefix) for prefix in PREFIXES]


def _continued(
    judge: Judge, decode: Callable[[list[int]], str], tokens: Tensor, prefix: int
) -> Row:
    before = [decode(row) for row in tokens[:, :prefix].tolist()]
    after = [decode(row) for row in tokens[:, prefix:].tolist()]
    judged = judge.read(after, before=before)
    return {
        "prefix": prefix,
        "perplexity": judged.perplexity,
        "perplexity ±": judged.perplexity_error,
    }


def table_fig5(rows: Sequence[Row]) -> list[Row]:
    """One row per model and seed, one column per prefix."""
    table: dict[tuple[str, int | None], Row] = {}
    for row in rows:
        seed = row.get("seed")
        of_model = table.setdefault((row["model"], seed), {"model": row["model"], "seed": seed})
        of_model[f"prefix {row['prefix']}"] = row["perplexity"]
    return list(table.values())


def draw_fig5(figure: Figure, rows: Sequence[Row]) -> None:
    """Perplexity over the length of the prefix with its standard error, one line per model."""
    axes = figure.subplots()
    for name in dict.fromkeys(row["model"] for row in rows):
        # the table has every seed
        points = [row for row in rows if row["model"] == name and not row.get("seed")]
        axes.errorbar(
            [row["prefix"] for row in points],
            [row["perplexity"] for row in points],
            [row["perplexity ±"] for row in points],
            marker="o",
            markersize=4,
            capsize=2,
            label=name,
        )
    log_scale(axes)
    axes.set(
        xlabel="tokens of real text before the continuation",
        ylabel="perplexity of the continuation",
    )
    # long enough to show dashes
    figure.legend(loc="outside lower center", ncols=3, fontsize=SMALL, handlelength=4)


def plan_patches(settings: Settings) -> list[Training]:
    """Mix-d with in-patch weights and each patch size, else as with one token; and the judge."""
    run = settings.preset("mixd", "text8")
    runs = {"P = 1": run} | {f"P = {p}": variant(run, f"p{p}", patch=p) for p in SIZES}
    return trainings(settings, runs) + measures.judge_training(settings)


def measure_patches(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The bound, and the sample quality of table 6."""
    judge, models = measures.judge_of(settings, finished)
    rows = []
    for done in models:
        quality = tables.quality_of(settings, done, judge)
        own = {name: quality["samples"][name] for name in SHOWN_QUALITY}
        patch = as_flow_config(done.training.run.model).patch
        rows.append({"P": patch} | measures.summary_row(done) | own)
    return rows


def plan_in_patch(settings: Settings) -> list[Training]:
    """Patches of two in a stack whose last block is the deepest, and Mix-d with the tokens apart.

    In the stack either every block sees all channels of the patch, or the last block, which writes
    first, or all blocks see groups of d channels. A group is a token or, with mixed channels, has
    channels of both tokens. Mix-d, whose block 1 writes last, has the other order, at full length.
    """
    run = settings.preset("mix1", "text8")
    found = {}
    for name, apart, is_mixed in (
        ("together", (), False),
        ("apart in block 3", (2,), False),
        ("apart in all blocks", (0, 1, 2), False),
        ("in groups of mixed channels", (0, 1, 2), True),
    ):
        blocks = tuple(
            replace(block, sees_tokens=index not in apart)
            for index, block in enumerate(as_flow_config(run.model).blocks)
            if isinstance(block, Mix1)
        )
        suffix = f"p2-{name.replace(',', '').replace(' ', '-')}"
        found[f"Mix-1, {name}"] = variant(run, suffix, patch=2, blocks=blocks, channel_mix=is_mixed)
    if settings.scale == "mini":
        found = {label: variant(r, "quarter") for label, r in found.items()}
    found = {label: measures.shortened(settings, r, HALF_STEPS // 2) for label, r in found.items()}
    found[TOGETHER] = two_tokens(settings, "autoregressive", "text8")
    found[APART] = two_tokens(settings, "independent", "text8")
    return trainings(settings, found) + measures.judge_training(settings)


def measure_in_patch(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The bound of each model beside the measures of figure 5, and the gains of stacked blocks."""
    table = table_fig5(measure_fig5(settings, finished))
    judged = {(row["model"], row["seed"]): row for row in table}
    rows = []
    for done in finished:
        label, seed = done.training.label, done.training.run.seed
        if label != "judge":
            row = measures.summary_row(done) | judged[label, seed]
            rows.append(row if label in (TOGETHER, APART) else row | measures.gains(done))
    return rows


FIG5 = Recipe(
    name="fig5",
    title="Two tokens at a time",
    claim=(
        "The paper: at patch size 2 the flow's generative perplexity stays good over all prefix "
        "lengths; a baseline that predicts two tokens at once breaks down. (It does not say which"
        " coupling the flow has. Its patch models have a head over all channels of a patch, as "
        "Mix-1 has here. Its figure 1 has the tokens of a patch "
        "independent in the first blocks. The judge scores the continuation alone. The first four "
        "models have one token per position. Where the directions of Mix-1 alternate, the blocks "
        "above block 1 do not see the prefix, so only prefix 0 tests it; from left to right every "
        "block sees it.)"
    ),
    plan=plan_fig5,
    measure=measure_fig5,
    table=table_fig5,
    draw=draw_fig5,
)

PATCH_SIZES = Recipe(
    name="patches",
    title="Patch size at one depth",
    claim=(
        "Patches of several tokens shorten the sequence. What does each size cost, in bits and in "
        "the quality of samples? The paper does not say."
    ),
    plan=plan_patches,
    measure=measure_patches,
    draw=partial(plot_over, column="P", label="tokens per position P"),
)

IN_PATCH = Recipe(
    name="in-patch",
    title="What recovers a patch",
    claim=(
        "The paper (figure 1): where blocks treat the tokens of a patch as independent, later "
        "blocks and channel mixing recover what binds them. Bounds, and what figure 5 measures, "
        "in a stack of 1, 1 and 4 layers, whose last block writes first: where it sees all "
        "channels of the patch, nothing is left to recover. Last, Mix-d, whose block 1 writes "
        "last. (Blocks above block 1 do not see the prefix. The block that does most of the work "
        "([lottery](lottery.md)) is the language model. At mini size Mix-1 has a quarter of the "
        "steps and 1,024 test windows, Mix-d all steps and 4,096.)"
    ),
    plan=plan_in_patch,
    measure=measure_in_patch,
    table=partial(without, columns=(*RUN_DETAILS, "prefix 16", "prefix 64")),
    draw=partial(plot_models, label="bits per character (bounds)"),
    seeds=2,
    clear=(TOGETHER, APART),
)
