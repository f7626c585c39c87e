"""Run directories as a report reads them, whole and in pieces."""

import json
import shutil

import numpy as np
import pytest

from tarflowlm.errors import UserError
from tarflowlm.report.records import read_record, read_records


@pytest.fixture
def copy(runs, tmp_path):
    """copy(name): a run to be changed."""

    def make(name="progressive"):
        return shutil.copytree(runs[name], tmp_path / name)

    return make


def test_a_finished_run(runs):
    record = read_record(runs["progressive"])
    assert (record.name, record.status, record.sign, record.notes) == ("progressive", "finished", "<=", [])
    assert record.train["step"].tolist() == list(range(1, 15))
    assert record.valid["step"].tolist() == [3, 6, 9, 10, 12, 14]
    assert record.last_step == 14
    assert [(block, tokens) for block, tokens, _ in record.stage_starts] == [(2, 6 * 32), (3, 10 * 32)]
    assert read_record(runs["baseline"]).sign == "="


def test_seconds_are_those_that_the_run_counted(runs):
    for directory in runs.values():
        record = read_record(directory)
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        # the summary rounds to hundredths
        assert record.seconds[-1] == pytest.approx(sum(summary["stage_seconds"]), abs=0.02)
        assert (np.diff(record.valid_seconds) > 0).all()
        assert record.valid_seconds[-1] == pytest.approx(record.seconds[-1])


def test_medians_of_stages(copy):
    directory = copy()
    speeds = {1: 100.0, 2: 300.0, 3: 50.0}
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line | {"tokens_per_second": speeds[line["block"]]} for line in lines if line["split"] == "train"]
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    record = read_record(directory)
    assert record.stage_medians("tokens_per_second") == [100.0, 300.0, 50.0]
    assert record.seconds[-1] == pytest.approx(6 * 32 / 100 + 4 * 32 / 300 + 4 * 32 / 50)
    assert len(record.valid_seconds) == 0


def test_a_run_in_training_has_no_summary_and_a_last_line_cut_short(copy):
    directory = copy()
    (directory / "summary.json").unlink()
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:6]) + lines[6][:30], encoding="utf-8")
    record = read_record(directory)
    assert record.summary is None
    assert record.status == f"step {record.last_step} of 14: in training, or stopped"
    assert record.notes == []
    assert len(record.train["step"]) + len(record.valid["step"]) == 6


def test_unreadable_lines_and_summary_are_told(copy):
    directory = copy()
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[4:4] = ['{"split": "event", "step": 2}\n']  # of a kind that is not drawn: no mistake
    lines[2:2] = [
        "no json\n",
        '{"split": "train"}\n',
        lines[0].replace('"bpc": ', '"bpc": NaN, "x": '),
        "[1]\n",
        "\n",
    ]
    path.write_text("".join(lines), encoding="utf-8")
    (directory / "summary.json").write_text("{}", encoding="utf-8")
    record = read_record(directory)
    assert len(record.train["step"]) == 14
    assert any("5 of 26 lines of metrics.jsonl could not be read" in note for note in record.notes)
    assert any("summary.json cannot be used" in note for note in record.notes)
    assert record.summary is None


def test_a_model_without_a_log_is_a_run_without_lines(copy):
    directory = copy()
    for name in ("metrics.jsonl", "summary.json"):
        (directory / name).unlink()
    record = read_record(directory)
    assert not record.has_log
    assert record.status == "a model without its training log"
    assert (record.stage_starts, record.stage_medians("lr")) == ([], [])


def test_what_cannot_be_reported(copy, runs, tmp_path):
    directory = copy()
    with pytest.raises(UserError, match=r"have the same name 'progressive'"):
        read_records([runs["progressive"], directory])
    with pytest.raises(UserError, match="give each run once"):
        read_records([directory, directory / "."])
    (directory / "metrics.jsonl").write_text('{"split": "train", "st', encoding="utf-8")
    with pytest.raises(UserError, match="has no metrics yet"):
        read_record(directory)
    (directory / "metrics.jsonl").unlink()
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no metrics yet"):
        read_record(directory)
    with pytest.raises(UserError, match="is not a directory"):
        read_record(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        read_record(tmp_path)
