"""Starting a run, and going on with one that was stopped."""

import itertools
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tarflowlm.data import SOURCE_NAMES, Corpus, cached_corpus
from tarflowlm.errors import UserError
from tarflowlm.files import LOCK, full_disk_as_user_error, remove_leftovers, writer_lock
from tarflowlm.runs.checkpoint import BEST, CONFIG, STATE, WEIGHTS, read_run, weights_problem, write_run
from tarflowlm.runs.config import RunConfig
from tarflowlm.training.distributed import ALONE, Processes
from tarflowlm.training.metrics import Reporter
from tarflowlm.training.run import SUMMARY, Run, StopRequests, no_stop_requests
from tarflowlm.training.state import newest_state, read_counters, remove_partial
from tarflowlm.training.tracking import check_installed


def train(
    run: RunConfig,
    out: Path,
    *,
    device: torch.device,
    reporter: Reporter | None = None,
    processes: Processes = ALONE,
    stop_requests: StopRequests = no_stop_requests,
) -> dict[str, Any]:
    """Train `run` into the new directory `out` and return its summary (also written to summary.json).

    With several `processes` all of them call this, and the first one writes.

    Raises UserError, before anything is written, when `out` exists and is not empty, and later when the disk is full;
    Stopped, with everything saved, when `stop_requests` asks for it (`signals.stop_on_signals` for a command line);
    FloatingPointError when the loss stays non-finite.
    """
    reporter = reporter or Reporter()
    if processes.first:
        check_new(out)
    check_installed(run.train.track)
    with processes.first_alone():
        corpus = _corpus(run, reporter)
    begun = time.monotonic()
    if run.data.source not in SOURCE_NAMES:
        # the run directory is used from other folders too
        run = replace(run, data=replace(run.data, source=str(Path(run.data.source).expanduser().resolve())))
    run = replace(run, model=replace(run.model, vocab_size=_checked_vocab_size(run, corpus)))
    _check_lengths(run, corpus)
    parts = Run(run, out, corpus, device, reporter, processes, begun)
    run = parts.run
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
    with full_disk_as_user_error(out, lambda: _remedy(out)), writer_lock(out) if processes.first else nullcontext():
        if processes.first:
            check_new(out)
            remove_leftovers(out)
            _begin(out, run, corpus)
        with stop_requests() as parts.stop_signal:
            return parts.go()


def resume(
    out: Path,
    *,
    device: torch.device,
    reporter: Reporter | None = None,
    processes: Processes = ALONE,
    stop_requests: StopRequests = no_stop_requests,
) -> dict[str, Any]:
    """Continue a stopped run from its newest whole state, to the same weights as if it had never stopped.

    One that was stopped before its first checkpoint begins again from its configuration. A run by `minutes` goes on
    with the time that its newest state had left. The number of processes may be another than before. Weights that are
    damaged are written again from the state, those of a finished run as well. Raises as `train`.
    """
    reporter = reporter or Reporter()
    run = read_run(out)
    if run.optim.muon_precision == "auto":
        # written before there was a choice
        run = replace(run, optim=replace(run.optim, muon_precision="bfloat16", muon_qkv="together"))
    with full_disk_as_user_error(out, lambda: _remedy(out)), writer_lock(out) if processes.first else nullcontext():
        state, damaged = processes.from_first(_prepared(out, reporter) if processes.first else (out, None))
        with processes.first_alone():
            corpus = _corpus(run, reporter)
        begun = time.monotonic()
        if state is None:
            if processes.first:
                _set_aside(out, reporter)
                _begin(out, run, corpus)
            reporter.notice(f"{out} has no checkpoint yet: beginning again at step 0")
        else:
            saved = read_counters(state)
            if corpus.fingerprint != saved["corpus"]:
                raise UserError(
                    f"{run.data.source} is not the text that {out} was trained on: bring that back to resume"
                )
            if damaged is not None:
                reporter.notice(f"{damaged}: written again from {state.name}")
            reporter.notice(f"resuming {out} at step {saved['step']}")
        parts = Run(run, out, corpus, device, reporter, processes, begun)
        with stop_requests() as parts.stop_signal:
            return parts.go(state, weights=damaged is not None, afresh=state is None)


def _begin(out: Path, run: RunConfig, corpus: Corpus) -> None:
    """What a run directory holds before the first step. An empty folder of states tells it from an exported model."""
    write_run(out, run, corpus.tokenizer)
    (out / STATE).mkdir(exist_ok=True)


def _set_aside(out: Path, reporter: Reporter) -> None:
    """Keep weights that were written before the first state, or whose states somebody deleted."""
    found = [out / name for name in (WEIGHTS, BEST) if (out / name).exists()]
    if found:
        aside = next(path for n in itertools.count(1) if not (path := out / f"before-restart-{n}").exists())
        aside.mkdir()
        for path in found:
            path.rename(aside / path.name)
        reporter.notice(f"{' and '.join(path.name for path in found)} are kept in {aside}")


def _prepared(out: Path, reporter: Reporter) -> tuple[Path | None, str | None]:
    """The state to resume (None: there never was one), and what is wrong with the weights; what a kill left in part
    is removed."""
    damaged = weights_problem(out)
    if (out / SUMMARY).exists() and damaged is None:
        raise UserError(f"{out} is finished: there is nothing to resume; train anew with another --out")
    remove_partial(out)
    states = [path for kind in ("step-*", "damaged-step-*") for path in (out / STATE).glob(kind)]
    begun = (out / STATE).exists() or not (out / WEIGHTS).exists()
    never_saved = not states and begun and not (out / SUMMARY).exists()
    state = None if never_saved else newest_state(out, reporter.notice)
    for folder in (out, out / BEST):
        remove_leftovers(folder)
    return state, damaged


def _remedy(out: Path) -> str:
    """How to go on after a full disk."""
    return f"go on with `tarflowlm train --resume {out}`" if (out / CONFIG).exists() else "start it again"


def _corpus(run: RunConfig, reporter: Reporter) -> Corpus:
    return cached_corpus(run.data.source, run.data.tokenizer, progress=reporter.preparing, notice=reporter.notice)


def check_new(out: Path) -> None:
    """UserError unless `out` is free to be written."""
    leftovers = (LOCK, f".{CONFIG}.")  # of a run that was killed before it had written anything
    if out.exists() and (not out.is_dir() or not all(path.name.startswith(leftovers) for path in out.iterdir())):
        raise UserError(f"{out} exists already: choose another --out, or continue it with `train --resume {out}`")


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
