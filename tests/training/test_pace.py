"""Runs that are given time instead of steps."""

import json
import math

import pytest
import torch

from tarflowlm.config import OptimConfig, TrainConfig
from tarflowlm.errors import UserError
from tarflowlm.runs.checkpoint import read_run
from tarflowlm.training import lifecycle
from tarflowlm.training.metrics import Reporter
from tarflowlm.training.optim import schedule
from tarflowlm.training.pace import Clock, StepPace, TimePace, TimeSpent

CPU = torch.device("cpu")
QUICK = {"evaluation": 1e-6}


class Hand(Clock):
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def seconds(self) -> float:
        return self.now


@pytest.fixture
def stage():
    """stage(number, spent): a pace over 100 minutes in shares of 8, 1 and 1, its clock, and what was spent."""

    def build(number: int, **spent: float) -> tuple[TimePace, Hand, TimeSpent]:
        train, hand, used = TrainConfig(stage_steps=(8, 1, 1), minutes=100.0), Hand(), TimeSpent(**spent)
        hand.now = used.stage_start
        return TimePace(train, number, used, hand, 10), hand, used

    return build


def test_steps_are_counted():
    counted = StepPace(5)
    assert [counted.over(n) for n in (0, 4, 5, 6)] == [False, False, True, True]
    assert counted.steps(3) == (3, 5)
    assert counted.share is None
    assert not counted.save_due()


def test_a_stage_has_its_share_of_what_is_left(stage):
    # 6,000 seconds, of which 0.15 are kept for a test of unknown length
    first, hand, _ = stage(0, **QUICK)
    hand.now = 0.8 * 5100 / 2
    first.look(1)
    assert first.share == pytest.approx(0.5)
    assert not first.over(1)
    hand.now = 0.8 * 5100 + 1
    first.look(2)
    assert first.over(2)
    # a stage that came late has half of what the two that are left have
    late, hand, _ = stage(1, stage_start=5000.0, **QUICK)
    hand.now = 5000 + 50 / 2
    late.look(1)
    assert late.share == pytest.approx(0.5)


def test_evaluations_and_checkpoints_come_out_of_the_stage(stage):
    # ten windows at 1.2 times two seconds are 24 seconds
    middle, hand, _ = stage(1, stage_start=4000.0, per_window=2.0, evaluation=100.0, save=50.0)
    hand.now = 4500.0
    middle.look(1)
    assert middle.share == pytest.approx(500 / ((6000 - 24 - 4000 - 2 * 150) / 2))
    # nothing is known of an evaluation yet: 64 windows are 8 steps of 8, without their gradients
    fresh, hand, _ = stage(2, stage_start=4000.0)
    hand.now = 4300.0
    fresh.look(10)
    assert fresh.share == pytest.approx(300 / (1100 - 30 * 8 / 3))


def test_a_stage_takes_a_step_even_where_no_time_is_left(stage):
    late, hand, _ = stage(1, stage_start=7000.0)
    hand.now = 7001.0
    late.look(0)
    assert not late.over(0)
    late.look(1)
    assert late.over(1)


def test_the_rate_follows_the_share_of_the_time(stage):
    config = OptimConfig(warmup=0.1, decay=0.4)
    timed, hand, _ = stage(0, **QUICK)
    num_steps = 400
    rates = []
    for step in range(num_steps):
        rates.append(schedule(config, *timed.steps(step)))
        hand.now += 0.8 * 5100 / num_steps
        timed.look(step + 1)
    expected = [schedule(config, step, num_steps) for step in range(num_steps)]
    assert rates[1:] == pytest.approx(expected[1:], rel=1e-6)
    assert 0 < rates[0] < 0.1


def test_checkpoints_are_due_by_time_and_cost_little(stage):
    timed, hand, spent = stage(0)
    for seconds, save, due in ((59.0, 0.0, False), (61.0, 0.0, True), (61.0, 10.0, False), (201.0, 10.0, True)):
        hand.now, spent.save = seconds, save
        timed.look(1)
        assert timed.save_due() == due


def test_an_accelerator_is_looked_at_seldom(stage):
    timed, hand, _ = stage(0)
    timed.every = 4
    hand.now = 1000.0
    timed.look(3)
    assert timed.share == 0
    timed.look(4)
    assert timed.share > 0


def test_earlier_sittings_count():
    assert 100 <= Clock(100.0).seconds() < 101


@pytest.mark.parametrize("minutes", [-1.0, math.nan, math.inf])
def test_senseless_minutes_are_refused(minutes):
    with pytest.raises(UserError, match=rf"train\.minutes {minutes}"):
        TrainConfig(minutes=minutes)


def test_a_run_by_minutes_ends_in_time_as_a_run_by_steps(tmp_path, tiny_run, go):
    run = tiny_run(stage_steps=(2, 1, 1), minutes=0.06, evaluate_every=10**6, checkpoint_every=10**6)
    summary = go(run, tmp_path / "run")
    assert summary["minutes"] == 0.06
    assert summary["wall_seconds"] < 60  # a machine may be busy; the split of the time is tested above
    written = read_run(tmp_path / "run")
    assert written.train.minutes == 0
    assert sum(written.train.stage_steps) == summary["steps"] > 6
    assert written.train.test_windows == summary["test"]["windows"]
    assert written == read_run(tmp_path / "run" / "best")


class Killed(Exception):
    pass


class Killer(Reporter):
    """Kills a run at the n-th step."""

    def __init__(self, at: int) -> None:
        self.left, self.shares = at, []

    def step(self, num_tokens, share=None):
        self.shares.append(share)
        self.left -= 1
        if self.left == 0:
            raise Killed


def test_a_killed_run_by_minutes_goes_on_with_the_time_that_is_left(tmp_path, tiny_run, go):
    run, out = tiny_run(stage_steps=(2, 1, 1), minutes=0.1, checkpoint_every=1), tmp_path / "run"
    killer = Killer(5)
    with pytest.raises(Killed):
        go(run, out, killer)
    assert killer.shares == sorted(killer.shares)
    state = sorted((out / "state").glob("step-*"))[-1]
    counters = json.loads((state / "counters.json").read_text(encoding="utf-8"))["counters"]
    spent = counters["spent"]["total"]
    assert spent > 0
    after = Killer(10**9)
    summary = lifecycle.resume(out, device=CPU, reporter=after)
    assert summary["wall_seconds"] > spent
    assert after.shares[0] > 0
    assert sum(read_run(out).train.stage_steps) == summary["steps"]


def test_steps_and_minutes_exclude_each_other(refused, corpus_file, tmp_path):
    options = ("train", "mini-ar", "--out", tmp_path / "run", "--data", corpus_file)
    refused(*options, "--steps", "3", "--minutes", "1", names=["--steps 3", "--minutes 1"])
    refused(*options, "--minutes", "0", names=["minutes 0"])
