"""Measurements and plots that several recipes share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from textwrap import fill
from typing import Any

import torch
from torch import Tensor

from tarflowlm.config import FlowConfig, RunConfig, as_flow_config
from tarflowlm.data import eval_windows
from tarflowlm.evaluation.blocks import StateReport, latent_report
from tarflowlm.evaluation.judges import PAPER_JUDGES, Judge, load_judge
from tarflowlm.evaluation.likelihood import sign_of
from tarflowlm.generation import Generation, Watch, generate
from tarflowlm.generation.writing import num_positions
from tarflowlm.model import as_flow
from tarflowlm.presets import mini_ar, with_steps
from tarflowlm.report.style import COLOURS, SMALL, Axes, Figure
from tarflowlm.reproduce.recipe import Draw, Finished, Measure, Row, Settings, Training
from tarflowlm.runs.checkpoint import Checkpoint

JUDGE_STEPS = 1300
SHORT_STEPS, SHORT_WINDOWS = 300, 1024
"""Steps and test windows of mini trainings whose ranking shows early."""
DEEPEST_LAST = "Mix-1, plain start, last block deepest"
"""Label of `mini-passes`."""
LATENT_WINDOWS = 256
"""Windows whose states are measured."""


def summary_row(done: Finished) -> Row:
    """The run's own measurement on its test split."""
    summary, test = done.summary, done.summary["test"]
    row: Row = {"model": done.training.label, "seed": summary["seed"], "": sign_of(test["bound"])}
    row |= {"test bpc": test["bpc"], "ppl": test["ppl"], "stderr, nats": test["stderr"]}
    return row | {"tokens seen": summary["tokens"], "seconds": summary["seconds"]}


def summaries(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The rows of a recipe that needs only the runs' own measurements."""
    return [summary_row(done) for done in finished]


def summaries_by(column: str, value: Callable[[FlowConfig], int]) -> Measure:
    """`summaries` of flows with a number of their configuration as the first column."""

    def measure(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
        return [{column: value(as_flow_config(done.training.run.model)), **summary_row(done)} for done in finished]

    return measure


def sample(
    done: Finished, checkpoint: Checkpoint, num: int, length: int, *, prompt: Tensor | None = None, what: str = ""
) -> Generation:
    """`num` samples of `length` tokens, some given by `prompt` [num, T], by the decoder auto; the noise of seed 0."""
    progress = done.stage(f"sampling{what}, positions", num_positions(checkpoint.model, length))
    generator, watch = torch.Generator().manual_seed(0), Watch(progress)
    options: dict[str, Any] = {"generator": generator, "decoder": "auto", "watch": watch}
    return generate(checkpoint.model, num_tokens=length, num=num, prompt=prompt, **options)


def share(is_so: Tensor) -> float:
    """The share of a tensor's entries that are true."""
    return is_so.cpu().double().mean().item()


def latents(done: Finished) -> list[StateReport]:
    """The states of a flow on `LATENT_WINDOWS` evenly spaced windows of its test split."""
    checkpoint = done.load()
    windows = eval_windows(done.tokens(checkpoint), checkpoint.run.model.context, LATENT_WINDOWS)
    return latent_report(as_flow(checkpoint.model), windows, progress=done.stage("latents of windows", len(windows)))


def shortened(settings: Settings, run: RunConfig) -> RunConfig:
    """At mini scale the run with fewer steps and a smaller test."""
    if settings.scale == "paper":
        return run
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
    """The judge, and the trainings that it judges."""
    if settings.scale == "paper":
        return load_judge(PAPER_JUDGES[0], settings.device), list(finished)
    [judge] = [done for done in finished if done.training.label == "judge"]
    return load_judge(str(judge.directory), settings.device), [d for d in finished if d is not judge]


def plot_over(column: str, label: str, series: str | None = None) -> Draw:
    """Test bits per character over a column of whole numbers, on a logarithmic axis; a colour per `series`."""

    def draw(figure: Figure, rows: Sequence[Row]) -> None:
        axes, places = figure.subplots(), sorted({row[column] for row in rows})
        names = list(dict.fromkeys(row[series] for row in rows)) if series is not None else [None]
        for name, colour in zip(names, COLOURS, strict=False):
            of_name = [row for row in rows if series is None or row[series] == name]
            for place in sorted({row[column] for row in of_name}):
                _plot_seeds(axes, place, [row["test bpc"] for row in of_name if row[column] == place], colour)
            if name is not None:
                axes.plot([], [], "o", color=colour, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.margins(x=0.12, y=0.1)
        axes.set_xlabel(label)
        axes.set_ylabel("bits per character, <=")
        if series is not None:
            axes.legend()

    return draw


def plot_models(column: str = "test bpc", label: str = "bits per character, <=") -> Draw:
    """A column for every model, in the order of the rows: one dot per seed."""

    def draw(figure: Figure, rows: Sequence[Row]) -> None:
        axes = figure.subplots()
        models = list(dict.fromkeys(row["model"] for row in rows))
        for place, model in enumerate(models):
            _plot_seeds(axes, place, [row[column] for row in rows if row["model"] == model])
        axes.set_xticks(range(len(models)), [fill(str(model), 14) for model in models])
        axes.margins(x=0.2, y=0.1)
        axes.set_ylabel(label)

    return draw


def _plot_seeds(axes: Axes, x: int, values: Sequence[float], colour: str = COLOURS[0]) -> None:
    """One dot per seed, labelled with the value or the mean."""
    axes.plot([x] * len(values), values, "o", color=colour)
    mean = sum(values) / len(values)
    text = f"{mean:.3f}" if len(values) == 1 else f"mean {mean:.3f}"
    axes.annotate(text, (x, mean), xytext=(6, 0), textcoords="offset points", va="center", fontsize=SMALL)
