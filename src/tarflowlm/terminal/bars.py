"""Progress of everything but training: stages of work, each a bar on a terminal or plain lines in a log file."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console

from tarflowlm.generation.generate import num_ticks
from tarflowlm.language_model import LanguageModel
from tarflowlm.terminal.progress import Bars, Clock

StageProgress = Callable[[str, int, int | None], None]
"""Called with the name of a stage, how many of its parts are done, and the total where it is known."""

CorpusProgress = StageProgress

CORPUS_STAGES = {
    "fetch": "fetching {}, bytes",
    "count": "reading {}, characters",
    "bpe": "text for the tokenizer of {}, characters",
    "encode": "encoding {}, characters",
}
"""Labels of the stages of preparing a corpus."""


def no_progress(stage: str, completed: int, total: int | None) -> None:
    """A `StageProgress` that shows nothing."""


def ticker(progress: StageProgress, stage: str, total: int) -> Callable[[], None]:
    """A function to call once for every part of the stage that is done."""
    done = itertools.count(1)
    return lambda: progress(stage, next(done), total)


@contextmanager
def bar(
    console: Console, description: str, total: int, *, clock: Clock = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """Progress of a single stage; yields a function that sets how much of it is completed."""
    bars = Bars(console, clock=clock)
    bars.begin(description)
    try:
        yield lambda completed: bars.show(description, completed, total)
    finally:
        bars.close()


@contextmanager
def stages_bar(
    console: Console, label: Callable[[str], str] = str, *, clock: Clock = time.monotonic, is_timing: bool = False
) -> Iterator[StageProgress]:
    """Progress of one stage after the other; yields its `StageProgress`.

    `label` turns a stage's name into what is shown; with `is_timing` no thread draws while something is being timed.
    """
    bars = Bars(console, clock=clock, auto_refresh=not is_timing)
    try:
        yield lambda stage, completed, total: bars.show(label(stage), completed, total)
    finally:
        bars.close()


def corpus_bar(
    console: Console, source: str, *, clock: Clock = time.monotonic
) -> AbstractContextManager[CorpusProgress]:
    """Progress of preparing a corpus; yields the `progress` of `prepare_corpus`."""
    return stages_bar(console, lambda stage: CORPUS_STAGES[stage].format(source), clock=clock)


@contextmanager
def sampling_bar(
    console: Console, model: LanguageModel, num_tokens: int, num_given: int = 0
) -> Iterator[Callable[[], None]]:
    """Progress over the positions that `generate` inverts, arguments as `num_ticks`; yields its `tick`."""
    done = itertools.count(1)
    with bar(console, "sampling, positions", num_ticks(model, num_tokens, num_given)) as update:
        yield lambda: update(next(done))
