"""Measurements that several recipes share."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tarflowlm.data import TokenArray, eval_windows
from tarflowlm.evaluation.judges import PAPER_JUDGES, Judge, load_judge
from tarflowlm.evaluation.likelihood import Likelihood, evaluate
from tarflowlm.evaluation.quality import Quality, SamplingConfig, measure_quality
from tarflowlm.report.style import COLOURS, SMALL, Axes, Figure
from tarflowlm.reproduce.recipe import Finished, Row, Settings, Training
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.runs.config import RunConfig
from tarflowlm.runs.presets import mini_ar, with_steps

SIGNS = {"exact": "="}
JUDGE_STEPS = 1300
SHORT_STEPS, SHORT_WINDOWS = 300, 1024
"""Of the mini trainings whose order shows early."""


def summary_row(done: Finished) -> Row:
    """What the run itself measured on its test split."""
    summary = done.summary
    test = summary["test"]
    return {
        "model": done.training.label,
        "seed": summary["seed"],
        "": SIGNS.get(test["bound"], "<="),
        "test bpc": test["bpc"],
        "ppl": test["ppl"],
        "stderr, nats": test["stderr"],
        "tokens seen": summary["tokens"],
        "seconds": summary["seconds"],
    }


def summaries(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """A recipe's rows where the runs themselves measured all of them."""
    return [summary_row(done) for done in finished]


def likelihood(
    checkpoint: Checkpoint,
    tokens: TokenArray,
    *,
    windows: int,
    samples: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Likelihood:
    """The bound over some evenly spaced fresh contexts."""
    tokenizer = checkpoint.tokenizer
    return evaluate(
        checkpoint.model,
        eval_windows(tokens, checkpoint.run.model.context, windows),
        torch.from_numpy(tokenizer.characters_per_token),
        samples=samples,
        progress=progress,
    )


def short(run: RunConfig) -> RunConfig:
    """A mini run cut to fewer steps and a smaller test."""
    run = with_steps(run, SHORT_STEPS)
    return replace(run, train=replace(run.train, test_windows=SHORT_WINDOWS))


def judge_training(settings: Settings) -> list[Training]:
    """The judge of the mini scale: the baseline on another text. The paper's judge needs no training."""
    if settings.scale == "paper":
        return []
    run = settings.adapt(with_steps(mini_ar(), JUDGE_STEPS))
    run = replace(run, name="judge", data=replace(run.data, source=settings.judge_data))
    return [Training("judge", run, "judge")]


def judge_of(settings: Settings, finished: Sequence[Finished]) -> tuple[Judge, list[Finished]]:
    """The judge, and the trainings that are to be judged."""
    if settings.scale == "paper":
        return load_judge(PAPER_JUDGES[0], settings.device), list(finished)
    [judge] = [done for done in finished if done.training.label == "judge"]
    return load_judge(str(judge.directory), settings.device), [d for d in finished if d is not judge]


def quality(done: Finished, judge: Judge, *, num: int) -> Quality:
    checkpoint = done.load()
    text = eval_windows(done.tokens(checkpoint), checkpoint.run.model.context, num)
    source = checkpoint.run.data.source
    config = SamplingConfig(num=num)
    return measure_quality(
        checkpoint.model,
        checkpoint.tokenizer,
        judge,
        text,
        config,
        trained_on=source,
        progress=lambda what, at, total: done.counting(what)(at, total),
    )


def bits_by(figure: Figure, rows: Sequence[Row], column: str, label: str) -> None:
    """Test bits per character over a column of whole numbers, on a logarithmic axis."""
    axes, places = figure.subplots(), sorted({row[column] for row in rows})
    for place in places:
        _points(axes, place, [row["test bpc"] for row in rows if row[column] == place])
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.margins(x=0.12, y=0.1)
    axes.set_xlabel(label)
    axes.set_ylabel("bits per character, <=")


def dots(figure: Figure, rows: Sequence[Row], value: str, *, unit: str) -> None:
    """One dot per seed for every model, in the order of the rows."""
    axes = figure.subplots()
    labels = list(dict.fromkeys(row["model"] for row in rows))
    for place, label in enumerate(labels):
        _points(axes, place, [row[value] for row in rows if row["model"] == label])
    axes.set_xticks(range(len(labels)), labels)
    axes.margins(x=0.2, y=0.1)
    axes.set_ylabel(unit)


def _points(axes: Axes, x: int, values: Sequence[float]) -> None:
    """Dots of all seeds, with the value beside them, or their mean."""
    axes.plot([x] * len(values), values, "o", color=COLOURS[0])
    mean = sum(values) / len(values)
    text = f"{mean:.3f}" if len(values) == 1 else f"mean {mean:.3f}"
    axes.annotate(text, (x, mean), xytext=(6, 0), textcoords="offset points", va="center", fontsize=SMALL)
