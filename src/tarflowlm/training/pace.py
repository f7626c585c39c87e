"""How far a stage has come: in steps, or in the wall-clock time it was given."""

import time
from dataclasses import dataclass, field

from tarflowlm.runs.config import TrainConfig
from tarflowlm.training.distributed import ALONE, Processes

SAVE_SECONDS, SAVES_SHARE = 60.0, 0.05
"""A run by time saves this often, and spends at most this share of its time on it."""
TEST_SHARE = 0.15
"""Of the time of a run, at most, for the test split at its end."""


@dataclass
class TimeSpent:
    """Where the wall-clock time of a run went, in seconds; it is saved with the run."""

    total: float = 0.0
    """Since the run began, up to the last checkpoint; what a kill lost does not count."""
    stage_start: float = 0.0
    """`total` at the start of the current stage."""
    evaluation: float = 0.0
    """The newest validation took this long."""
    per_window: float = 0.0
    """And this long for each of its windows."""
    save: float = 0.0
    """The newest checkpoint took this long."""


class Clock:
    """Seconds of wall-clock time since a run began, in all its sittings. Every process reads the first one's."""

    def __init__(self, before: float = 0.0, *, since: float | None = None, processes: Processes = ALONE) -> None:
        """`before`: seconds of earlier sittings; `since`: the start of this one on `time.monotonic`."""
        self._start = (time.monotonic() if since is None else since) - before
        self._processes = processes

    def seconds(self) -> float:
        return self._processes.first_number(time.monotonic() - self._start)


class StepPace:
    """A stage of `num_steps` steps."""

    share = None
    """Of the stage's time that is over: only `TimePace` has time."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def look(self, stage_step: int) -> None:
        """Called after every step."""

    def steps(self, stage_step: int) -> tuple[int, int]:
        """The step that comes next (0-based) and the number of steps of the stage, as `optim.schedule` takes them."""
        return stage_step, self.num_steps

    def over(self, stage_step: int) -> bool:
        """Whether the stage has had its steps or time."""
        return stage_step >= self.num_steps

    def save_due(self) -> bool:
        """Whether it is time for a checkpoint, whatever the number of steps."""
        return False


@dataclass
class TimePace:
    """A stage that has its share of what is left of the run's time.

    `train.stage_steps` are the shares. Before the time is shared out, what comes at the end of every stage is taken
    off, an evaluation and a checkpoint, and the evaluation of `test_windows` windows at the end of the run. Other
    evaluations and checkpoints come out of the stage's own time.
    """

    train: TrainConfig
    stage: int
    spent: TimeSpent
    clock: Clock
    test_windows: int
    every: int = 1
    """Steps between looks at the clock."""
    now: float = field(init=False)
    evaluation: float = field(init=False)
    """Seconds of the evaluation at the end of the stage, as far as known."""

    share: float = field(init=False, default=0.0)
    """Of the stage's time. It never falls, though an evaluation may turn out shorter than was thought."""

    def __post_init__(self) -> None:
        self.now, self.evaluation = self.clock.seconds(), self.spent.evaluation
        self.share = self._share()

    def look(self, stage_step: int) -> None:
        if stage_step % self.every == 0:
            self.now = self.clock.seconds()
            # before the first one: a window without its gradient takes a third of the time
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
        if stage_step < self.every:
            return stage_step, 1000.0  # nothing is known of a step's length yet: take it as one of many
        return stage_step, max(stage_step + 1.0, stage_step / max(self.share, 1e-9))

    def over(self, stage_step: int) -> bool:
        return stage_step > 0 and self.share >= 1

    def save_due(self) -> bool:
        return self.now - self.spent.total > max(SAVE_SECONDS, self.spent.save / SAVES_SHARE)


Pace = StepPace | TimePace


def test_seconds(total: float, test_windows: int, spent: TimeSpent) -> float:
    """What the test split may take of `total` seconds: as long as validation says, up to `TEST_SHARE`."""
    most = TEST_SHARE * total
    return min(most, 1.2 * test_windows * spent.per_window) if spent.per_window else most
