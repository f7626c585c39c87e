"""Two processes that torchrun starts give what one gives; the first alone prints and writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torchrun_cases

from tarflowlm.processes import ALONE


def test_one_process_has_all_turns():
    assert list(ALONE.in_turn(iter("abc"))) == ["a", "b", "c"]


def torchrun(folder: Path, *argv: object) -> str:
    """What two processes print. torchrun leaves its own files in the folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    done = subprocess.run(
        [*command, *map(str, argv)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def commands(models, tmp_path_factory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("torchrun")
    texts = folder / "texts.txt"
    texts.write_text("the cat\n\non a mat and\nsaw\nnine old men\nthe dog\n", encoding="utf-8")
    options = {
        # 1,200 windows of 16 tokens make three batches, which draw their noise one after the other
        "eval": ["--samples", 3, "--seed", 2, "--windows", 1200, "--latents", "--json"],
        "sample": ["--num", 5, "--length", 8, "--seed", 4, "--decoder", "steps"],
        "score": ["--texts", texts, "--samples", 2],
    }
    options["sample"] += ["--out", folder / "two.jsonl"]
    return {name: [name, str(models["flow"]), *map(str, more)] for name, more in options.items()}


@pytest.fixture(scope="module")
def printed(commands, tmp_path_factory) -> dict[str, str]:
    """What two processes print, by command."""
    folder = tmp_path_factory.mktemp("printed")
    found = torchrun(folder, torchrun_cases.__file__, json.dumps(list(commands.values())))
    return dict(zip(commands, json.loads(found), strict=True))


@pytest.mark.slow
def test_eval(printed, commands, run):
    one, two = (json.loads(text) for text in (run(*commands["eval"]).out, printed["eval"]))
    assert two | {"seconds": 0} == one | {"seconds": 0}


@pytest.mark.slow
def test_sample(printed, commands, run, tmp_path):
    *argv, two = commands["sample"]
    assert run(*argv, tmp_path / "one.jsonl").status == 0
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "one.jsonl", Path(two))]
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == 5


@pytest.mark.slow
def test_score(printed, commands, run):
    one, two = (
        [json.loads(line) for line in text.splitlines()]
        for text in (run(*commands["score"]).out, printed["score"])
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
    # without -- torchrun takes --num for an option of its own
    two = json.loads(torchrun(tmp_path, "-m", "--", "tarflowlm", *argv, tmp_path / "two"))
    assert two | {"out": one["out"]} == one
