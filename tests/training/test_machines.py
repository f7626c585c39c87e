"""Training on two machines goes on after a process of either one is killed.

Two agents of torchrun are the machines, with one process each.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from training_cases import free_port, process_with

from helpers import metrics_of

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
PATIENCE = 600
"""Seconds for a start or a restart, which take 10 to 30; a hang would take hours."""
FIELDS = """
    --device cpu --steps 1000000 --model.context 16 --model.trunk.width 8 --model.layers 1
    --train.batch-size 4 --train.log-every 5 --train.test-windows 2 --train.evaluate-every 1000000
    --train.checkpoint-every 10
"""


def start(run: Path, text: Path, port: int) -> subprocess.Popen:
    words = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "7"]
    words += ["--max-restarts", "3", "-m", "tarflowlm", "train", "mini-ar", *FIELDS.split()]
    return subprocess.Popen(
        [sys.executable, *words, "--data", str(text), "--out", str(run)],
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"},
    )


def children(process: int) -> list[int]:
    done = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def wait_for_steps(run: Path, count: int, agents: list[subprocess.Popen]) -> None:
    """Return once the log has so many steps more than now, or fewer and then more."""
    begun = time.monotonic()
    seen = newest_step(run)
    while newest_step(run) < seen + count:
        assert time.monotonic() < begun + PATIENCE
        assert all(agent.poll() is None for agent in agents)
        time.sleep(0.1)


def newest_step(run: Path) -> int:
    # the last line may be incomplete
    with suppress(FileNotFoundError, ValueError, IndexError):
        return metrics_of(run)[-1]["step"]
    return -1


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_training_goes_on_after_a_worker_of_either_machine_is_killed(tmp_path, corpus_file):
    run = tmp_path / "run"
    port = free_port()
    agents = [start(run, corpus_file, port) for _ in range(2)]
    try:
        wait_for_steps(run, 20, agents)
        for victim in ("second", "first"):
            first = process_with(run / ".lock")
            workers = [worker for agent in agents for worker in children(agent.pid)]
            (second,) = {*workers} - {first}
            begun = time.monotonic()
            os.kill(first if victim == "first" else second, signal.SIGKILL)
            wait_for_steps(run, 50, agents)
            # all processes are new
            new = [worker for agent in agents for worker in children(agent.pid)]
            assert len(new) == 2
            assert not {*new} & {*workers}
            print(f"{victim}: {time.monotonic() - begun:.1f} s")
    finally:
        for agent in agents:
            for process in (*children(agent.pid), agent.pid):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            agent.wait()
