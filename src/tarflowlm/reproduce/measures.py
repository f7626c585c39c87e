"""Measurements and plots that several recipes share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from textwrap import fill

import torch

from tarflowlm.config import RunConfig
from tarflowlm.data import TokenArray, eval_windows
from tarflowlm.evaluation.blocks import StateReport, latent_report
from tarflowlm.evaluation.judges import PAPER_JUDGES, Judge, load_judge
from tarflowlm.evaluation.likelihood import Likelihood, Progress, evaluate, sign_of
from tarflowlm.evaluation.quality import Quality, SamplingConfig, measure_quality
from tarflowlm.generation import Generation, Watch, generate
from tarflowlm.generation.window import num_positions
from tarflowlm.model import FlowConfig, as_flow, as_flow_config
from tarflowlm.presets import mini_ar, with_steps
from tarflowlm.report.style import COLOURS, SMALL, Axes, Figure
from tarflowlm.reproduce.recipe import Draw, Finished, Row, Settings, Training
from tarflowlm.runs.checkpoint import Checkpoint

JUDGE_STEPS = 1300
SHORT_STEPS, SHORT_WINDOWS = 300, 1024
"""Of mini trainings whose ranking shows early."""
DEEPEST_LAST = "Mix-1, plain start, last block deepest"
"""Label of `mini-passes`."""
LATENT_WINDOWS = 256
"""Windows whose states are measured."""


def summary_row(done: Finished) -> Row:
    """The run's own measurement on its test split."""
    summary = done.summary
    test = summary["test"]
    return {
        "model": done.training.label,
        "seed": summary["seed"],
        "": sign_of(test["bound"]),
        "test bpc": test["bpc"],
        "ppl": test["ppl"],
        "stderr, nats": test["stderr"],
        "tokens seen": summary["tokens"],
        "seconds": summary["seconds"],
    }


def summaries(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The rows of a recipe that needs only the runs' own measurements."""
    return [summary_row(done) for done in finished]


def summaries_by(
    column: str, value: Callable[[FlowConfig], int]
) -> Callable[[Settings, Sequence[Finished]], list[Row]]:
    """`summaries` of flows with a number of their configuration as the first column."""

    def measure(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
        rows: list[Row] = []
        for done in finished:
            config = as_flow_config(done.training.run.model)
            rows.append({column: value(config), **summary_row(done)})
        return rows

    return measure


def likelihood(
    checkpoint: Checkpoint,
    tokens: TokenArray,
    *,
    windows: int,
    samples: int = 1,
    progress: Progress | None = None,
) -> Likelihood:
    """The bound over some evenly spaced windows with fresh contexts."""
    tokenizer = checkpoint.tokenizer
    return evaluate(
        checkpoint.model,
        eval_windows(tokens, checkpoint.run.model.context, windows),
        torch.from_numpy(tokenizer.characters_per_token),
        samples=samples,
        progress=progress,
    )


def sampled(
    done: Finished, checkpoint: Checkpoint, num: int, length: int, what: str = "sampling, positions"
) -> Generation:
    """`num` samples of `length` tokens with their tokens and states after every pass; the noise of seed 0."""
    return generate(
        checkpoint.model,
        num_tokens=length,
        num=num,
        generator=torch.Generator().manual_seed(0),
        decoder="auto",
        watch=Watch(done.stage_of(what, num_positions(checkpoint.model, length))),
    )


def share(is_so: torch.Tensor) -> float:
    """The share of a tensor's entries that are true."""
    return is_so.cpu().double().mean().item()


def latents(done: Finished) -> list[StateReport]:
    """The states of a flow on `LATENT_WINDOWS` evenly spaced windows of its test split."""
    checkpoint = done.load()
    model = as_flow(checkpoint.model)
    windows = eval_windows(done.tokens(checkpoint), checkpoint.run.model.context, LATENT_WINDOWS)
    return latent_report(model, windows, progress=done.progress_of("latents of windows"))


def shortened(run: RunConfig) -> RunConfig:
    """A mini run with fewer steps and a smaller test."""
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
    """The judge, and the other trainings, which it is to judge. Raises UserError as `load_judge`."""
    if settings.scale == "paper":
        return load_judge(PAPER_JUDGES[0], settings.device), list(finished)
    [judge] = [done for done in finished if done.training.label == "judge"]
    return load_judge(str(judge.directory), settings.device), [d for d in finished if d is not judge]


def quality(done: Finished, judge: Judge, *, num: int) -> Quality:
    """Quality of `num` samples of a model. Raises errors as `measure_quality`."""
    checkpoint = done.load()
    text = eval_windows(done.tokens(checkpoint), checkpoint.run.model.context, num)
    return measure_quality(
        checkpoint.model,
        checkpoint.tokenizer,
        judge,
        text,
        SamplingConfig(num=num),
        trained_on=checkpoint.run.data.source,
        progress=lambda what, at, total: done.progress_of(what)(at, total),
    )


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
