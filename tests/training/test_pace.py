"""Runs that are given time instead of steps, by a clock that is moved by hand."""

import json
from types import SimpleNamespace

import pytest
from training_cases import cut, resume, tiny_run

from tarflowlm.config import TrainConfig
from tarflowlm.runs.checkpoint import read_run
from tarflowlm.training import pace
from tarflowlm.training.pace import find_due, measure_pace
from tarflowlm.training.run import Counters


@pytest.mark.parametrize(
    # 6,000 seconds, 0.15 of which are kept for a test of unknown length
    ("stage", "start", "seconds"),
    [(0, 0.0, 0.8 * 5100), (1, 5000.0, 50.0)],
)
def test_stage_has_its_share_of_the_time_left(stage, start, seconds):
    """The stages have shares of 8, 1 and 1; a stage that comes late has half of what the last two
    have.
    """
    train = TrainConfig(stage_steps=(8, 1, 1), minutes=100.0)
    counters = Counters(step=10**6, stage=stage, stage_start=start, evaluation=1e-6, stage_step=1)
    measure_pace(train, counters, start + seconds / 2, 10)
    assert counters.share == pytest.approx(0.5)
    assert (counters.progress(train), counters.stage_is_over) == ((500, 1000), False)
    counters.stage_step = 2
    measure_pace(train, counters, start + seconds + 1, 10)
    assert counters.stage_is_over


def test_a_later_stage_without_time_for_its_steps_is_left_out():
    train = TrainConfig(stage_steps=(8, 1, 1), minutes=100.0)
    # 20 seconds a step: a tenth of the 5,100 seconds is too little
    counters = Counters(step=10, stage_step=10, evaluation=1e-6)
    measure_pace(train, counters, 200.0, 10)
    assert counters.share == pytest.approx(200 / 5100)
    counters = Counters(step=250, stage=1, stage_start=5000.0, evaluation=1e-6)
    measure_pace(train, counters, 5000.0, 10)
    assert counters.stage_is_over


@pytest.mark.parametrize(
    # of one evaluation; they take a tenth of the time at most
    ("seconds", "least", "most"),
    [(0.1, 9, 10), (12.0, 4, 5)],
)
def test_a_run_by_minutes_is_evaluated_about_ten_times(monkeypatch, seconds, least, most):
    train = TrainConfig(minutes=10.0, evaluate_every=10**6, checkpoint_every=10**6)
    run = SimpleNamespace(
        config=SimpleNamespace(train=train, num_stages=2),
        has_full_rate=False,
        counters=Counters(evaluation=seconds),
        device=SimpleNamespace(type="cpu"),
        stop_requested=lambda: None,
    )
    found = 0
    for step in range(1, 600):
        now = step + found * seconds
        monkeypatch.setattr(pace, "seconds", lambda run, now=now: now)
        run.counters.step = step
        if now < 600 and find_due(run).save and run.counters.evaluation_is_due:
            found += 1
            run.counters.evaluated = now + seconds
        run.counters.total = now
    assert least <= found <= most


@pytest.mark.slow
def test_killed_run_by_minutes_continues_with_the_time_left(tmp_path, corpus_file):
    config, out = (
        tiny_run(
            corpus_file,
            stage_steps=(2, 1, 1),
            minutes=0.05,
            checkpoint_every=1,
            evaluate_every=10**6,
        ),
        tmp_path,
    )
    cut(config, out / "run", 16)
    state = sorted((out / "run" / "state").glob("step-*"))[-1]
    spent = json.loads((state / "counters.json").read_text(encoding="utf-8"))["counters"]["total"]
    assert spent > 0
    summary = resume(out / "run")
    assert summary["minutes"] == 0.05
    assert spent < summary["wall_seconds"] < 60  # a machine may be busy
    written = read_run(out / "run")
    assert written.train.minutes == 0
    assert sum(written.train.stage_steps) == summary["steps"]
    assert written.train.test_windows == summary["test"]["windows"]
    assert written == read_run(out / "run" / "best")
