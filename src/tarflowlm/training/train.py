"""`train` and `resume`: a run from its configuration to its result."""

import logging
import math
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tarflowlm.config import RunConfig
from tarflowlm.data import (
    SOURCE_NAMES,
    Corpus,
    Tokenizer,
    cached_corpus,
    check_fit,
    eval_windows,
    load_tokenizer,
    suited,
)
from tarflowlm.device import keep_freed_memory
from tarflowlm.errors import UserError
from tarflowlm.files import full_disk_as_user_error, remove_leftovers, write_json
from tarflowlm.locks import writer_lock
from tarflowlm.presets import with_blocks, with_steps
from tarflowlm.runs.checkpoint import (
    BEST,
    CONFIG,
    STATE,
    SUMMARY,
    TOKENIZER,
    WEIGHTS,
    Checkpoint,
    read_run,
    read_summary,
    weights_problem,
    write_run,
)
from tarflowlm.runs.weights import checksum
from tarflowlm.schema import flatten
from tarflowlm.training.loop import test_seconds, train_stage
from tarflowlm.training.metrics import METRICS, Reporter, check_installed
from tarflowlm.training.parallel import ALONE, Processes
from tarflowlm.training.run import TrainingRun
from tarflowlm.training.state import newest_state

LEAST_TEST_WINDOWS = 32
"""Test windows that a run with a time limit evaluates at least, even if its time is over."""

StopRequests = Callable[[], AbstractContextManager[Callable[[], str | None]]]
"""A context in which a run can be asked to stop. It yields a function that returns the reason, or
None.
"""

logger = logging.getLogger("tarflowlm")


@contextmanager
def no_stop_requests() -> Iterator[Callable[[], str | None]]:
    """The default `StopRequests`: never stop; signals keep their handlers."""
    yield lambda: None


def train(
    run: RunConfig,
    out: Path,
    *,
    device: torch.device,
    reporter: Reporter | None = None,
    processes: Processes = ALONE,
    stop_requests: StopRequests = no_stop_requests,
    parent: Checkpoint | None = None,
) -> dict[str, Any]:
    """Train `run` in the directory `out`; returns the summary, also written to summary.json.
    Collective.

    If `out` holds this run already, it goes on from the newest undamaged state, with the time that
    this had left; its weights come out as if it had never stopped. The number of processes may
    differ from before. Of a finished run this is the summary, unless the weights are damaged and
    have to be restored. A run that `tuning` made begins with the weights and the tokenizer of its
    `parent`, and keeps a copy of both. Raises UserError, before anything is written, if `out` is in
    use for anything else, or the text has changed; Stopped, with everything saved, if
    `stop_requests` says so; FloatingPointError if the loss stays non-finite.
    """
    reporter = reporter or Reporter()
    if begun := processes.from_first(processes.first and is_begun(out)):
        run = continued(
            run if run.data.tokenizer == read_run(out).data.tokenizer else _suited(run), out
        )
        summary = read_summary(out) if processes.first and weights_problem(out) is None else None
        if summary := processes.from_first(summary):
            logger.info("%s is finished", out)
            return summary
    else:
        check_installed(run.train.track)
        run = run if run.parent else _suited(run)
    if run.parent and parent is None and not begun:
        raise UserError(f"parent {run.parent}: give that model, as `tarflowlm train --from` does")
    # of a run that has begun, its own; a damaged one shows when it is read
    tokenizer = (
        parent.tokenizer
        if parent is not None
        else load_tokenizer(out / TOKENIZER)
        if run.parent
        else None
    )
    corpus = _corpus(run, tokenizer, reporter, processes)
    vocab_size = corpus.tokenizer.vocab_size
    if (given := run.model.vocab_size) not in (0, vocab_size):
        raise UserError(
            f"model.vocab_size {given}: the tokenizer has {vocab_size} symbols; leave it at 0"
        )
    run = _located(replace(run, model=replace(run.model, vocab_size=vocab_size)))
    training = TrainingRun(run, out, corpus, device, reporter, processes)
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
    with _writing(out, processes):
        if processes.first and is_begun(out) != begun:
            raise UserError(
                f"{out} has just been begun by another process: repeat the command to go on with it"
            )
        state = processes.from_first(_state_to_resume(out) if processes.first and begun else None)
        if processes.first and state is None:
            training.write_start(parent)
        length = (
            f"{run.train.minutes:g} minutes"
            if run.train.minutes
            else f"{run.train.num_steps:,} steps"
        )
        text = f"{run.data.source}{' (built in)' * (run.data.source == 'english')}"
        tokens = f"{run.train.batch_size * run.model.context:,} tokens a step"
        logger.info("%s on %s: %s, %s, into %s", run.name, text, length, tokens, out)
        keep_freed_memory()
        with stop_requests() as training.stop_signal:
            try:
                training.start(state)
                while training.counters.stage < run.num_stages:
                    training.leave_stage(train_stage(training))
                return _finish(training)
            finally:
                training.close()


