"""Two processes that torchrun starts give what one gives; the first alone prints and writes."""

import json
import os
import subprocess
import sys

import pytest

from tarflowlm.processes import ALONE


def test_one_process_has_all_turns():
    assert list(ALONE.in_turn(iter("abc"))) == ["a", "b", "c"]


def torchrun(*argv: object) -> str:
    """What two processes print. Without -- torchrun takes --num for an option of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "--", "tarflowlm", *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_eval(run_json, models):
    # 1,200 windows of 16 tokens make three batches, which draw their noise one after the other
    argv = ["eval", models["flow"], "--samples", 3, "--seed", 2, "--windows", 1200, "--latents"]
    shared = json.loads(torchrun(*argv, "--json"))
    assert shared | {"seconds": 0} == run_json(*argv) | {"seconds": 0}


@pytest.mark.slow
def test_sample(run, models, tmp_path):
    argv = ["sample", models["flow"], "--num", 5, "--length", 8, "--seed", 4]
    argv += ["--decoder", "steps", "--out"]
    torchrun(*argv, tmp_path / "two.jsonl")
    assert run(*argv, tmp_path / "one.jsonl").status == 0
    one, two = ((tmp_path / f"{n}.jsonl").read_text(encoding="utf-8") for n in ("one", "two"))
    assert one == two
    assert len(one.splitlines()) == 5


@pytest.mark.slow
@pytest.mark.nightly
def test_score(run, models, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("the cat\n\non a mat and\nsaw\nnine old men\nthe dog\n", encoding="utf-8")
    argv = ["score", models["flow"], "--texts", texts, "--samples", 2]
    one, two = (
        [json.loads(line) for line in text.splitlines()]
        for text in (run(*argv).out, torchrun(*argv))
    )
    assert [line["index"] for line in two] == [0, 1, 2, 3, 4]
    for left, right in zip(one, two, strict=True):
        assert left["bits"] == pytest.approx(right["bits"])
        assert left["characters"] == right["characters"]


@pytest.mark.slow
@pytest.mark.nightly
def test_data(run_json, corpus_file, tmp_path):
    argv = ["data", corpus_file, "--kind", "byte", "--normalize", "none", "--json", "--out"]
    one = run_json(*argv[:-2], "--out", tmp_path / "one")
    two = json.loads(torchrun(*argv, tmp_path / "two"))
    assert two | {"out": one["out"]} == one
