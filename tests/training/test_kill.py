"""kill -9 at random instants, in saves too: the run that was resumed is the run that was never killed.

More kills, or the same ones again: TARFLOWLM_KILLS=200 TARFLOWLM_KILL_SEED=7 pytest -s tests/training/test_kill.py
The command line, killed after these seconds and at ten random instants more:
    TARFLOWLM_KILL_SECONDS=1,3,8,20 TARFLOWLM_KILLS=10 pytest -s tests/training/test_kill.py -k command
"""

import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tarflowlm.training.lifecycle import resume, train

from tarflowlm.config import RunConfig
from tarflowlm.errors import UserError
from tarflowlm.runs.checkpoint import load_checkpoint

KILLS = int(os.environ.get("TARFLOWLM_KILLS", "20"))
SEED = int(os.environ.get("TARFLOWLM_KILL_SEED", "0")) or random.randrange(1, 10**6)


def work(run: RunConfig, out: Path, cache: str) -> None:
    """In a process of its own: begin the run, or go on with it, as a user would."""
    os.environ["TARFLOWLM_CACHE"] = cache
    torch.set_num_threads(1)
    if (out / "config.json").exists():
        resume(out, device=torch.device("cpu"))
    else:
        train(run, out, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def start():
    """start(run, out): a process that trains. It is forked from one that has PyTorch loaded and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tarflowlm.training.lifecycle"])

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


def test_the_command_line_killed_and_resumed(tmp_path, corpus_file, same_weights):
    """As a user does: `train`, and after every kill `train --resume`, or `train` where nothing was written yet."""
    instants = [float(s) for s in os.environ.get("TARFLOWLM_KILL_SECONDS", "").split(",") if s]
    rng, whole, out = random.Random(SEED), tmp_path / "whole", tmp_path / "run"
    options = ["--data", str(corpus_file), "--steps", "1500" if instants else "20", "--checkpoint-every", "5"]
    options += ["--model.context", "64", "--train.test-windows", "8", "--train.evaluate-every", "10"]

    def command(folder: Path) -> list[str]:
        resumed = ["--resume", str(folder)] if (folder / "config.json").exists() else None
        return [sys.executable, "-m", "tarflowlm", "train", *(resumed or ["mini-ar", "--out", str(folder), *options])]

    begun = time.monotonic()
    subprocess.run(command(whole), check=True, capture_output=True)
    seconds = time.monotonic() - begun
    # a start takes some seconds; a long run is not to be over before its last kill
    low, high, kills = (0.5, 10.0, KILLS) if instants else (0.2 * seconds, seconds, 2)
    instants += [rng.uniform(low, high) for _ in range(kills)]
    for instant in instants:
        process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, told = process.communicate(timeout=instant)
            # it came to its end, or says that it had done so before
            assert process.returncode == 0 or "is finished" in told, told
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            states = sorted(path.name for path in (out / "state").glob("step-*"))
            print(f"killed after {instant:.1f} s, newest state {states[-1] if states else 'none'}")
    if not (out / "summary.json").exists():
        subprocess.run(command(out), check=True, capture_output=True)
    assert same_weights(whole, out)