def resume(out: Path, **options: Any) -> dict[str, Any]:
    """Go on with the run in `out`, as `train` with its configuration and these options."""
    return train(read_run(out), out, **options)


TUNING_RATE = 0.5
"""Peak learning rate of tuning, as a multiple of that of the model's own training."""
TUNING_MINUTES = 10.0
"""Length of a tuning run if nothing else is asked for."""


def tuning(
    parent: Checkpoint,
    data: str,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    lr: float | None = None,
) -> RunConfig:
    """The run that goes on with the training of a model on another text, for `train(...,
    parent=parent)`.

    Shape, tokenizer, batches and stages are those of the parent's own training, with their shares
    of the new length: `minutes`, by default 10, or `steps`. The optimiser is new, with the peak
    rate `lr`, by default half of the parent's. Each stage ends with the weights of its best
    validation, since a text for tuning is often short. UserError for a length or rate that is not
    above 0.
    """
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(f"minutes {minutes}: must be above 0 and finite")
    check_fit(data, parent.tokenizer)
    run = replace(with_blocks(parent.run, parent.model.num_blocks), seed=seed)
    weights = {name: tensor.cpu() for name, tensor in parent.model.state_dict().items()}
    name = f"{parent.directory.name}@{checksum(weights)}"
    optim = replace(
        run.optim, lr=TUNING_RATE * run.optim.lr if lr is None else lr, muon_precision="auto"
    )
    length = minutes or TUNING_MINUTES
    train = replace(
        run.train, minutes=length, keep="best", evaluate_every=100, test_windows=0, precision="auto"
    )
    text = replace(run.data, source=data)
    run = replace(run, name=f"{run.name}-tuned", parent=name, data=text, optim=optim, train=train)
    return run if steps is None else with_steps(run, steps)


def _finish(run: TrainingRun) -> dict[str, Any]:
    run.model.eval()
    if minutes := run.config.train.minutes:
        run.config = _with_lengths(run)
    config, counters, parameters = run.config, run.counters, dict(run.model.named_parameters())
    windows = eval_windows(
        run.corpus.split("test"), config.model.context, config.train.test_windows or None
    )
    run.reporter.stage("evaluating the test split", len(windows))
    test = run.evaluate(windows, run.reporter)
    trunk = sum(p.numel() for name, p in parameters.items() if "transformer." in name)
    summary = {
        "preset": config.name,
        "seed": config.seed,
        "steps": counters.step,
        "tokens": counters.tokens,
        "stage_tokens": counters.stage_tokens,
        "stage_seconds": [round(s, 2) for s in counters.seconds],
        "stage_valid_bpc": counters.valid_bpc,
        "seconds": round(sum(counters.seconds), 2),
        "wall_seconds": round(run.seconds(), 2),
        "minutes": minutes,
        "parameters": sum(p.numel() for p in parameters.values()),
        "trunk_parameters": trunk,
        "test": test.to_json(),
        "source": config.data.source,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": run.processes.world,
        "device": str(run.device),
        "machine": platform.machine(),
    }
    if run.processes.first:
        write_json(run.out / SUMMARY, summary)
        for directory in (run.out, run.out / BEST) if minutes else ():
            write_run(directory, run.config, run.corpus.tokenizer)
    return summary


def _with_lengths(run: TrainingRun) -> RunConfig:
    """The configuration of a run whose time is over, with the steps it has taken in place of the
    limit.
    """
    train, spent = run.config.train, run.counters.spent
    total = 60 * train.minutes
    seconds = min(max(total - run.seconds(), 0.0), test_seconds(total, run.num_test_windows, spent))
    fitting = max(LEAST_TEST_WINDOWS, int(seconds / max(spent.per_window, 1e-9)))
    count = run.processes.from_first(min(run.num_test_windows, fitting))
    steps = tuple(run.counters.stage_steps)
    return replace(
        run.config, train=replace(train, minutes=0.0, stage_steps=steps, test_windows=count)
    )


