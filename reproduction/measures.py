"""Measurements, and trainings, that recipes share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from reproduction.judges import PAPER_JUDGES, Judge, load_judge
from reproduction.recipe import RUN_DETAILS, Finished, Row, Training, without
from reproduction.settings import Settings
from tarflowlm.config import RunConfig
from tarflowlm.data import eval_windows
from tarflowlm.evaluation.blocks import Spread, StateReport, latent_report
from tarflowlm.evaluation.likelihood import Likelihood, bits, evaluate, sign_of
from tarflowlm.generation import Generation, generate
from tarflowlm.model import as_flow
from tarflowlm.presets import preset, with_steps
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.runs.records import RunRecord, read_record

JUDGED = "judge's bits"
JUDGE_STEPS = 1300
JUDGE_SEED = 1000
"""No other training has this seed, so no model is judged by an earlier state of itself."""
AVERAGED = 5  # lines of metrics.jsonl averaged in a point of a curve
POINTS = 12  # evenly spaced points of a curve
LATENT_WINDOWS = 256  # windows of text whose states are measured
SHORT_WINDOWS = 1024  # test windows of `shortened` runs


def first_columns(done: Finished) -> Row:
    """The columns that name a training."""
    return {"model": done.training.label, "seed": done.training.run.seed}


def summary_row(done: Finished) -> Row:
    """The run's own measurement on its test split."""
    summary = done.record.summary
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


def likelihood_on(
    done: Finished, checkpoint: Checkpoint, source: str | None, windows: int, samples: int
) -> Likelihood:
    """The bound over evenly spaced windows of the run's test split, or of the text `source`."""
    some = eval_windows(done.tokens(checkpoint, source), checkpoint.run.model.context, windows)
    text = "test split" if source is None else "second text"
    return evaluate(
        checkpoint.model,
        some,
        torch.from_numpy(checkpoint.tokenizer.characters_per_token),
        samples=samples,
        progress=done.stage(f"windows of the {text}", len(some)),
    )


def sample(
    done: Finished,
    checkpoint: Checkpoint,
    num: int,
    length: int,
    *,
    prompt: Tensor | None = None,
    what: str = "",
) -> Generation:
    """`num` samples of `length` tokens with the noise of seed 0; `prompt` [num, T] gives some."""
    progress = done.stage(f"sampling{what}, tokens", num * length)
    return generate(
        checkpoint.model,
        num_tokens=length,
        num=num,
        prompt=prompt,
        generator=torch.Generator().manual_seed(0),
        decoder="auto",
        progress=progress,
    )


def share(is_so: Tensor) -> float:
    """The share of a tensor's entries that are true."""
    return is_so.cpu().double().mean().item()


def latents(done: Finished) -> list[StateReport]:
    """The states of a flow on `LATENT_WINDOWS` evenly spaced windows of its test split."""
    checkpoint = done.load()
    windows = eval_windows(done.tokens(checkpoint), checkpoint.run.model.context, LATENT_WINDOWS)
    progress = done.stage("latents of windows", len(windows))
    return latent_report(as_flow(checkpoint.model), windows, progress=progress)


def gains(done: Finished) -> Row:
    """How far every block lowers the KL divergence, in nats per token."""

    def measure() -> Row:
        found = [state.kl_gain.mean for state in latents(done) if state.kl_gain is not None]
        return {f"KL taken off by block {number}": gain for number, gain in enumerate(found, 1)}

    return done.measured("gains of blocks", measure)


def judged_bits(judge: Judge, checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Bits per character of every sample by the judge."""
    texts = [checkpoint.tokenizer.decode(row) for row in tokens.tolist()]
    return bits(judge.read(texts).by_text) / torch.tensor([len(text) for text in texts])


def mean_of(values: Tensor) -> Spread:
    """The mean over samples, and its standard error."""
    return Spread(values.mean().item(), values.std().item() / len(values) ** 0.5)


def curves(done: Finished) -> Row:
    """Bits per character over the steps, of the training text and of every validation.

    The training text has `POINTS` evenly spaced steps.
    """

    def measure() -> Row:
        log = read_record(done.directory)
        row = Row()
        curve = training_curve(log)
        for place in range(1, POINTS + 1):
            goal = place * done.training.run.train.num_steps / POINTS
            _, step = min((abs(step - goal), step) for step in curve)
            row[f"train bpc at {step:,}"] = curve[step]
        for step, bpc in zip(log.valid["step"], log.valid["bpc"], strict=True):
            row[f"valid bpc at {int(step):,}"] = float(bpc)
        return row

    return done.measured("curves", measure)


def training_curve(record: RunRecord) -> dict[int, float]:
    """Step -> training bound in bits per character, averaged over `AVERAGED` lines around it."""
    steps = record.train["step"]
    values = record.train["bpc"]
    half = AVERAGED // 2
    return {
        int(step): float(values[max(0, index - half) : index + half + 1].mean())
        for index, step in enumerate(steps)
    }


def with_curves(_settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """`summary_row`, with the curves of each run."""
    return [summary_row(done) | curves(done) for done in finished]


def without_curves(rows: Sequence[Row]) -> list[Row]:
    """The rows as a table shows them."""
    points = [name for row in rows for name in row if " bpc at " in name]
    return without(rows, [*points, *RUN_DETAILS])


def shortened(settings: Settings, run: RunConfig, steps: int) -> RunConfig:
    """At mini scale the run with fewer steps, more validations and a smaller test."""
    if settings.scale == "paper":
        return run
    run = with_steps(run, steps)
    train = replace(run.train, test_windows=SHORT_WINDOWS, evaluate_every=steps // 6)
    return replace(run, train=train)


def judge_training(settings: Settings) -> list[Training]:
    """The judge of the mini scale: a baseline of its own seed. The paper's needs no training."""
    if settings.scale == "paper":
        return []
    run = settings.adapt(with_steps(preset("mini-ar"), JUDGE_STEPS))
    run = replace(
        run, name="judge", seed=JUDGE_SEED, data=replace(run.data, source=settings.judge_data)
    )
    return [Training("judge", run, "judge")]


def judge_of(
    settings: Settings, finished: Sequence[Finished]
) -> tuple[Callable[[], Judge], list[Finished]]:
    """A function that loads the judge when it is first needed, and the trainings to be judged."""
    if settings.scale == "paper":
        device = finished[0].device
        return cache(lambda: load_judge(PAPER_JUDGES[0], device)), list(finished)
    [judge] = [done for done in finished if done.training.label == "judge"]
    others = [done for done in finished if done is not judge]
    return cache(lambda: load_judge(str(judge.directory), judge.device)), others
