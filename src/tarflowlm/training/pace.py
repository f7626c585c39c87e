"""Time: how much of a stage is done, what is due after a step, and how long a step takes."""

import time
from typing import NamedTuple

from tarflowlm.config import RunConfig, TrainConfig
from tarflowlm.data import Corpus
from tarflowlm.data.windows import EVALUATED
from tarflowlm.training.run import Counters, Run

STEPS_BETWEEN_READS = {"cuda": 16}
"""Steps after which the host waits for the losses of a device, and asks whether to stop."""
TEST_SHARE = 0.15
"""The largest share of a run's time that the final test may take."""
VALIDATIONS = 10
"""The number of times that a run with a time limit is evaluated, at least about."""
EVALUATION_SHARE = 0.1
"""The largest share of its time that these evaluations take."""
LEAST_STEPS = 36
"""A stage after the first needs time for this many steps, or it is left out: fewer do harm."""


# a stage


def seconds(run: Run) -> float:
    """Wall-clock seconds since the run began, without pauses and compilation. Collective."""
    return run.processes.from_first(time.monotonic() - run.began)


def update_pace(run: Run) -> None:
    """Let the counters say how much of the stage is done. Collective."""
    train, counters = run.config.train, run.counters
    if train.minutes:
        windows = num_test_windows(run.corpus, run.config)
        measure_pace(train, counters, seconds(run), windows)
    else:
        steps = train.stage_steps[counters.stage]
        counters.expected_steps = steps
        counters.share = counters.stage_step / steps if steps else 1.0


def num_test_windows(corpus: Corpus, config: RunConfig) -> int:
    """Windows of the test split that a run without a time limit evaluates at its end."""
    context = config.model.context
    available = corpus.num_tokens("test") // context
    wanted = config.train.test_windows or EVALUATED // context
    return min(wanted, available)


def measure_pace(train: TrainConfig, counters: Counters, now: float, test_windows: int) -> None:
    """Update the counters of a run with a time limit, which began `now` seconds ago.

    `train.stage_steps` are the shares of the stages in the remaining time. Time is reserved for the
    evaluation that ends every remaining stage, and for the `test_windows` at the end of the run.
    """
    step = counters.stage_step
    passed = now - counters.stage_start
    limit = 60 * train.minutes
    test = TEST_SHARE * limit
    if counters.per_window:
        test = min(test, 1.2 * test_windows * counters.per_window)
    left = limit - test - counters.stage_start
    shares = [*train.stage_steps[counters.stage :]]
    least = LEAST_STEPS * now / max(counters.step, 1)
    # a stage without time for these steps gets none, the last stage first; a begun one continues
    has_begun = step > 0 or counters.stage == 0
    for index in reversed(range(int(has_begun), len(shares))):
        if left * shares[index] < least * sum(shares):
            shares[index] = 0
    own = (left - len(shares) * counters.evaluation) * shares[0] / max(sum(shares), 1)
    # the share never falls, even if an evaluation is shorter than estimated
    counters.share = max(counters.share, min(1.0, passed / own) if own > 0 else 1.0)
    # the first step may compile, which does not count: expect a thousand until one is timed
    counters.expected_steps = step / max(counters.share, 1e-9) if step > 1 else 1000.0


# a step


class Due(NamedTuple):
    """What has to be done after a step; its loss is read from the device before any of it."""

    log: bool
    save: bool
    stop: str | None  # why

    @property
    def anything(self) -> bool:
        return self.log or self.save or self.stop is not None


def find_due(run: Run) -> Due:
    """What is due after the step that was just taken. Collective.

    An evaluation, which the counters note, comes before the next step, with a checkpoint and a line
    of the log before it. Under a time limit an evaluation is due after every tenth of the time as
    well, and a checkpoint once a minute.
    """
    train, counters = run.config.train, run.counters
    every = STEPS_BETWEEN_READS.get(run.device.type, 1)
    stop = run.stop_requested() if counters.step % every == 0 else None
    evaluates = counters.stage_is_over or counters.step % train.evaluate_every == 0
    saves = counters.step % train.checkpoint_every == 0
    if train.minutes:
        now = seconds(run)
        wait = max(60 * train.minutes / VALIDATIONS, counters.evaluation / EVALUATION_SHARE)
        evaluates |= now - counters.evaluated > wait
        saves |= now - counters.total > 60.0
    counters.evaluation_is_due = evaluates
    # a run is extended from the last step with the full rate
    is_last = counters.stage == run.config.num_stages - 1
    next_share = counters.share + 1 / counters.expected_steps
    falls = run.has_full_rate and next_share > 1 - run.config.optim.decay
    return Due(
        log=evaluates or counters.step % train.log_every == 0,
        save=evaluates or saves or (is_last and falls),
        stop=stop,
    )


class StepClock:
    """Times the steps of a stage, and reports them."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.is_compiling = run.compiles
        """Whether this step is the first of a stage with compiled layers."""
        self._done, total = run.counters.progress(run.config.train)
        run.log.reporter.stage(run.stage_name, total, self._done)

    def start(self) -> None:
        self._start, self._tokens, self._waited = time.perf_counter(), 0, 0.0

    def got_batch(self, tokens: int) -> None:
        """The wait for the batch is over; it has so many tokens, over all processes."""
        self._tokens, self._waited = tokens, time.perf_counter() - self._start

    def leave_out(self) -> None:
        """Take what has passed of the step, with its tokens, out of the time of training."""
        self.run.began += time.perf_counter() - self._start
        self.is_compiling = False
        self.start()

    def stop(self) -> None:
        """The step ends: show it, and count it."""
        run = self.run
        before, (self._done, _) = self._done, run.counters.progress(run.config.train)
        run.log.reporter.advance(self._done - before)
        duration = time.perf_counter() - self._start
        run.counters.training += duration
        window = run.log.window
        window.tokens += self._tokens
        window.seconds += duration
        window.waited += self._waited