@contextmanager
def _writing(out: Path, processes: Processes) -> Iterator[None]:
    def remedy() -> str:
        return (
            f"continue with `tarflowlm train --resume {out}`"
            if (out / CONFIG).exists()
            else "start it again"
        )

    with (
        full_disk_as_user_error(out, remedy),
        writer_lock(out) if processes.first else nullcontext(),
    ):
        yield


def _suited(run: RunConfig) -> RunConfig:
    tokenizer = suited(run.data.source, run.data.tokenizer)
    return (
        run
        if tokenizer is run.data.tokenizer
        else replace(run, data=replace(run.data, tokenizer=tokenizer))
    )


def _located(run: RunConfig) -> RunConfig:
    """The run with an absolute path to its text, since its directory may be used from other
    folders.
    """
    source = run.data.source
    path = source if source in SOURCE_NAMES else str(Path(source).expanduser().resolve())
    return replace(run, data=replace(run.data, source=path))


def _state_to_resume(out: Path) -> Path | None:
    """The state to resume, or None without a checkpoint. Removes files that a kill left
    incomplete.
    """
    damage, states = weights_problem(out), out / STATE
    for folder in (out, out / BEST):
        remove_leftovers(folder)
    for partial in states.glob(".step-*"):
        shutil.rmtree(partial)
    if not (out / WEIGHTS).exists() and not any(states.glob("*step-*")):
        return None
    state = newest_state(out)
    if damage is not None:
        logger.warning("%s: restored from %s", damage, state.name)
    return state


def is_begun(out: Path) -> bool:
    """Whether `out` holds a run that has saved something. UserError if it is in use for anything
    else.
    """
    # `write_start` makes that folder first, and no other program does
    is_run = (out / STATE).is_dir()
    if is_run and (any((out / STATE).iterdir()) or (out / WEIGHTS).exists()):
        return True
    left = {CONFIG, TOKENIZER, METRICS, STATE} if is_run else set()
    if out.exists() and (
        not out.is_dir() or any(p.name not in left and p.name[0] != "." for p in out.iterdir())
    ):
        raise UserError(
            f"{out} exists already, and is no run that could go on: choose another --out"
        )
    return False


def continued(run: RunConfig, out: Path) -> RunConfig:
    """The run in `out`; UserError, naming the first field that differs, unless it is `run`."""
    found = read_run(out)
    asked, held = flatten(_located(run)), flatten(found)
    # left open, they are decided as a run begins, and the limit of time is replaced as it ends
    decided = [
        ("model.vocab_size", 0),
        ("optim.muon_precision", "auto"),
        ("train.precision", "auto"),
    ]
    decided.append(("temperature", asked["temperature"]))  # it changes no weights
    if run.train.minutes and (summary := read_summary(out)):
        held["train.minutes"] = summary["minutes"]
        decided += [(name, asked[name]) for name in ("train.stage_steps", "train.test_windows")]
    for name in asked | held:
        ours, theirs = asked.get(name), held.get(name)
        if ours != theirs and (name, ours) not in decided:
            remedy = f"go on with `tarflowlm train --resume {out}`, or choose another --out"
            raise UserError(f"{name} {ours}: the run in {out} has {theirs}; {remedy}")
    if (
        found.optim.muon_precision == "auto"
    ):  # in configurations of earlier versions this was the only choice
        found = replace(
            found, optim=replace(found.optim, muon_precision="bfloat16", muon_qkv="together")
        )
    return found


def _corpus(
    run: RunConfig, tokenizer: Tokenizer | None, reporter: Reporter, processes: Processes
) -> Corpus:
    with processes.first_alone():
        options: dict[str, Any] = {"progress": reporter, "may_download": processes.world == 1}
        corpus = cached_corpus(run.data.source, tokenizer or run.data.tokenizer, **options)
    for name in ("train", "valid", "test"):
        have = corpus.num_tokens(name)
        if have < run.model.context:
            few = f"the {name} split of {run.data.source} has {have} tokens, fewer than the context of"
            raise UserError(
                f"{few} {run.model.context}: use a longer text or a smaller model.context"
            )
    return corpus
