"""The progress of a stage, in steps or in wall-clock time."""

from collections.abc import Callable

from tarflowlm.config import TrainConfig
from tarflowlm.training.state import Counters, TimeSpent

SAVE_SECONDS, SAVES_SHARE = 60.0, 0.05
"""A run with a time limit saves about this often, but spends at most about this share of its time on saving."""
TEST_SHARE = 0.15
"""Largest share of a run's time for the test split at its end."""
UNTIMED_STEPS = 1000.0
"""Steps that a stage with a time limit is assumed to have until one of them has been timed."""


class Pace:
    """How far a stage is: `done` of `total`, in steps, or in thousandths of its time if `train.minutes` limits it.

    With a time limit, `train.stage_steps` are the shares of the stages in the remaining time. Time is first reserved
    for the evaluation and checkpoint that end every remaining stage, and for the evaluation of `test_windows` windows
    at the end of the run. Other evaluations and checkpoints take time from the stage itself. `clock` gives seconds
    since the run began.
    """

    def __init__(self, train: TrainConfig, counters: Counters, clock: Callable[[], float], test_windows: int) -> None:
        self.train, self.counters, self.clock, self.test_windows = train, counters, clock, test_windows
        self.total = 1000 if train.minutes else train.stage_steps[counters.stage]
        self.num_steps: int | float = self.total
        """Steps of the stage, an estimate if its time is limited; the learning-rate schedule follows it."""
        self.share, self.save_due = 0.0, False
        self.update()

    def update(self) -> None:
        """Update `done` and `over`, and under a time limit the estimate `num_steps` and `save_due`."""
        spent, stage_step = self.counters.spent, self.counters.stage_step
        if not self.train.minutes:
            self.done, self.over = stage_step, stage_step >= self.total
            return
        now = self.clock()
        passed = now - spent.stage_start
        # until the first evaluation: a window without a backward pass takes a third of the time
        windows = self.train.evaluate_windows / self.train.batch_size / 3
        evaluation = spent.evaluation or passed / max(stage_step, 1) * windows
        limit, shares = 60 * self.train.minutes, self.train.stage_steps[self.counters.stage :]
        left = limit - test_seconds(limit, self.test_windows, spent) - spent.stage_start
        seconds = (left - len(shares) * (evaluation + spent.save)) * shares[0] / sum(shares)
        # the share never falls, even if an evaluation is shorter than estimated
        self.share = max(self.share, min(1.0, passed / seconds) if seconds > 0 else 1.0)
        self.done = int(1000 * self.share)
        self.num_steps = stage_step / max(self.share, 1e-9) if stage_step else UNTIMED_STEPS
        # every stage takes at least one step
        self.over = stage_step > 0 and self.share >= 1
        self.save_due = now - spent.total > max(SAVE_SECONDS, spent.save / SAVES_SHARE)


def test_seconds(total: float, test_windows: int, spent: TimeSpent) -> float:
    """Seconds reserved for the test split, of `total`: estimated from validation, at most the share `TEST_SHARE`."""
    most = TEST_SHARE * total
    return min(most, 1.2 * test_windows * spent.per_window) if spent.per_window else most
