"""`train` and `resume`: a run from start to end, with its stages, the final evaluation and the summary."""

import itertools
import platform
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tarflowlm.config import RunConfig
from tarflowlm.data import SOURCE_NAMES, Corpus, cached_corpus, eval_windows
from tarflowlm.device import keep_freed_memory
from tarflowlm.errors import UserError
from tarflowlm.files import LOCK, full_disk_as_user_error, remove_leftovers, write_json, writer_lock
from tarflowlm.runs.checkpoint import (
    BEST,
    CONFIG,
    STATE,
    SUMMARY,
    TOKENIZER,
    WEIGHTS,
    read_run,
    weights_problem,
    write_run,
)
from tarflowlm.runs.manifest import MANIFEST
from tarflowlm.training.distributed import ALONE, Processes
from tarflowlm.training.loop import train_stage
from tarflowlm.training.metrics import METRICS, Reporter
from tarflowlm.training.pace import test_seconds
from tarflowlm.training.run import Run, StopRequests, no_stop_requests
from tarflowlm.training.state import newest_state, read_counters, remove_partial
from tarflowlm.training.tracking import check_installed

LEAST_TEST_WINDOWS = 32
"""Test windows that a run with a time limit evaluates at least, even if its time is over."""


def train(
    run: RunConfig,
    out: Path,
    *,
    device: torch.device,
    reporter: Reporter | None = None,
    processes: Processes = ALONE,
    stop_requests: StopRequests = no_stop_requests,
) -> dict[str, Any]:
    """Train `run` into the new directory `out`; returns the summary, which is also written to summary.json.

    With several `processes` all of them call this function, and the first one writes.

    Raises UserError if `out` exists and holds more than a start without weights, before anything is written;
    UserError if the disk is full; Stopped, with everything saved, if `stop_requests` says so (the command line passes
    `signals.stop_on_signals`);
    FloatingPointError if the loss stays non-finite.
    """
    reporter = reporter or Reporter()
    if processes.first:
        check_new(out)
    check_installed(run.train.track)
    with processes.first_alone():
        corpus = _corpus(run, reporter)
    begun = time.monotonic()
    if run.data.source not in SOURCE_NAMES:
        # absolute, since the run directory may be used from other folders
        run = replace(run, data=replace(run.data, source=str(Path(run.data.source).expanduser().resolve())))
    run = replace(run, model=replace(run.model, vocab_size=_checked_vocab_size(run, corpus)))
    _check_lengths(run, corpus)
    new = Run(run, out, corpus, device, reporter, processes, begun)
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
    with full_disk_as_user_error(out, lambda: _remedy(out)), writer_lock(out) if processes.first else nullcontext():
        if processes.first:
            check_new(out)
            remove_leftovers(out)
            _begin(out, new.config, corpus)
        with stop_requests() as new.stop_signal:
            return _run_stages(new, afresh=(out / METRICS).exists())


def resume(
    out: Path,
    *,
    device: torch.device,
    reporter: Reporter | None = None,
    processes: Processes = ALONE,
    stop_requests: StopRequests = no_stop_requests,
) -> dict[str, Any]:
    """Resume a stopped run from its newest undamaged state; the weights come out as if it had never stopped.

    A run that was stopped before its first checkpoint restarts from its configuration. A run with a time limit
    continues with the time that its state had left. The number of processes may differ from before. Damaged weights
    are restored from the state, also those of a finished run. Raises as `train`, and UserError if there is nothing to
    resume or the text has changed.
    """
    reporter = reporter or Reporter()
    run = read_run(out)
    if run.optim.muon_precision == "auto":
        # configurations of earlier versions: this was the only choice then
        run = replace(run, optim=replace(run.optim, muon_precision="bfloat16", muon_qkv="together"))
    with full_disk_as_user_error(out, lambda: _remedy(out)), writer_lock(out) if processes.first else nullcontext():
        state, damaged = processes.from_first(_prepare_resume(out, reporter) if processes.first else (out, None))
        with processes.first_alone():
            corpus = _corpus(run, reporter)
        begun = time.monotonic()
        if state is None:
            if processes.first:
                _set_aside(out, reporter)
                _begin(out, run, corpus)
            reporter.notice(f"{out} has no checkpoint yet: restarting at step 0")
        else:
            saved = read_counters(state)
            if corpus.fingerprint != saved["corpus"]:
                raise UserError(
                    f"{run.data.source} is not the text that {out} was trained on: restore that text to resume"
                )
            if damaged is not None:
                reporter.notice(f"{damaged}: restored from {state.name}")
            reporter.notice(f"resuming {out} at step {saved['step']}")
        resumed = Run(run, out, corpus, device, reporter, processes, begun)
        with stop_requests() as resumed.stop_signal:
            return _run_stages(resumed, state, repair=damaged is not None, afresh=state is None)


def _run_stages(run: Run, state: Path | None = None, *, repair: bool = False, afresh: bool = False) -> dict[str, Any]:
    """Train all stages of a run, from its first step or from `state`, and finish it; returns the summary.

    `repair` first restores the weights from the state. `afresh`: see `Run.begin`.
    """
    keep_freed_memory()
    run.begin(state, None if state is None else read_counters(state), afresh=afresh)
    try:
        if repair:
            run.save_weights(run.out)
        while run.counters.stage < run.config.num_stages:
            run.announce_stage()
            run.leave_stage(train_stage(run))
        return _finish(run)
    finally:
        run.log.close()


