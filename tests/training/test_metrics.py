"""metrics.jsonl and its reporter."""

import json

from tarflowlm.training.metrics import MetricsLog, Reporter


class Heard(Reporter):
    def __init__(self) -> None:
        self.records = []

    def record(self, record):
        self.records.append(record)


def test_lines_are_on_disk_and_told_as_they_are_written(tmp_path):
    heard = Heard()
    log = MetricsLog(tmp_path, heard)
    log.write({"step": 1, "bpc": 4.5})
    # before it is closed
    assert json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8")) == {"step": 1, "bpc": 4.5}
    assert heard.records == [{"step": 1, "bpc": 4.5}]
    log.close()


def test_resuming_drops_what_came_after_and_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {n}}}\n' for n in (1, 2, 3)) + '{"step": 4, "bp', encoding="utf-8")
    log = MetricsLog(tmp_path, Reporter(), resume_at=2)
    log.write({"step": 3, "again": True})
    log.close()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_resuming_without_a_log_begins_one(tmp_path):
    log = MetricsLog(tmp_path, Reporter(), resume_at=5)
    log.write({"step": 6})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 6}\n'


def test_the_silent_reporter_says_nothing(capsys):
    reporter = Reporter()
    reporter.stage(0, 1, 1, 0, "x")
    reporter.step(3)
    reporter.record({})
    reporter.notice("hello")
    assert capsys.readouterr() == ("", "")
