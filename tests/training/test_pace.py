"""Runs that are given time instead of steps, by a clock that is moved by hand."""

import json

import pytest
import torch

from tarflowlm.config import OptimConfig, TrainConfig
from tarflowlm.runs.checkpoint import read_run
from tarflowlm.training.loop import Pace
from tarflowlm.training.optim import schedule
from tarflowlm.training.state import Counters, TimeSpent
from tarflowlm.training.train import resume

MEASURED = {"evaluation": 1e-6}


@pytest.fixture
def timed():
    """timed(stage, stage_step, **spent): a pace over 100 minutes in shares of 8, 1 and 1, and `at(seconds, step)`."""

    def build(stage: int, **spent: float):
        counters = Counters(stage=stage, spent=TimeSpent(**spent))
        now = [counters.spent.stage_start]
        pace = Pace(TrainConfig(stage_steps=(8, 1, 1), minutes=100.0), counters, lambda: now[0], 10)

        def at(seconds: float, stage_step: int) -> Pace:
            now[0], counters.stage_step = seconds, stage_step
            pace.update()
            return pace

        return pace, at

    return build


def test_steps_are_counted():
    counters = Counters()
    pace = Pace(TrainConfig(stage_steps=(5,)), counters, lambda: 0.0, 10)
    assert (pace.total, pace.num_steps, pace.over, pace.save_due) == (5, 5, False, False)
    counters.stage_step = 5
    pace.update()
    assert (pace.done, pace.over) == (5, True)


def test_stage_has_its_share_of_the_time_left(timed):
    # 6,000 seconds, 0.15 of which are kept for a test of unknown length
    first, at = timed(0, **MEASURED)
    assert at(0.8 * 5100 / 2, 1).share == pytest.approx(0.5)
    assert (first.done, first.total, first.over) == (500, 1000, False)
    assert at(0.8 * 5100 + 1, 2).over
    # a stage that came late has half of what the two remaining ones have
    _, at = timed(1, stage_start=5000.0, **MEASURED)
    assert at(5000 + 50 / 2, 1).share == pytest.approx(0.5)


def test_evaluations_and_checkpoints_are_reserved(timed):
    # ten windows at 1.2 times two seconds are 24 seconds
    _, at = timed(1, stage_start=4000.0, per_window=2.0, evaluation=100.0, save=50.0)
    assert at(4500.0, 1).share == pytest.approx(500 / ((6000 - 24 - 4000 - 2 * 150) / 2))
    # before the first evaluation: 64 windows are 8 steps of 8, without their gradients
    _, at = timed(2, stage_start=4000.0)
    assert at(4300.0, 10).share == pytest.approx(300 / (1100 - 30 * 8 / 3))


def test_stage_without_time_takes_one_step(timed):
    late, at = timed(1, stage_start=7000.0)
    assert not late.over
    assert at(7001.0, 1).over


def test_learning_rate_follows_the_share_of_the_time(timed):
    config, num_steps = OptimConfig(warmup=0.1, decay=0.4), 400
    pace, at = timed(0, **MEASURED)
    rates = []
    for step in range(num_steps):
        rates.append(schedule(config, step, max(step + 1, pace.num_steps)))
        at((step + 1) * 0.8 * 5100 / num_steps, step + 1)
    assert rates[1:] == pytest.approx([schedule(config, step, num_steps) for step in range(1, num_steps)], rel=1e-6)
    assert 0 < rates[0] < 0.1


@pytest.mark.slow
def test_killed_run_by_minutes_continues_with_the_time_left(tmp_path, tiny_run, cut):
    config, out = tiny_run(stage_steps=(2, 1, 1), minutes=0.1, checkpoint_every=1, evaluate_every=10**6), tmp_path
    cut(config, out / "run", 16)
    state = sorted((out / "run" / "state").glob("step-*"))[-1]
    spent = json.loads((state / "counters.json").read_text(encoding="utf-8"))["counters"]["spent"]["total"]
    assert spent > 0
    summary = resume(out / "run", device=torch.device("cpu"))
    assert summary["minutes"] == 0.1
    assert spent < summary["wall_seconds"] < 60  # a machine may be busy
    written = read_run(out / "run")
    assert written.train.minutes == 0
    assert sum(written.train.stage_steps) == summary["steps"]
    assert written.train.test_windows == summary["test"]["windows"]
    assert written == read_run(out / "run" / "best")
