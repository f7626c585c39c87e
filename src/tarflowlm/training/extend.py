"""More steps or more time for a run, which goes on from before its learning rate fell."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tarflowlm.config import RunConfig
from tarflowlm.errors import UserError
from tarflowlm.files import read_json, write_json, writer_lock
from tarflowlm.presets import check_time
from tarflowlm.runs import CONFIG, COUNTERS, MANIFEST, STATE, SUMMARY
from tarflowlm.runs.checkpoint import undamaged_state
from tarflowlm.runs.weights import is_whole, write_manifest
from tarflowlm.schema import from_dict, to_dict
from tarflowlm.training.directory import is_begun


def extend(out: Path, *, steps: int | None = None, minutes: float | None = None) -> None:
    """Let the run in `out`, finished or stopped, have so many steps or minutes in all.

    Its last stage goes on from the last checkpoint with the full rate, as if it had been asked for
    that length, but for its warm-up; what came after is dropped. UserError for a length that the
    run has had already, and where there is no such checkpoint. Without a length nothing happens.
    """
    if steps is None and minutes is None:
        return
    check_time(minutes, steps)
    newest = undamaged_state(out) if is_begun(out) else None
    if newest is None:
        raise UserError(f"{out} has no state to resume from: start a run in another directory")
    done: dict[str, Any] = read_json(newest / COUNTERS)["counters"]
    given, had = ("steps", done["step"]) if steps is not None else ("minutes", done["total"] / 60)
    wanted = steps if minutes is None else minutes
    if wanted is not None and wanted <= had:
        raise UserError(f"{given} {wanted:g}: the run in {out} has had {had:.4g}; give more in all")
    with writer_lock(out):
        state = _with_full_rate(out, done)
        _lengthen(out, state, steps, minutes)
        for later in sorted((out / STATE).glob("step-*")):
            if later.name > state.name:
                shutil.rmtree(later)
        (out / SUMMARY).unlink(missing_ok=True)


def _with_full_rate(out: Path, done: dict[str, Any]) -> Path:
    """The last state of the last stage from before the rate fell."""
    state = out / STATE / f"step-{done.get('flat_step', -1):08d}"
    remedy = f"`tarflowlm train --from {out} --data TEXT --out DIR` trains its weights further"
    if not state.is_dir() or not is_whole(state):
        raise UserError(f"{out} has no checkpoint from before its rate fell: {remedy}")
    saved = read_json(state / COUNTERS)
    config = from_dict(RunConfig, saved["config"], where=str(state / COUNTERS))
    if config.optim.schedule != "wsd":
        what = f"the schedule {config.optim.schedule} of {out} may depend on its length"
        raise UserError(f"{what}: {remedy}")
    if saved["counters"]["stage"] != config.num_stages - 1:
        what = f"{out} has no checkpoint of its last stage from before its rate fell"
        raise UserError(f"{what}: finish the run first, or {remedy}")
    return state


def _lengthen(out: Path, state: Path, steps: int | None, minutes: float | None) -> None:
    """Replace the state by one of a longer run, and let config.json say so."""
    saved = read_json(state / COUNTERS)
    config = from_dict(RunConfig, saved["config"])
    counters = saved["counters"]
    before = counters["step"] - counters["stage_step"]
    # under a time limit, of the only stage that is left
    share = 1 if steps is None else steps - before
    stage_steps = (*counters["stage_steps"], share)
    train = replace(config.train, stage_steps=stage_steps, minutes=minutes or 0.0)
    config = replace(config, train=train)
    saved["config"] = to_dict(config)
    counters["share"] = 0.0  # which would never fall
    longer = state.with_name(f".{state.name}")
    shutil.rmtree(longer, ignore_errors=True)
    shutil.copytree(state, longer)
    write_json(longer / COUNTERS, saved)
    files = {file.name for file in longer.iterdir()} - {MANIFEST}
    write_manifest(longer, files)
    shutil.rmtree(state)
    longer.rename(state)
    head = {
        key: value
        for key, value in read_json(out / CONFIG).items()
        if key in ("model_type", "imports")
    }
    write_json(out / CONFIG, head | to_dict(config))
