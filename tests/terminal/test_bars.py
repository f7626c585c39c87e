"""Progress: plain lines in a log file, bars on a terminal."""

import io
import logging

import pytest
from rich.console import Console

from tarflowlm.terminal.bars import Bars, NoticeHandler, print_notice

TRAIN = {"split": "train", "step": 1520, "bpc": 2.3114, "tokens_per_second": 6945.2}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines(capsys, monkeypatch):
    """lines(): what was written to the log since the last call."""
    # rich takes a pipe for a terminal then
    monkeypatch.setenv("FORCE_COLOR", "1")

    def read() -> list[str]:
        text = capsys.readouterr().err
        assert not {"\x1b", "\r"} & set(text)
        return text.splitlines()

    return read


def work(bars, clock, count, seconds):
    for _ in range(count):
        clock.now += seconds
        bars.advance()


def test_a_line_comes_soon_and_then_every_half_minute(lines, clock):
    with Bars(clock=clock) as bars:
        bars.stage("evaluating", 209)
        work(bars, clock, 209, 0.4)
        found = lines()
        assert found[0] == "evaluating: 8 of 209 (3 %), 2.5/s, 0:01:21 left"
        assert [line.split()[1] for line in found] == ["8", "83", "158"]
        bars.stage("reading, characters")
        work(bars, clock, 8, 0.4)
        assert lines() == ["reading, characters: 8, 2.5/s"]
        bars.stage("quick", 7)
        work(bars, clock, 7, 0.4)
        assert lines() == []


@pytest.mark.parametrize("width", [130, 80, 60])
def test_a_terminal_shows_a_bar_that_fits(width, clock):
    console = Console(file=Terminal(), width=width, force_terminal=True)
    with Bars(keep=True, console=console, clock=clock) as reporter:
        for index in range(2):
            reporter.stage(f"stage {index + 1}/3: block {index + 1} mixd", 2600)
            work(reporter, clock, 200, 0.25)
            reporter.record(TRAIN)
        reporter.advance(0)
        paper = Console(file=io.StringIO(), width=width)
        paper.print(reporter.progress.get_renderable())
    shown = paper.file.getvalue()
    text = " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= width
    for part in ("block 1 mixd", "block 2 mixd", "step 1,521", "2.311 bpc", "0:10:00"):
        assert part in text
    assert ("━━━" in shown) == ("tokens/s" in text) == (width == 130)


def test_notices_are_lines_and_are_lost_where_nobody_reads(lines, monkeypatch):
    handler = NoticeHandler()
    handler.emit(
        logging.LogRecord("tarflowlm", logging.INFO, "", 0, "resuming %s", ("runs/x",), None)
    )
    assert lines() == ["resuming runs/x"]

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Closed())
    print_notice("evaluating")


VALID = {"split": "valid", "step": 40, "bpc": 2.5, "text": "Once\nupon \x1b[31ma time " * 9}


def test_a_text_of_a_run_is_one_line_in_a_log(capsys, clock):
    with Bars(keep=True, console=Console(file=io.StringIO()), clock=clock) as reporter:
        reporter.stage("block 1 mixd", 100)
        reporter.record(VALID)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("  Once upon \ufffd[31ma time Once upon")
    assert len(line) == 100


def test_a_text_of_a_run_is_one_line_above_the_bar(clock):
    file = Terminal()
    console = Console(file=file, width=60, force_terminal=True, color_system=None)
    with Bars(keep=True, console=console, clock=clock) as reporter:
        reporter.stage("block 1 mixd", 100)
        reporter.record(VALID)
    shown = [line for line in file.getvalue().splitlines() if "Once upon" in line]
    assert len(shown) == 1
    assert "\x1b[31m" not in file.getvalue()
