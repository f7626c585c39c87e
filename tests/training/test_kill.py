"""kill -9 at random instants, in saves too: the run that was resumed is the run that was never killed.

More kills, or the same ones again: TARFLOWLM_KILLS=200 TARFLOWLM_KILL_SEED=7 pytest -s tests/training/test_kill.py
"""

import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from tarflowlm.checkpoint import load_checkpoint
from tarflowlm.errors import UserError
from tarflowlm.training.config import RunConfig
from tarflowlm.training.progressive import resume, train

KILLS = int(os.environ.get("TARFLOWLM_KILLS", "20"))
SEED = int(os.environ.get("TARFLOWLM_KILL_SEED", "0")) or random.randrange(1, 10**6)


def work(run: RunConfig, out: Path, cache: str) -> None:
    """In a process of its own: begin the run, or go on with it, as a user would."""
    os.environ["TARFLOWLM_CACHE"] = cache
    torch.set_num_threads(1)
    if list((out / "state").glob("step-*")):
        resume(out, device=torch.device("cpu"))
        return
    # killed before there was anything to resume from
    shutil.rmtree(out, ignore_errors=True)
    train(run, out, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def start():
    """start(run, out): a process that trains. It is forked from one that has PyTorch loaded and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tarflowlm.training.progressive"])

    def begin(run: RunConfig, out: Path) -> multiprocessing.Process:
        process = context.Process(target=work, args=(run, out, os.environ["TARFLOWLM_CACHE"]))
        process.start()
        return process

    return begin


def partial(out: Path) -> set[str]:
    """Files and states that are being written or deleted."""
    places = (out.glob(".*.tmp"), (out / "best").glob(".*.tmp"), (out / "state").glob(".step-*"))
    return {path.name.split(".")[1].split("-")[0] for paths in places for path in paths}


def assert_loads_or_says_so(directory: Path) -> None:
    if (directory / "model.safetensors").exists():
        load_checkpoint(directory)
        return
    with pytest.raises(UserError, match=r"no trained weights yet|not a complete run directory"):
        load_checkpoint(directory)


def test_killed_at_random_instants(tmp_path, tiny_run, start, same_weights, read_metrics):
    rng = random.Random(SEED)
    run = tiny_run(stage_steps=(3, 3, 2), log_every=3, checkpoint_every=1, test_windows=3)
    whole = tmp_path / "whole"
    # twice: the first one waits for PyTorch
    for out in (tmp_path / "warm", whole):
        begun, process = time.monotonic(), start(run, out)
        process.join()
        assert process.exitcode == 0
        seconds = time.monotonic() - begun
    print(f"{KILLS} kills, TARFLOWLM_KILL_SEED={SEED}, {seconds:.1f} s uninterrupted")
    kills, finished, hit = 0, 0, set()
    while kills < KILLS or finished == 0:
        out = tmp_path / f"run-{finished}"
        process, instant = start(run, out), rng.uniform(0, seconds)
        if kills < KILLS:
            process.join(instant)
            if kills % 2:  # the next thing that is written
                while process.is_alive() and not partial(out):
                    time.sleep(0.0005)
            process.kill()
        process.join()
        if process.exitcode == 0:
            assert same_weights(whole, out)
            assert same_weights(whole / "best", out / "best")
            assert read_metrics(whole) == read_metrics(out)
            finished += 1
            continue
        assert process.exitcode == -9
        kills += 1
        hit |= partial(out)
        print(f"killed after {instant:.2f} s, writing {', '.join(sorted(partial(out))) or 'nothing'}")
        for directory in (out, out / "best"):
            if directory.exists():
                assert_loads_or_says_so(directory)
    assert hit, "no kill came while something was written"
