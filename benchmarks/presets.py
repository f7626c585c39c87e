"""Memory of a training of each preset, and samples a second of shipped models, on one core.

    python benchmarks/presets.py > docs/reproduce/presets.csv     # ten minutes
    python benchmarks/presets.py mini-ar mini-mixd

Memory is the most that `tarflowlm train` held over 12 steps and the evaluation before them, in MB.
Samples are whole windows of the context, 16 at once, by `tarflowlm sample`, of the shipped model of
that preset. One process each; leave the machine alone meanwhile.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tarflowlm.presets import FOR_CPU
from tarflowlm.runs.checkpoint import read_run
from tarflowlm.runs.hub import folder_of, released

TINY = ["--steps", "12", "--train.test-windows", "4", "--device", "cpu"]


def memory(name: str) -> int:
    """The peak memory of a short training, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", name, "--out", str(Path(folder) / "run"), *TINY]
        process = subprocess.Popen(
            [sys.executable, "-m", "tarflowlm", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, used = os.wait4(process.pid, 0)
    assert status == 0, f"{name} failed"
    return used.ru_maxrss // (1 << 10 if sys.platform == "linux" else 1 << 20)


def samples_per_second(name: str) -> str:
    """Of the shipped model of a preset; empty without one."""
    models = [one for one in released() if read_run(folder_of(one)).name == name]
    if not models:
        return ""
    words = ["sample", models[0], "--num", "16", "--no-stop", "--device", "cpu", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "tarflowlm", *words], capture_output=True, text=True, check=True
    )
    return f"{16 / json.loads(done.stdout.splitlines()[-1])['seconds']:.1f}"


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    print("preset,MB,samples/s")
    for name in sys.argv[1:] or FOR_CPU:
        print(name, memory(name), samples_per_second(name), sep=",", flush=True)


if __name__ == "__main__":
    main()
