"""An array of processes gives what one process gives: evaluation, samples and scores in parts."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tarflowlm import chunks
from tarflowlm.errors import UserError
from tarflowlm.parts import share

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("total", [0, 1, 5, 12])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_cover_the_work_once(total, count):
    shares = [share(f"{number}/{count}", total) for number in range(1, count + 1)]
    assert [place for one in shares for place in one] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "1/0", "a/b", "", "-1/2"])
def test_wrong_parts_are_named(text):
    with pytest.raises(UserError, match=f"part {text}: give it as"):
        share(text, 9)


def lines_of(run, count: int, *argv: object) -> list[str]:
    """What every part of a command prints."""
    shown = [run(*argv, "--part", f"{number}/{count}") for number in range(1, count + 1)]
    assert not any(one.status for one in shown), shown
    return [one.out for one in shown]


def kept(folder: Path, texts: list[str]) -> list[Path]:
    files = [folder / f"part-{number}.json" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    return files


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flow", ["--samples", 3, "--seed", 2]),
        ("ar", ["--stride", 4]),
        ("one", ["--stride", 4, "--samples", 2]),
    ],
)
@pytest.mark.parametrize("count", [2, 12])
def test_evaluation_in_parts_is_that_of_one_process(
    run, run_json, models, tmp_path, monkeypatch, name, options, count
):
    monkeypatch.setattr(chunks, "EVALUATED_TOKENS", 48)  # three windows at once
    argv = ["eval", models[name], "--windows", 10, *options]
    whole = run_json(*argv)
    files = kept(tmp_path, lines_of(run, count, *argv))
    merged = run_json(*argv, "--merge", *reversed(files))
    assert merged | {"seconds": 0} == whole | {"seconds": 0}


def test_other_files_are_not_merged(run, refused, models, model, tmp_path):
    argv = ["eval", model, "--windows"]
    first, second = kept(tmp_path, lines_of(run, 2, *argv, 8))
    other = tmp_path / "config.json"
    other.write_text('{"text": 1}', encoding="utf-8")
    for windows, files in ((8, [first]), (8, [first, first]), (7, [first, second]), (8, [other])):
        shown = run(*argv, windows, "--merge", *files)
        assert shown.status == 2
        assert f"not the parts of {windows} windows" in shown.err
    # of another model, or other draws
    for changed in ([models["one"]], [model, "--seed", 1], [model, "--samples", 2]):
        shown = run("eval", *changed, "--windows", 8, "--merge", first, second)
        assert (shown.status, "not the parts of 8 windows" in shown.err) == (2, True)
    refused(*argv, 8, "--merge", first, "--part", "1/2", names=["--part with --merge"])


def test_samples_in_parts_are_those_of_one_process(run, models, tmp_path):
    argv = ["sample", models["flow"], "--num", 5, "--length", 8, "--seed", 4]
    argv += ["--decoder", "steps", "--out"]
    assert run(*argv, tmp_path / "whole.jsonl").status == 0
    text = ""
    for number in range(1, 8):
        out = tmp_path / f"{number}.jsonl"
        assert run(*argv, out, "--part", f"{number}/7").status == 0
        text += out.read_text(encoding="utf-8") if out.exists() else ""
    assert text == (tmp_path / "whole.jsonl").read_text(encoding="utf-8")


def test_scores_in_parts_are_those_of_one_process(run, run_json, models, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("the cat\n\non a mat and\nsaw\nnine old men\nthe dog\n", encoding="utf-8")
    argv = ["score", models["flow"], "--texts", texts, "--samples", 2]
    whole = [json.loads(line) for line in run(*argv).out.splitlines()]
    alone = run_json("score", models["flow"], "--text", "saw", "--samples", 2)
    assert whole[2]["index"] == 2
    assert whole[2]["bits"] == pytest.approx(alone["bits"])
    parts = [json.loads(line) for line in "".join(lines_of(run, 2, *argv)).splitlines()]
    for one, other in zip(parts, whole, strict=True):
        assert one["bits"] == pytest.approx(other["bits"])
        assert (one["index"], one["characters"]) == (other["index"], other["characters"])


@pytest.mark.slow
def test_an_array_of_processes(run_json, models, tmp_path):
    argv = ["eval", str(models["flow"]), "--samples", "2", "--windows", "1200"]
    files = [tmp_path / "1.json", tmp_path / "2.json"]
    started = []
    for number, file in enumerate(files, 1):
        command = [sys.executable, "-m", "tarflowlm", *argv, "--part", f"{number}/2"]
        with file.open("w") as out:
            started.append(subprocess.Popen(command, stdout=out))
    assert [process.wait() for process in started] == [0, 0]
    whole = run_json(*argv)
    assert run_json(*argv, "--merge", *files) | {"seconds": 0} == whole | {"seconds": 0}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("dask") is None, reason="dask is not installed")
def test_an_engine_distributes_the_parts(run, models):
    argv = [str(models["flow"]), "--windows", "1200"]
    command = [sys.executable, str(EXAMPLES / "eval_on_dask.py"), "2", *argv]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    whole = run("eval", *argv).out
    rows = [line for line in whole.splitlines() if "seconds" not in line]
    assert "nats per token" in whole
    assert all(row in shown for row in rows if row.strip())
