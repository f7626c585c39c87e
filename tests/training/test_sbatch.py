"""examples/train.sbatch starts a run, saves it and requeues itself before its time is up, and
resumes it.

Run by bash, with a stand-in for SLURM on one machine: `srun` runs its command here, and kills it on
SIGTERM, as the real one; `scancel` brings a signal to that command alone, not to what it started;
`scontrol` notes its arguments. torchrun, the two processes and their signals are real.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_cases import process_with

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
SCRIPT = Path(__file__).parents[2] / "examples" / "train.sbatch"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
"$@" &
task=$!
echo "$task" > "$NOTES.task"
trap 'kill -KILL $(pgrep -P "$task") "$task"' TERM
wait "$task"
"""
SCANCEL = """#!/bin/bash
echo "scancel $@" >> "$NOTES"
[ "$1 $2" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM "$(cat "$NOTES.task")"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$NOTES"
[ "$1 $2" = "show hostnames" ] && printf '127.0.0.1\\nnever-asked\\n'
exit 0
"""
FIELDS = (
    "--steps",
    "150",
    "--model.context",
    "16",
    "--model.trunk.width",
    "8",
    "--model.layers",
    "1",
    "--train.batch-size",
    "4",
    "--train.log-every",
    "1",
    "--train.test-windows",
    "2",
    "--train.evaluate-every",
    "1000",
    "--train.parallel",
    "fsdp",
    "--optim.optimizer",
    "adamw",
)


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job with one machine of two `GPUs`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    path = os.pathsep.join((str(folder), str(Path(sys.executable).parent), os.environ["PATH"]))
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    numbers = range(os.getpid(), os.getpid() + 100)
    job["SLURM_JOB_ID"] = str(next(number for number in numbers if is_free(20000 + number % 20000)))
    return {
        **os.environ,
        **job,
        "PATH": path,
        "NOTES": str(tmp_path / "notes"),
        "OMP_NUM_THREADS": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60",
    }


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def submit(slurm: dict[str, str], *args: object) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *map(str, args)],
        env=slurm,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_job_saves_itself_requeues_and_resumes(slurm, tmp_path, corpus_file):
    run = tmp_path / "run"
    job = submit(slurm, "mini-ar", run, "--data", corpus_file, *FIELDS)
    deadline = time.monotonic() + 300
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and job.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    begun = time.time()
    job.send_signal(signal.SIGTERM)
    out = job.communicate(timeout=300)[0]
    assert job.returncode == 0, out
    (state,) = (run / "state").glob("step-*")
    assert state.stat().st_mtime > begun
    assert f"saved in {state}; back into the queue" in out
    notes = Path(slurm["NOTES"]).read_text(encoding="utf-8")
    assert f"requeue {slurm['SLURM_JOB_ID']}" in notes
    assert not (run / "summary.json").exists()

    lines = metrics.read_text(encoding="utf-8").count("\n")
    job = submit(slurm, "mini-ar", run, "--data", corpus_file, *FIELDS)
    while metrics.read_text(encoding="utf-8").count("\n") < lines + 3 and job.poll() is None:
        time.sleep(0.05)
    # a process that dies is started again, and with it the others
    os.kill(process_with(run / ".lock"), signal.SIGKILL)
    out = job.communicate(timeout=300)[0]
    assert job.returncode == 0, out
    assert out.count("resuming") == 2
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert (summary["steps"], summary["processes"]) == (150, 2)
    steps = [
        line["step"] for line in map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    ]
    assert steps == sorted(steps)
