"""Progress: plain lines where stderr is no terminal, bars that fit where it is one."""

import errno
import io
import re

import pytest
from rich.console import Console

from tarflowlm.terminal.bars import bar, corpus_bar, stages_bar
from tarflowlm.terminal.progress import PlainLines, minutes, per_second
from tarflowlm.terminal.tables import print_notice
from tarflowlm.terminal.training import ProgressReporter

TRAIN = {"split": "train", "bpc": 2.3114, "tokens_per_second": 6945.2}
VALID = {"split": "valid", "bpc": 2.402}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pipe(monkeypatch):
    # rich takes it for a terminal then
    monkeypatch.setenv("FORCE_COLOR", "1")
    return Console(file=io.StringIO(), width=40)


def lines(console: Console) -> list[str]:
    text = console.file.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    return text.splitlines()


def train(reporter, clock, *, steps, every=20, seconds=0.25, shares=None):
    for step in range(1, steps + 1):
        clock.now += seconds
        reporter.step(2048, None if shares is None else shares * step / steps)
        if step % every == 0:
            reporter.record(TRAIN)


def test_training_writes_a_line_soon_and_then_every_half_minute(pipe, clock):
    with ProgressReporter(pipe, clock=clock) as reporter:
        reporter.stage(0, 3, 2600, 0, "block 1 mixd")
        train(reporter, clock, steps=20)
        assert lines(pipe) == [
            "stage 1/3 block 1 mixd: step 20 of 2,600 (0 %), train 2.311 bpc, 6,945 tokens/s, 10:45 left"
        ]
        reporter.record(VALID)
        train(reporter, clock, steps=180)
    assert len(lines(pipe)) == 2
    assert lines(pipe)[1] == (
        "stage 1/3 block 1 mixd: step 140 of 2,600 (5 %), train 2.311 bpc, valid 2.402, 6,945 tokens/s, 10:15 left"
    )


def test_lines_wait_for_the_log(pipe, clock):
    with ProgressReporter(pipe, clock=clock) as reporter:
        reporter.stage(0, 1, 1000, 0, "baseline")
        train(reporter, clock, steps=1000, every=500, seconds=0.125)
    assert [re.findall(r"step (\S+) of", line)[0] for line in lines(pipe)] == ["105", "500", "1,000"]
    # the first line does not wait long for a loss
    assert lines(pipe)[0] == "baseline: step 105 of 1,000 (10 %), 16,384 tokens/s, 1:52 left"


def test_a_resumed_stage_counts_its_pace_from_where_it_goes_on(pipe, clock):
    with ProgressReporter(pipe, clock=clock) as reporter:
        reporter.stage(0, 1, 1000, 500, "baseline")
        train(reporter, clock, steps=100, every=100, seconds=0.1)
    assert lines(pipe) == ["baseline: step 600 of 1,000 (60 %), train 2.311 bpc, 6,945 tokens/s, 0:40 left"]


def test_a_stage_given_by_time(pipe, clock):
    with ProgressReporter(pipe, clock=clock) as reporter:
        reporter.stage(1, 2, 0, 0, "block 2 mix1")
        train(reporter, clock, steps=20, shares=0.25)
    assert lines(pipe) == ["stage 2/2 block 2 mix1: step 20 (25 %), train 2.311 bpc, 6,945 tokens/s, 0:15 left"]


def test_a_resumed_stage_given_by_time(pipe, clock):
    with ProgressReporter(pipe, clock=clock) as reporter:
        reporter.stage(0, 1, 0, 300, "baseline")
        for share in (0.5, 0.5625, 0.625, 0.6875):
            clock.now += 4
            reporter.step(2048, share)
        reporter.record(TRAIN)
    assert lines(pipe) == ["baseline: step 304 (68 %), 512 tokens/s, 0:20 left"]


def test_the_test_split_follows_the_stages(pipe, clock):
    with ProgressReporter(pipe, clock=clock) as reporter:
        reporter.stage(0, 1, 10, 0, "baseline")
        train(reporter, clock, steps=10)
        for done in (0, 32, 64, 96):
            reporter.testing(done, 96)
            clock.now += 2
    assert lines(pipe) == ["evaluating the test split: 64 of 96 (66 %), 16/s, 0:02 left"]


def test_a_bar_writes_lines(pipe, clock):
    with bar(pipe, "evaluating", 2090, clock=clock) as update:
        for done in range(0, 2091, 10):
            update(done)
            clock.now += 0.4
    assert lines(pipe)[0] == "evaluating: 80 of 2,090 (3 %), 25/s, 1:20 left"
    assert [line.split()[1] for line in lines(pipe)] == ["80", "830", "1,580"]


def test_what_is_quick_writes_nothing(pipe, clock):
    with bar(pipe, "evaluating", 10, clock=clock) as update:
        for done in range(11):
            update(done)
            clock.now += 0.1
    assert lines(pipe) == []


