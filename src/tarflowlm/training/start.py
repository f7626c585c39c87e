"""How a run begins, or resumes from a checkpoint."""

import logging
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from tarflowlm.config import RunConfig
from tarflowlm.data import WindowSampler
from tarflowlm.errors import UserError
from tarflowlm.files import read_json
from tarflowlm.model import seeded
from tarflowlm.runs import COUNTERS, SUMMARY
from tarflowlm.schema import flatten, from_dict
from tarflowlm.training.checkpoint import load_tensors, submit_run, submit_weights
from tarflowlm.training.log import Window
from tarflowlm.training.run import Counters, Run
from tarflowlm.training.stages import begin_stage, enter_stage

T = TypeVar("T")

logger = logging.getLogger("tarflowlm")


def begin_run(run: Run) -> None:
    """Make the state of `run` before its first step, and open its log. Collective."""
    build(run)
    begin_stage(run)
    if run.processes.first:
        run.log.open(run.out)
        run.log.track(run.config, run.out, resume_at=0)


def resume_run(run: Run, folder: Path) -> None:
    """Make the state of `run` that is in the `folder` of a checkpoint, with the log cut back to it.
    Collective.

    Its configuration may have other blocks than the present one, because blocks may have left
    since. The weights are written again, because a kill may have come between the state and its
    weights, or the file may be damaged. UserError for a state of another run or another text.
    """
    saved = read_json(folder / COUNTERS)
    config = from_dict(RunConfig, saved["config"], where=str(folder / COUNTERS))
    theirs = flatten(config)
    for name, value in flatten(run.config).items():
        if not name.startswith(("model.blocks", "train.")) and theirs.get(name) != value:
            what = f"it has {name} {theirs.get(name)}, not {value}"
            raise UserError(f"{folder} does not fit this run ({what}): restore the run's own state")
    if saved["corpus"] != run.corpus.fingerprint:
        what = f"{config.data.source} is not the text that {run.out} was trained on"
        raise UserError(f"{what}: restore that text to resume")
    run.config = config
    run.counters = restored(Counters, saved, "counters", folder)
    window = restored(Window, saved, "window", folder)
    logger.info("resuming %s at step %d", run.out, run.counters.step)
    build(run)
    load_tensors(run, folder)
    run.sampler.load_state_dict(saved["sampler"])
    if run.processes.first:
        # if its weights were damaged, it is finished only once they are whole again
        (run.out / SUMMARY).unlink(missing_ok=True)
    # the configuration first: this state may have more blocks than the one that was written last
    submit_run(run)
    submit_weights(run, run.out)
    if run.processes.first:
        run.log.open(run.out, resume_at=saved["metrics"], window=window)
        run.log.track(config, run.out, resume_at=run.counters.step)


def restored(kind: type[T], saved: dict[str, Any], part: str, folder: Path) -> T:
    """A dataclass from its `part` of counters.json in `folder`; what is missing has its default.

    UserError for a count that it does not know. A manifest covers the file, so types are trusted.
    """
    known = {one.name for one in fields(cast(Any, kind))}
    for name in saved[part]:
        if name not in known:
            what = f"{folder / COUNTERS}: {part}.{name} is of another version"
            raise UserError(f"{what}; resume with the version of tarflowlm that wrote it")
    return kind(**saved[part])


def build(run: Run) -> None:
    """Make the model, with initial weights, and all else that the place of the counters needs.
    Collective.
    """
    config, processes = run.config, run.processes
    with seeded(config.seed):
        run.model = config.model_of_stage(0).build()
    run.model.config = config.model
    run.sampler = WindowSampler(
        run.corpus.split("train"),
        window=config.model.context,
        batch=processes.rows_each(config.train),
        seed=config.seed,
        rank=processes.rank,
        world=processes.world,
        end=run.corpus.tokenizer.end,
    )
    run.generator = torch.Generator(device=run.device).manual_seed(config.seed)
    enter_stage(run)
    run.began = time.monotonic() - run.counters.total