def _finish(run: Run) -> dict[str, Any]:
    """Evaluate the test split and write summary.json."""
    run.model.eval()
    minutes = run.config.train.minutes
    if minutes:
        _fix_lengths(run)
    windows = eval_windows(run.corpus.split("test"), run.config.model.context, run.config.train.test_windows or None)
    seconds = len(windows) * run.counters.spent.per_window
    about = f", about {seconds:,.0f} s" if seconds >= 1 else ""
    run.reporter.notice(f"evaluating {len(windows):,} windows of the test split{about}")

    def progress(done: int, total: int) -> None:
        run.stop_if_asked()
        run.reporter.testing(done, total)

    run.reporter.testing(0, len(windows))
    test = run.engine.evaluate(windows, run.characters_per_token, progress=progress)
    counters, parameters = run.counters, dict(run.model.named_parameters())
    summary = {
        "preset": run.config.name,
        "seed": run.config.seed,
        "steps": counters.step,
        "tokens": counters.tokens,
        "stage_tokens": counters.stage_tokens,
        "stage_seconds": [round(s, 2) for s in counters.seconds],
        "stage_valid_bpc": counters.valid_bpc,
        "seconds": round(sum(counters.seconds), 2),
        "wall_seconds": round(run.clock.seconds(), 2),
        "minutes": minutes,
        "parameters": sum(p.numel() for p in parameters.values()),
        "trunk_parameters": sum(p.numel() for name, p in parameters.items() if "transformer." in name),
        "test": test.to_json(),
        "source": run.config.data.source,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": run.processes.world,
        "device": str(run.device),
        "machine": platform.machine(),
    }
    if run.processes.first:
        write_json(run.out / SUMMARY, summary)
    return summary


def _fix_lengths(run: Run) -> None:
    """At the end of a run with a time limit: replace the limit in its configuration by the steps it has taken."""
    train, spent = run.config.train, run.counters.spent
    total = 60 * train.minutes
    seconds = max(total - run.clock.seconds(), 0.0)
    fitting = int(min(seconds, test_seconds(total, run.num_test_windows, spent)) / max(spent.per_window, 1e-9))
    count = run.processes.from_first(min(run.num_test_windows, max(LEAST_TEST_WINDOWS, fitting)))
    steps = tuple(run.counters.stage_steps)
    run.config = replace(run.config, train=replace(train, minutes=0.0, stage_steps=steps, test_windows=count))
    for directory in (run.out, run.out / BEST) if run.processes.first else ():
        if directory.exists():
            write_run(directory, run.config, run.corpus.tokenizer)


def _begin(out: Path, run: RunConfig, corpus: Corpus) -> None:
    """Write what a run directory holds before the first step.

    The empty folder of states distinguishes it from an exported model.
    """
    write_run(out, run, corpus.tokenizer)
    (out / STATE).mkdir(exist_ok=True)


def _set_aside(out: Path, reporter: Reporter) -> None:
    """Move existing weights out of the way of a restart: they have no state, for whatever reason."""
    found = [out / name for name in (WEIGHTS, BEST) if (out / name).exists()]
    if found:
        aside = next(path for n in itertools.count(1) if not (path := out / f"before-restart-{n}").exists())
        aside.mkdir()
        for path in found:
            path.rename(aside / path.name)
        reporter.notice(f"{' and '.join(path.name for path in found)} are kept in {aside}")


def _prepare_resume(out: Path, reporter: Reporter) -> tuple[Path | None, str | None]:
    """The state to resume, or None if there never was one, and what is wrong with the weights, if anything.

    Removes files that a kill left incomplete. UserError for a finished run, or if no state is undamaged.
    """
    damaged = weights_problem(out)
    if (out / SUMMARY).exists() and damaged is None:
        raise UserError(f"{out} is finished: there is nothing to resume; start a new run with another --out")
    remove_partial(out)
    states = [path for kind in ("step-*", "damaged-step-*") for path in (out / STATE).glob(kind)]
    begun = (out / STATE).exists() or not (out / WEIGHTS).exists()
    never_saved = not states and begun and not (out / SUMMARY).exists()
    state = None if never_saved else newest_state(out, reporter.notice)
    for folder in (out, out / BEST):
        remove_leftovers(folder)
    return state, damaged


def _remedy(out: Path) -> str:
    """What to do once a full disk has room again."""
    return f"continue with `tarflowlm train --resume {out}`" if (out / CONFIG).exists() else "start it again"


def _corpus(run: RunConfig, reporter: Reporter) -> Corpus:
    return cached_corpus(run.data.source, run.data.tokenizer)


def check_new(out: Path) -> None:
    """UserError if `out` exists and holds anything but the remains of a run that ended before it saved weights."""
    leftovers = [LOCK, MANIFEST, f".{CONFIG}.", f".{MANIFEST}."]
    if (out / STATE).is_dir() and not any((out / STATE).iterdir()):
        # the folder that `_begin` writes last, and no other program does
        leftovers += [CONFIG, TOKENIZER, METRICS, STATE, f".{WEIGHTS}."]
    if out.exists() and (
        not out.is_dir() or not all(path.name.startswith(tuple(leftovers)) for path in out.iterdir())
    ):
        can_resume = (out / STATE).is_dir() and not (out / SUMMARY).exists()
        resume_it = f", or resume it with `train --resume {out}`" if can_resume else ""
        raise UserError(f"{out} exists already: choose another --out{resume_it}")


def _checked_vocab_size(run: RunConfig, corpus: Corpus) -> int:
    size, asked = corpus.tokenizer.vocab_size, run.model.vocab_size
    if asked not in (0, size):
        raise UserError(f"model.vocab_size {asked}: the tokenizer has {size} symbols; leave it at 0")
    return size


def _check_lengths(run: RunConfig, corpus: Corpus) -> None:
    for name in ("train", "valid", "test"):
        have = corpus.num_tokens(name)
        if have < run.model.context:
            raise UserError(
                f"the {name} split of {run.data.source} has {have} tokens, fewer than the context of "
                f"{run.model.context}: use a longer text or a smaller model.context"
            )
