"""Two processes that break at the worst moments give the weights of two that do not."""

import os
import subprocess
import sys
from pathlib import Path

import broken_cases
import pytest
from training_cases import same_weights

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
FIELDS = """
    --device cpu --model.context 16 --model.trunk.width 8 --train.batch-size 4 --train.log-every 5
    --train.test-windows 2 --train.evaluate-windows 4 --train.stage-steps 12 12 12
    --train.evaluate-every 4 --train.checkpoint-every 3 --train.ema 0.9 --train.dropout 0.1
"""


def train(run: Path, text: Path, place: str = "") -> subprocess.CompletedProcess[str]:
    """Two processes, which torchrun starts again up to twice."""
    program = ["-m", "tarflowlm"]
    if place:
        program = [broken_cases.__file__, str(run.parent / "mark"), place]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", *program, "train", "mini-mixd", *FIELDS.split()]
    return subprocess.run(
        [sys.executable, *command, "--data", str(text), "--out", str(run)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, corpus_file):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    done = train(run, corpus_file)
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("place", broken_cases.PLACES)
def test_a_run_that_breaks_ends_with_the_same_weights(place, unbroken, tmp_path, corpus_file):
    run = tmp_path / "run"
    done = train(run, corpus_file, place)
    assert (tmp_path / "mark").exists()
    assert done.returncode == 0, done.stderr
    assert same_weights(run, unbroken)
    assert not list((run / "state").glob(".*"))
