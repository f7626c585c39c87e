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
    log = MetricsLog(tmp_path, Reporter())
    log.write({"step": 1})
    log.write({"step": 2})
    position = log.position()
    assert position == path.stat().st_size
    # of the very same step, but after the checkpoint
    log.write({"step": 2, "bpc": 4.0})
    log.close()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "bp')
    log = MetricsLog(tmp_path, Reporter(), resume_at=position)
    log.write({"step": 3, "again": True})
    log.close()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_log_that_lost_its_end_is_cut_at_a_whole_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st', encoding="utf-8")
    log = MetricsLog(tmp_path, Reporter(), resume_at=1000)
    log.write({"step": 5})
    log.close()
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n{"step": 5}\n'


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
