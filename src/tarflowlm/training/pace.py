"""How far a stage is, by its steps or by its time, and when a run stops."""

from collections.abc import Callable

from tarflowlm.config import TrainConfig
from tarflowlm.training.state import Counters, Run

# of a run with a time limit
SAVE_SECONDS = 60.0
"""It saves about this often."""
TEST_SHARE = 0.15
"""Largest share of its time for the test split at its end."""
LEAST_STEPS = 36
"""A stage after the first has time for so many steps, or is left out: fewer do harm."""
UNTIMED_STEPS = 1000.0
"""Steps that a stage is assumed to have until one of them has been timed."""


def measure(
    train: TrainConfig, counters: Counters, clock: Callable[[], float], test_windows: int
) -> None:
    """Update `share` and `expected_steps` of the counters. `clock` gives seconds since the start.

    Under a time limit, `train.stage_steps` are the shares of the stages in the remaining time, less
    what is reserved for the evaluation that ends every remaining stage, and for the `test_windows`
    at the end of the run.
    """
    step = counters.stage_step
    if not train.minutes:
        counters.expected_steps = train.stage_steps[counters.stage]
        counters.share = step / counters.expected_steps if counters.expected_steps else 1.0
        return
    now = clock()
    passed = now - counters.stage_start
    limit = 60 * train.minutes
    test = TEST_SHARE * limit
    if counters.per_window:
        test = min(test, 1.2 * test_windows * counters.per_window)
    left = limit - test - counters.stage_start
    shares = [*train.stage_steps[counters.stage :]]
    least = LEAST_STEPS * now / max(counters.step, 1)
    # a stage that has no time for them gets none, the last one first; one that has begun continues
    has_begun = step > 0 or counters.stage == 0
    for index in reversed(range(int(has_begun), len(shares))):
        if left * shares[index] < least * sum(shares):
            shares[index] = 0
    own = (left - len(shares) * counters.evaluation) * shares[0] / max(sum(shares), 1)
    # the share never falls, even if an evaluation is shorter than estimated
    counters.share = max(counters.share, min(1.0, passed / own) if own > 0 else 1.0)
    # the first step may compile, which does not count
    is_timed = step > 1
    counters.expected_steps = step / max(counters.share, 1e-9) if is_timed else UNTIMED_STEPS


def units(train: TrainConfig, counters: Counters) -> tuple[int, int]:
    """How much of the stage is done, and of how much: in steps, or in thousandths of its time."""
    if train.minutes:
        return int(1000 * counters.share), 1000
    return counters.stage_step, train.stage_steps[counters.stage]


def stop_requested(run: Run) -> str | None:
    """Why this process or another one was asked to stop, or None. Collective."""
    asked = run.stop_signal()
    if run.processes.any(asked is not None):
        return asked or "a signal to another process"
    return None
