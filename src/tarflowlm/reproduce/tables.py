"""Tables 2 and 6 of the paper: likelihood and sample quality of the model families."""

from collections.abc import Sequence
from typing import Any

import torch

from tarflowlm.data import eval_windows
from tarflowlm.evaluation.likelihood import Likelihood, evaluate
from tarflowlm.evaluation.quality import PAPER_SAMPLES, SamplingConfig, TextStatistics, measure_quality
from tarflowlm.presets import preset
from tarflowlm.reproduce.measures import judge_of, judge_training, plot_models, summary_row
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings, without
from tarflowlm.runs.checkpoint import Checkpoint

FAMILIES = {"AR": "ar", "affine": "affine", "Mix-1": "mix1", "Mix-d": "mixd"}
PLAIN = "Mix-1, plain start as in the paper"
MINI_VARIANTS = {PLAIN: "mix1-plain", "Mix-d with two layers more": "mixd-deep"}
"""Beside the families at mini scale, where Mix-1 starts from the codebook."""
PAPER_LIKELIHOOD = {
    "text8": {"AR": 1.23, "affine": 1.54, "Mix-1": 1.37, "Mix-d": 1.30},
    "owt": {"AR": 17.54, "affine": 148.21, "Mix-1": 27.11, "Mix-d": 22.64},
}
"""Bits per character on the test split of TEXT8, perplexity on the validation split of OpenWebText."""
WINDOWS, SAMPLES = 128, 16
"""Windows and posterior samples of the importance-weighted bound."""
SECOND_WINDOWS = 1024

JUDGED_FAMILIES = ("AR", "Mix-1", "Mix-d")
MINI_SAMPLES = 500
PAPER_QUALITY: dict[str, dict[str, float]] = {
    "AR": {"perplexity": 12.1, "MAUVE": 0.76, "entropy": 5.22},
    "Mix-1": {"perplexity": 20.7, "MAUVE": 0.47, "entropy": 5.58},
    "Mix-d": {"perplexity": 14.3, "MAUVE": 0.68, "entropy": 5.13},
    "real text": {"perplexity": 14.7, "MAUVE": 1.0, "entropy": 5.44},
}
"""On OpenWebText, by GPT-2 Large."""


def plan_table2(settings: Settings) -> list[Training]:
    """Every family; at mini scale also two variants of them, at paper scale on both corpora."""
    if settings.scale == "mini":
        kinds = FAMILIES | MINI_VARIANTS
        return trainings(settings, {label: preset(f"mini-{kind}") for label, kind in kinds.items()})
    every = [(label, kind, corpus) for corpus in PAPER_LIKELIHOOD for label, kind in FAMILIES.items()]
    runs = {f"{label}, {corpus}": preset(f"{corpus}-{kind}") for label, kind, corpus in every}
    return trainings(settings, runs)


def measure_table2(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Test likelihood, importance-weighted bound, the likelihood of a second text, and the paper's numbers."""
    rows = []
    for done in finished:
        row, checkpoint = summary_row(done), done.load()
        weighted = _likelihood(done, checkpoint, None, WINDOWS, SAMPLES)
        # over the same windows; the exact value of the baseline
        elbo = weighted.nats_per_token if weighted.elbo is None else weighted.elbo
        row[f"{WINDOWS} windows: bpc"] = weighted.bpc * elbo / weighted.nats_per_token
        row[f"iw-{SAMPLES} bpc"] = weighted.bpc
        if settings.second_text is not None:
            row["second text bpc"] = _likelihood(done, checkpoint, settings.second_text, SECOND_WINDOWS, 1).bpc
        # the family; a deeper model belongs to none
        label = done.training.label.split(",")[0]
        corpora = [done.training.run.name.split("-")[0]] if settings.scale == "paper" else list(PAPER_LIKELIHOOD)
        row |= {f"paper, {corpus}": PAPER_LIKELIHOOD[corpus].get(label) for corpus in corpora}
        rows.append(row)
    return rows


def _likelihood(done: Finished, checkpoint: Checkpoint, source: str | None, windows: int, samples: int) -> Likelihood:
    """The bound over evenly spaced windows of the run's test split, or of the text `source`."""
    some = eval_windows(done.tokens(checkpoint, source), checkpoint.run.model.context, windows)
    text, characters = "test split" if source is None else "second text", checkpoint.tokenizer.characters_per_token
    progress = done.stage(f"windows of the {text}", len(some))
    return evaluate(checkpoint.model, some, torch.from_numpy(characters), samples=samples, progress=progress)


def plan_table6(settings: Settings) -> list[Training]:
    """The three families that the paper judges, and the judge."""
    runs = {label: settings.preset(FAMILIES[label], "owt") for label in JUDGED_FAMILIES}
    return trainings(settings, runs) + judge_training(settings)


def measure_table6(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Quality of samples of each model and of real text, and the paper's numbers."""
    judge, models = judge_of(settings, finished)
    config = SamplingConfig(num=MINI_SAMPLES if settings.scale == "mini" else PAPER_SAMPLES)
    rows: list[Row] = []
    for done in models:
        checkpoint = done.load()
        text = eval_windows(done.tokens(checkpoint), checkpoint.run.model.context, config.num)
        options: dict[str, Any] = {"trained_on": checkpoint.run.data.source, "progress": done.progress}
        result = measure_quality(checkpoint.model, checkpoint.tokenizer, judge, text, config, **options)
        rows.append(_quality_row(done.training.label, done.training.run.seed, result.samples, result.mauve))
    rows.append(_quality_row("real text", None, result.text, None))
    how = f"{config.num} samples of {result.length} tokens, decoder auto, {result.dtype}, temperature 1, seed 0"
    return [row | {"judge": judge.name, "samples": how} for row in rows]


def _quality_row(label: str, seed: int | None, s: TextStatistics, mauve: float | None) -> Row:
    row = {"model": label, "seed": seed, "perplexity": s.perplexity, "MAUVE": mauve, "entropy": s.entropy}
    row |= {"word entropy": s.word_entropy, "distinct 2-grams": s.distinct_2, "repeated 4-grams": s.repetition}
    return row | {f"paper, {name}": value for name, value in PAPER_QUALITY[label].items()}


TABLE2 = Recipe(
    name="table2",
    title="Likelihood of the families",
    claim="The paper: bits per character on TEXT8 (AR 1.23, Mix-d 1.30, Mix-1 1.37, affine 1.54) and perplexity "
    "on OpenWebText (17.54, 22.64, 27.11, 148.21) put the families in the order Mix-d, Mix-1, affine, all "
    "above the baseline. (All models have the same number of Transformer layers, except the one with two more.)",
    plan=plan_table2,
    measure=measure_table2,
    draw=plot_models(label="bits per character (bounds, AR exact)"),
    seeds=2,
    clear=(PLAIN,),
)

TABLE6 = Recipe(
    name="table6",
    title="Sample quality",
    claim="The paper: on OpenWebText, judged by GPT-2 Large, Mix-d comes close to the baseline and to real text in "
    "perplexity, MAUVE and entropy; Mix-1 less so.",
    plan=plan_table6,
    measure=measure_table6,
    table=without("judge", "samples"),
    needs=(("mauve", "quality"),),
    draw=plot_models("perplexity", "generative perplexity"),
    text=lambda _settings, _finished, rows: f"Judge {rows[0]['judge']}; {rows[0]['samples']}.\n",
)
