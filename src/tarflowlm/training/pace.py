"""How far a stage is, by its steps or by its time, and when a run saves or stops."""

from collections.abc import Callable

from tarflowlm.config import TrainConfig
from tarflowlm.training.state import Counters, Job

SAVE_SECONDS = 60.0
"""A run with a time limit saves about this often."""
SAVES_SHARE = 0.05
"""Largest share of such a run's time that is spent on saving."""
TEST_SHARE = 0.15
"""Largest share of a run's time for the test split at its end."""
LEAST_STEPS = 36
"""A stage after the first has time for so many steps, or is left out: fewer do harm."""
UNTIMED_STEPS = 1000.0
"""Steps that a stage with a time limit is assumed to have until one of them has been timed."""


def measure(
    train: TrainConfig, counters: Counters, clock: Callable[[], float], test_windows: int
) -> None:
    """Update `share` and `expected_steps` of the counters. `clock` gives seconds since the start.

    Under a time limit, `train.stage_steps` are the shares of the stages in the remaining time, less
    what is reserved for the evaluation and the checkpoint that end every remaining stage, and for
    the `test_windows` at the end of the run. Other evaluations and checkpoints take time from the
    stage itself.
    """
    step = counters.stage_step
    if not train.minutes:
        counters.expected_steps = train.stage_steps[counters.stage]
        counters.share = step / counters.expected_steps if counters.expected_steps else 1.0
        return
    now = clock()
    passed = now - counters.stage_start
    # until the first evaluation: a window without a backward pass takes a third of the time
    guess = passed / max(step, 1) * (train.evaluate_windows / train.batch_size / 3)
    stage_end = (counters.evaluation or guess) + counters.save
    limit = 60 * train.minutes
    left = limit - test_seconds(limit, test_windows, counters.per_window) - counters.stage_start
    shares = shares_left(train, counters, left, now / max(counters.step, 1))
    own = (left - len(shares) * stage_end) * shares[0] / max(sum(shares), 1)
    # the share never falls, even if an evaluation is shorter than estimated
    counters.share = max(counters.share, min(1.0, passed / own) if own > 0 else 1.0)
    # the first step may compile, which does not count
    is_timed = step > 1
    counters.expected_steps = step / max(counters.share, 1e-9) if is_timed else UNTIMED_STEPS


def shares_left(
    train: TrainConfig, counters: Counters, seconds: float, per_step: float
) -> list[int]:
    """The shares of this stage and those after it in the `seconds` that are left. A stage that has
    no time for `LEAST_STEPS` gets none, the last one first; one that has begun continues.
    """
    shares = [*train.stage_steps[counters.stage :]]
    has_begun = counters.stage_step > 0 or counters.stage == 0
    for index in reversed(range(int(has_begun), len(shares))):
        if seconds * shares[index] < LEAST_STEPS * per_step * sum(shares):
            shares[index] = 0
    return shares


def test_seconds(total: float, windows: int, per_window: float) -> float:
    """Seconds of a `total` that are reserved for the test split: what the validation's seconds
    `per_window` suggest, at most the share `TEST_SHARE`.
    """
    most = TEST_SHARE * total
    return min(most, 1.2 * windows * per_window) if per_window else most


def units(train: TrainConfig, counters: Counters) -> tuple[int, int]:
    """How much of the stage is done, and of how much: in steps, or in thousandths of its time."""
    if train.minutes:
        return int(1000 * counters.share), 1000
    return counters.stage_step, train.stage_steps[counters.stage]


def save_is_due(train: TrainConfig, counters: Counters, clock: Callable[[], float]) -> bool:
    """Whether a run should save: after a number of steps, at the end of a stage, and under a time
    limit about once a minute.
    """
    if counters.stage_is_over or counters.step % train.checkpoint_every == 0:
        return True
    pause = max(SAVE_SECONDS, counters.save / SAVES_SHARE)
    return train.minutes > 0 and clock() - counters.total > pause


def stop_requested(job: Job) -> str | None:
    """Why this process or another one was asked to stop, or None. Collective."""
    asked = job.stop_signal()
    if job.processes.any(asked is not None):
        return asked or "a signal to another process"
    return None
