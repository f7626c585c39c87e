"""Table 6: sample quality."""

from collections.abc import Sequence
from typing import Any

from tarflowlm.evaluation.quality import PAPER_SAMPLES, TextStatistics
from tarflowlm.reproduce.measures import dots, judge_of, judge_training, quality
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings
from tarflowlm.runs.presets import preset

MINI_SAMPLES = 500
PAPER: dict[str, dict[str, float]] = {
    "AR": {"perplexity": 12.1, "MAUVE": 0.76, "entropy": 5.22},
    "Mix-1": {"perplexity": 20.7, "MAUVE": 0.47, "entropy": 5.58},
    "Mix-d": {"perplexity": 14.3, "MAUVE": 0.68, "entropy": 5.13},
    "real text": {"perplexity": 14.7, "MAUVE": 1.0, "entropy": 5.44},
}
"""On OpenWebText, by GPT-2 Large."""


def plan(settings: Settings) -> list[Training]:
    prefix = "mini" if settings.scale == "mini" else "owt"
    runs = {
        label: preset(f"{prefix}-{kind}") for label, kind in {"AR": "ar", "Mix-1": "mix1", "Mix-d": "mixd"}.items()
    }
    return trainings(settings, runs) + judge_training(settings)


def measure(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    judge, models = judge_of(settings, finished)
    num = MINI_SAMPLES if settings.scale == "mini" else PAPER_SAMPLES
    rows: list[Row] = []
    for done in models:
        result = quality(done, judge, num=num)
        seed = done.training.run.seed
        rows.append(_row(done.training.label, seed, result.samples, result.mauve))
    rows.append(_row("real text", None, result.text, None))
    how = f"{num} samples of {result.length} tokens, decoder auto, {result.dtype}, temperature 1, seed 0"
    return [row | {"judge": judge.name, "samples": how} for row in rows]


def _row(label: str, seed: int | None, s: TextStatistics, mauve: float | None) -> dict[str, Any]:
    row = {"model": label, "seed": seed, "perplexity": s.perplexity, "MAUVE": mauve, "entropy": s.entropy}
    row |= {"word entropy": s.word_entropy, "distinct 2-grams": s.distinct_2, "repeated 4-grams": s.repetition}
    return row | {f"paper, {name}": value for name, value in PAPER[label].items()}


RECIPE = Recipe(
    name="table6",
    title="Sample quality",
    claim="The paper: on OpenWebText, judged by GPT-2 Large, Mix-d comes close to the baseline and to real text in "
    "perplexity, MAUVE and entropy; Mix-1 less so.",
    plan=plan,
    measure=measure,
    needs=(("mauve", "quality"),),
    draw=lambda figure, rows: dots(figure, rows, "perplexity", unit="generative perplexity"),
)
