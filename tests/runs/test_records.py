"""Run directories as a report reads them, whole and in pieces."""

import json
import shutil

import numpy as np
import pytest

from helpers import metrics_of
from tarflowlm.errors import UserError
from tarflowlm.runs.records import find_runs, read_record


@pytest.fixture
def directory(runs, tmp_path):
    """A run to be changed."""
    return shutil.copytree(runs["progressive"], tmp_path / "progressive")


def test_finished_run(runs):
    record = read_record(runs["progressive"])
    assert (record.name, record.status, record.run.model.bound, record.notes) == (
        "progressive",
        "finished",
        "elbo",
        [],
    )
    assert record.train["step"].tolist() == list(range(1, 15))
    assert record.valid["step"].tolist() == [0, 3, 6, 6, 9, 10, 10, 12, 14]
    assert record.valid["seconds"][0] == 0 < record.valid["seconds"][1]
    block = record.train["block"]
    ends = np.flatnonzero(np.diff(block))
    assert block[ends + 1].tolist() == [2, 3]
    assert record.train["tokens"][ends].tolist() == [192, 320]
    assert read_record(runs["baseline"]).run.model.bound == "exact"


def test_seconds_add_up_over_stages(directory):
    speeds = {1: 100.0, 2: 300.0, 3: 50.0}
    train = [line for line in metrics_of(directory) if line["split"] == "train"]
    lines = [line | {"tokens_per_second": speeds[line["block"]]} for line in train]
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    record = read_record(directory)
    assert record.train["seconds"][-1] == pytest.approx(6 * 32 / 100 + 4 * 32 / 300 + 4 * 32 / 50)
    assert len(record.valid["seconds"]) == 0
    # the first step of a compiled run has no time
    lines[0]["tokens_per_second"] = 0.0
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert read_record(directory).train["seconds"][0] == 0


def test_incomplete_lines_and_an_empty_summary_are_left_out(directory):
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # a line of another kind is no mistake, and the last one may be incomplete
    text = "".join(['{"split": "event", "step": 2}\n', "no json\n", *lines, lines[0][:30]])
    path.write_text(text, encoding="utf-8")
    (directory / "summary.json").write_text("{}", encoding="utf-8")
    record = read_record(directory)
    assert len(record.train["step"]) == 14
    assert record.summary is None
    assert record.status == "stopped, step 14 of 14"


@pytest.mark.parametrize(
    "line", ["[]", "5", "{}", '{"split": "train"}', '{"split": "train", "step": []}']
)
def test_a_damaged_log_is_named(directory, line):
    (directory / "metrics.jsonl").write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        read_record(directory)


def test_a_damaged_summary_is_named(directory):
    whole = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    without = json.dumps(whole | {"stage_valid_bpc": []})
    for text in ("[1]", "5", '{"tokens": 3}', '{"test": []}', without):
        (directory / "summary.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"summary\.json is damaged.*train --resume"):
            read_record(directory)


def test_run_without_log(directory):
    (directory / "metrics.jsonl").write_text('{"split": "train", "st', encoding="utf-8")
    with pytest.raises(UserError, match="no logged step yet"):
        read_record(directory)
    for name in ("metrics.jsonl", "summary.json"):
        (directory / name).unlink()
    record = read_record(directory)
    assert record.status == "a model without its training log"
    assert len(record.train["block"]) == 0
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no logged step yet"):
        read_record(directory)


def test_runs_are_found_two_levels_down(runs, tmp_path):
    for place in ("near", "a/far", "a/b/too-far", ".hidden"):
        shutil.copytree(runs["baseline"], tmp_path / place)
    assert find_runs(tmp_path) == [tmp_path / "a" / "far", tmp_path / "near"]
    assert find_runs(tmp_path / "near") == [tmp_path / "near"]
    assert find_runs(tmp_path / "none") == []
