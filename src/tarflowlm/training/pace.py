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


class StepPace:
    """The pace of a stage with a number of steps."""

    save_due = False
    """True if the last checkpoint is old enough for the next one; never by steps."""

    def __init__(self, train: TrainConfig, counters: Counters) -> None:
        self.train, self.counters = train, counters
        self.total = train.stage_steps[counters.stage]
        """The whole stage in units of `done`."""
        self.num_steps: int | float = self.total
        """Steps of the stage, an estimate if its time is limited; the learning-rate schedule follows it."""
        self.update()

    def update(self) -> None:
        """Update `done` and `over` after a step."""
        self.done = self.counters.stage_step
        self.over = self.done >= self.total


class TimePace(StepPace):
    """The pace of a stage that gets a share of the run's remaining time; `done` is in thousandths of it.

    `train.stage_steps` are the shares of the stages. Time is first reserved for the evaluation and checkpoint that
    end every remaining stage, and for the evaluation of `test_windows` windows at the end of the run. Other
    evaluations and checkpoints take time from the stage itself. `clock` gives the seconds since the run began.
    """

    def __init__(self, train: TrainConfig, counters: Counters, clock: Callable[[], float], test_windows: int) -> None:
        self.clock, self.test_windows, self.share = clock, test_windows, 0.0
        super().__init__(train, counters)

    def update(self) -> None:
        """Read the clock, and estimate the number of steps anew."""
        now, spent, stage_step = self.clock(), self.counters.spent, self.counters.stage_step
        passed = now - spent.stage_start
        # until the first evaluation: a window without a backward pass takes a third of the time
        windows = self.train.evaluate_windows / self.train.batch_size / 3
        evaluation = spent.evaluation or passed / max(stage_step, 1) * windows
        total, shares = 60 * self.train.minutes, self.train.stage_steps[self.counters.stage :]
        left = total - test_seconds(total, self.test_windows, spent) - spent.stage_start
        seconds = (left - len(shares) * (evaluation + spent.save)) * shares[0] / sum(shares)
        # the share never falls, even if an evaluation is shorter than estimated
        self.share = max(self.share, min(1.0, passed / seconds) if seconds > 0 else 1.0)
        self.total, self.done = 1000, int(1000 * self.share)
        self.num_steps = stage_step / max(self.share, 1e-9) if stage_step else UNTIMED_STEPS
        # every stage takes at least one step
        self.over = stage_step > 0 and self.share >= 1
        self.save_due = now - spent.total > max(SAVE_SECONDS, spent.save / SAVES_SHARE)


def test_seconds(total: float, test_windows: int, spent: TimeSpent) -> float:
    """Seconds reserved for the test split, of `total`: estimated from validation, at most the share `TEST_SHARE`."""
    most = TEST_SHARE * total
    return min(most, 1.2 * test_windows * spent.per_window) if spent.per_window else most
