"""The progress of a stage, in steps or in wall-clock time."""

import time
from dataclasses import dataclass, field

from tarflowlm.config import TrainConfig
from tarflowlm.training.distributed import ALONE, Processes

SAVE_SECONDS, SAVES_SHARE = 60.0, 0.05
"""A run with a time limit saves about this often, but spends at most about this share of its time on saving."""
TEST_SHARE = 0.15
"""Largest share of a run's time for the test split at its end."""


@dataclass
class TimeSpent:
    """How the wall-clock time of a run was spent, in seconds; saved with the run."""

    total: float = 0.0
    """From the start of the run to its last checkpoint; time lost by a kill does not count."""
    stage_start: float = 0.0
    """`total` at the start of the current stage."""
    evaluation: float = 0.0
    """Duration of the newest validation."""
    per_window: float = 0.0
    """The same per window."""
    save: float = 0.0
    """Duration of the newest checkpoint."""


class Clock:
    """Wall-clock time of a run, over all its sessions. Every process reads the clock of the first one."""

    def __init__(self, before: float = 0.0, *, since: float | None = None, processes: Processes = ALONE) -> None:
        """`before`: seconds of earlier sessions; `since`: start of this one on `time.monotonic`, by default now."""
        self._start = (time.monotonic() if since is None else since) - before
        self._processes = processes

    def seconds(self) -> float:
        """Seconds since the run began, without the time between sessions. Collective."""
        return self._processes.first_number(time.monotonic() - self._start)


class StepPace:
    """The pace of a stage of `num_steps` steps."""

    share = None
    """Share of the stage's time that is over; only `TimePace` has one."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def look(self, stage_step: int) -> None:
        """Called after every step; nothing to measure."""

    def steps(self, stage_step: int) -> tuple[int, int]:
        """The next step (0-based) and the number of steps of the stage, the arguments of `optim.schedule`."""
        return stage_step, self.num_steps

    def over(self, stage_step: int) -> bool:
        """Whether all steps are taken."""
        return stage_step >= self.num_steps

    def save_due(self) -> bool:
        """Whether the time calls for a checkpoint: never."""
        return False


@dataclass
class TimePace:
    """The pace of a stage that gets a share of the run's remaining time.

    `train.stage_steps` are the shares. Time is first reserved for the evaluation and checkpoint that end every
    remaining stage, and for the evaluation of `test_windows` windows at the end of the run. Other evaluations and
    checkpoints take time from the stage itself.
    """

    train: TrainConfig
    stage: int
    spent: TimeSpent
    clock: Clock
    test_windows: int
    every: int = 1
    """Steps between reads of the clock."""
    now: float = field(init=False)
    """The newest reading of the clock, in seconds."""
    evaluation: float = field(init=False)
    """Estimated seconds of the evaluation at the end of the stage."""

    share: float = field(init=False, default=0.0)
    """Share of the stage's time that is over. It never falls, even if an evaluation is shorter than estimated."""

    def __post_init__(self) -> None:
        self.now, self.evaluation = self.clock.seconds(), self.spent.evaluation
        self.share = self._share()

    def look(self, stage_step: int) -> None:
        """Read the clock and update `share`, every `every` steps."""
        if stage_step % self.every == 0:
            self.now = self.clock.seconds()
            # until the first evaluation: a window without a backward pass takes a third of the time
            step = (self.now - self.spent.stage_start) / max(stage_step, 1)
            guess = step * self.train.evaluate_windows / self.train.batch_size / 3
            self.evaluation = self.spent.evaluation or guess
            self.share = max(self.share, self._share())

    def _share(self) -> float:
        total, ahead = 60 * self.train.minutes, self.train.stage_steps[self.stage :]
        left = total - test_seconds(total, self.test_windows, self.spent) - self.spent.stage_start
        seconds = (left - len(ahead) * (self.evaluation + self.spent.save)) * ahead[0] / sum(ahead)
        return min(1.0, (self.now - self.spent.stage_start) / seconds) if seconds > 0 else 1.0

    def steps(self, stage_step: int) -> tuple[int, float]:
        """The next step (0-based) and the estimated number of steps of the stage, for `optim.schedule`."""
        if stage_step < self.every:
            return stage_step, 1000.0  # no step has been timed yet: assume many
        return stage_step, max(stage_step + 1.0, stage_step / max(self.share, 1e-9))

    def over(self, stage_step: int) -> bool:
        """Whether the stage's time is over; every stage takes at least one step."""
        return stage_step > 0 and self.share >= 1

    def save_due(self) -> bool:
        """Whether the last checkpoint is old enough for the next one."""
        return self.now - self.spent.total > max(SAVE_SECONDS, self.spent.save / SAVES_SHARE)


Pace = StepPace | TimePace


def test_seconds(total: float, test_windows: int, spent: TimeSpent) -> float:
    """Seconds reserved for the test split, of `total`: estimated from validation, at most the share `TEST_SHARE`."""
    most = TEST_SHARE * total
    return min(most, 1.2 * test_windows * spent.per_window) if spent.per_window else most
