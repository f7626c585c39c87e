"""The progress of a stage, in steps or in wall-clock time."""

from collections.abc import Callable
from dataclasses import dataclass

from tarflowlm.config import TrainConfig

SAVE_SECONDS, SAVES_SHARE = 60.0, 0.05
"""A run with a time limit saves about this often, but spends at most about this share of its time on saving."""
TEST_SHARE = 0.15
"""Largest share of a run's time for the test split at its end."""
UNTIMED_STEPS = 1000.0
"""Steps that a stage with a time limit is assumed to have until one of them has been timed."""


@dataclass
class TimeSpent:
    """Wall-clock time of a run, in seconds; saved with the run."""

    total: float = 0.0
    """From the start of the run to its last checkpoint; time lost by a kill does not count."""
    stage_start: float = 0.0
    """`total` at the start of the current stage."""
    evaluation: float = 0.0
    """Duration of the newest validation."""
    per_window: float = 0.0
    """Duration of the newest validation per window."""
    save: float = 0.0
    """Duration of the newest checkpoint."""


class StepPace:
    """The pace of a stage of `num_steps` steps."""

    save_due = False
    """Whether the last checkpoint is old enough for the next one; never by steps."""

    def __init__(self, num_steps: int, stage_step: int) -> None:
        self.num_steps: float = num_steps
        """Steps of the stage, an estimate if its time is limited; the learning-rate schedule follows it."""
        self.total = num_steps
        """The whole stage in units of `done`."""
        self.update(stage_step)

    def update(self, stage_step: int) -> None:
        """Update `done` and `over`: `stage_step` steps of the stage have been taken."""
        self.done = stage_step
        self.over = stage_step >= self.total


class TimePace(StepPace):
    """The pace of a stage that gets a share of the run's remaining time.

    `train.stage_steps` are the shares of the stages. Time is first reserved for the evaluation and checkpoint that
    end every remaining stage, and for the evaluation of `test_windows` windows at the end of the run. Other
    evaluations and checkpoints take time from the stage itself. `clock` gives the seconds since the run began.
    """

    def __init__(
        self,
        train: TrainConfig,
        stage: int,
        spent: TimeSpent,
        clock: Callable[[], float],
        *,
        test_windows: int,
        stage_step: int,
    ) -> None:
        self.train, self.stage, self.spent, self.clock, self.test_windows = train, stage, spent, clock, test_windows
        self.share = 0.0
        """Share of the stage's time that has passed."""
        self.num_steps, self.total = UNTIMED_STEPS, 1000
        self.update(stage_step)

    def update(self, stage_step: int) -> None:
        """Read the clock; `done` is in thousandths of the stage's time, and `num_steps` is estimated anew."""
        now, spent = self.clock(), self.spent
        passed = now - spent.stage_start
        # until the first evaluation: a window without a backward pass takes a third of the time
        windows = self.train.evaluate_windows / self.train.batch_size / 3
        evaluation = spent.evaluation or passed / max(stage_step, 1) * windows
        total, shares = 60 * self.train.minutes, self.train.stage_steps[self.stage :]
        left = total - test_seconds(total, self.test_windows, spent) - spent.stage_start
        seconds = (left - len(shares) * (evaluation + spent.save)) * shares[0] / sum(shares)
        # the share never falls, even if an evaluation is shorter than estimated
        self.share = max(self.share, min(1.0, passed / seconds) if seconds > 0 else 1.0)
        if stage_step:
            self.num_steps = stage_step / max(self.share, 1e-9)
        self.done = int(self.total * self.share)
        # every stage takes at least one step
        self.over = stage_step > 0 and self.share >= 1
        self.save_due = now - spent.total > max(SAVE_SECONDS, spent.save / SAVES_SHARE)


def test_seconds(total: float, test_windows: int, spent: TimeSpent) -> float:
    """Seconds reserved for the test split, of `total`: estimated from validation, at most the share `TEST_SHARE`."""
    most = TEST_SHARE * total
    return min(most, 1.2 * test_windows * spent.per_window) if spent.per_window else most