def test_stages_have_names_and_may_have_no_total(pipe, clock):
    with corpus_bar(pipe, "words.txt", clock=clock) as update:
        for stage, total in (("count", None), ("encode", 100_000)):
            for done in range(0, 60_000, 10_000):
                update(stage, done, total)
                clock.now += 1
    assert lines(pipe) == [
        "reading words.txt, characters: 30,000, 10,000/s",
        "encoding words.txt, characters: 30,000 of 100,000 (30 %), 10,000/s, 0:07 left",
    ]


def test_the_same_stage_again_starts_anew(pipe, clock):
    with stages_bar(pipe, clock=clock) as update:
        for _ in range(2):
            for done in range(5):
                update("rounds", done, 10)
                clock.now += 2
    assert lines(pipe) == ["rounds: 2 of 10 (20 %), 2.0 s each, 0:16 left"] * 2


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_log_that_cannot_be_written_does_not_end_the_work(clock, error):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    print_notice(Console(file=Closed()), "evaluating")
    plain = PlainLines(Console(file=Closed()), clock=clock)
    plain.begin("evaluating")
    plain.write("1", 0.5)
    clock.now += 1e6
    assert plain.overdue() is None


def test_durations_and_rates():
    assert [minutes(s) for s in (0.0, 59.6, 346.0, 7546.0)] == ["0:00", "1:00", "5:46", "2:05:46"]
    assert [per_second(r) for r in (6945.0, 9.5, 0.25)] == ["6,945/s", "9.5/s", "4.0 s each"]


def rendered(width: int, *, minutes: bool = False) -> list[str]:
    """What a run of three stages shows in its second one."""
    terminal, clock = Console(file=Terminal(), width=width, force_terminal=True), Clock()
    with ProgressReporter(terminal, clock=clock) as reporter:
        for index in range(2):
            reporter.stage(index, 3, 0 if minutes else 2600, 0, f"block {index + 1} mixd")
            train(reporter, clock, steps=200, shares=0.5 if minutes else None)
            reporter.record(VALID)
        paper = Console(file=io.StringIO(), width=width)
        paper.print(reporter.progress.get_renderable())
    return lines(paper)


def test_a_wide_terminal_shows_everything():
    _, line = rendered(130)
    for part in ("stage 2/3: block 2 mixd", "200/2600", "6,945 tok/s", "train 2.311 bpc", "valid 2.402", "eta"):
        assert part in line
    assert "━━━" in line


@pytest.mark.parametrize("minutes", [False, True])
def test_eighty_columns_keep_steps_loss_and_eta(minutes):
    shown = rendered(80, minutes=minutes)
    assert len(shown) == 2
    for number, line in enumerate(shown, 1):
        assert len(line) <= 80
        assert f"{number}/3 block {number} mixd" in line
        assert "train 2.311" in line
        assert re.search(r"\d:\d\d:\d\d$|-:--:--$", line.rstrip())
        assert "…" not in line
    assert ("step 200, 50 %" if minutes else "200/2600") in shown[1]


def test_forty_columns_keep_steps_and_eta():
    _, line = rendered(40)
    assert "200/2600" in line
    assert re.search(r"\d:\d\d:\d\d$", line.rstrip())


def test_the_command_line_writes_lines(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TARFLOWLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(PlainLines, "first", 0.0)
    monkeypatch.setattr(PlainLines, "every", 0.0)
    text = tmp_path / "words.txt"
    text.write_text("the cat sat on the mat " * 400, encoding="utf-8")
    tiny = ["--model.context", 32, "--model.trunk.width", 32, "--train.batch-size", 4, "--model.blocks.0.layers", 1]
    argv = ["--data", text, "--steps", 9, "--train.log-every", 1, "--train.evaluate-windows", 4, *tiny]
    done = run("train", "mini-mixd", "--out", tmp_path / "run", *argv, "--device", "cpu")
    assert done.status == 0
    assert "\x1b" not in done.err
    assert "\r" not in done.err
    pattern = r"stage 1/3 block 1 mixd: step 2 of 7 \(28 %\), train \d\.\d{3} bpc, [\d,]+ tokens/s, 0:\d\d left\n"
    assert re.search(pattern, done.err), done.err
    done = run("eval", tmp_path / "run", "--data", text, "--split", "all", "--stride", 32)
    assert re.match(r"(?:.*\n)*evaluating 287 windows of 32 tokens: \S*words.txt, all\n", done.err), done.err
    assert re.search(r"\nevaluating: 256 of 287 \(89 %\), [\d,.]+/s, 0:00 left\n", done.err), done.err
    done = run("sample", tmp_path / "run", "--length", 8)
    assert re.search(r"sampling, positions: 2 of 24 \(8 %\), [\d,.]+/s, 0:\d\d left\n", done.err), done.err
