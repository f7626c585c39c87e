"""Runs that are given time instead of steps, by a clock that is moved by hand."""

import json

import pytest
import torch

from tarflowlm.config import TrainConfig
from tarflowlm.runs.checkpoint import read_run
from tarflowlm.training.loop import Pace
from tarflowlm.training.state import Counters, TimeSpent
from tarflowlm.training.train import resume


@pytest.mark.parametrize(
    # 6,000 seconds, 0.15 of which are kept for a test of unknown length
    ("stage", "start", "seconds"),
    [(0, 0.0, 0.8 * 5100), (1, 5000.0, 50.0)],
)
def test_stage_has_its_share_of_the_time_left(stage, start, seconds):
    """The stages have shares of 8, 1 and 1; a stage that comes late has half of what the last two
    have.
    """
    counters, now = (
        Counters(stage=stage, spent=TimeSpent(stage_start=start, evaluation=1e-6)),
        [start],
    )
    pace = Pace(TrainConfig(stage_steps=(8, 1, 1), minutes=100.0), counters, lambda: now[0], 10)
    now[0], counters.stage_step = start + seconds / 2, 1
    pace.update()
    assert pace.share == pytest.approx(0.5)
    assert (pace.done, pace.total, pace.over) == (500, 1000, False)
    now[0], counters.stage_step = start + seconds + 1, 2
    pace.update()
    assert pace.over


@pytest.mark.slow
def test_killed_run_by_minutes_continues_with_the_time_left(tmp_path, tiny_run, cut):
    config, out = (
        tiny_run(stage_steps=(2, 1, 1), minutes=0.1, checkpoint_every=1, evaluate_every=10**6),
        tmp_path,
    )
    cut(config, out / "run", 16)
    state = sorted((out / "run" / "state").glob("step-*"))[-1]
    spent = json.loads((state / "counters.json").read_text(encoding="utf-8"))["counters"]["spent"][
        "total"
    ]
    assert spent > 0
    summary = resume(out / "run", device=torch.device("cpu"))
    assert summary["minutes"] == 0.1
    assert spent < summary["wall_seconds"] < 60  # a machine may be busy
    written = read_run(out / "run")
    assert written.train.minutes == 0
    assert sum(written.train.stage_steps) == summary["steps"]
    assert written.train.test_windows == summary["test"]["windows"]
    assert written == read_run(out / "run" / "best")
