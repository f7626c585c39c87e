"""The lines of a run's log in TensorBoard, Trackio and Weights & Biases, as `train.track` asks for.

Needs the extra `track` (tensorboard, trackio, wandb). The log of a run starts `Trackers` by its
name.
"""

import io
import logging
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TypeVar

from tarflowlm.config import RunConfig
from tarflowlm.errors import Progress, Record, check_package
from tarflowlm.schema import to_dict

Numbers = dict[str, int | float]
"""Names such as valid/bpc -> values."""
Tracker = tuple[Callable[[Numbers, int], None], Callable[[], None]]
"""Two functions: one takes the numbers of a step, the other one closes the tracker."""

T = TypeVar("T")

logger = logging.getLogger("tarflowlm")


class Trackers(Progress):
    """Sends the lines of the log to the trackers that `config` asks for.

    One that fails is dropped with one notice. `resume_at` is the step of the checkpoint, 0 for a
    new run.
    """

    def __init__(self, config: RunConfig, out: Path, resume_at: int) -> None:
        self._open = dict[str, Tracker]()
        for name in config.train.track:
            if tracker := self._attempt(name, OPEN[name], config, out, resume_at):
                self._open[name] = tracker

    def record(self, record: Record) -> None:
        """Send the numbers of a line of metrics.jsonl."""
        numbers = {
            f"{record['split']}/{name}": value
            for name, value in record.items()
            if name != "step" and not isinstance(value, str)
        }
        for name, (send, _) in [*self._open.items()]:
            self._attempt(name, send, numbers, record["step"])

    def close(self) -> None:
        for name, (_, end) in [*self._open.items()]:
            self._attempt(name, end)

    def _attempt(self, name: str, act: Callable[..., T], *args: object) -> T | None:
        try:
            return act(*args)
        except Exception as error:
            self._open.pop(name, None)
            text = " ".join(str(error).split()) or type(error).__name__
            logger.warning("%s is dropped (%s); metrics.jsonl continues", name, text)
            return None


def open_tensorboard(_config: RunConfig, out: Path, resume_at: int) -> Tracker:
    """Event files in `out`/tensorboard, flushed after every record."""
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard hides the points of earlier files from `purge_step` on
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=resume_at + 1)
    logger.info("tensorboard --logdir %s", out / "tensorboard")

    def send(numbers: Numbers, step: int) -> None:
        for tag, value in numbers.items():
            writer.add_scalar(tag, value, step)
        writer.flush()

    return send, writer.close


def open_trackio(config: RunConfig, out: Path, _resume_at: int) -> Tracker:
    """A run of Trackio, on this machine unless its variables name a server.

    A resumed one continues under the identity in `out`/trackio.id. The steps between its checkpoint
    and a kill are there twice.
    """
    check_package("trackio", "track", "train.track trackio")
    import trackio

    name, _ = _identity(out, "trackio")
    with _terminal_of_the_bar():
        run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "tarflowlm"),
            name=name,
            resume="allow",
            config=to_dict(config),
            embed=False,
        )

    def end() -> None:
        with _terminal_of_the_bar():
            trackio.finish()  # which, other than run.finish, forgets the run

    return run.log, end


def open_wandb(config: RunConfig, out: Path, _resume_at: int) -> Tracker:
    """A run of Weights & Biases. A resumed one continues under the identity in `out`/wandb.id."""
    check_package("wandb", "track", "train.track wandb")
    import wandb

    name, identity = _identity(out, "wandb")
    with _terminal_of_the_bar():
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tarflowlm"),
            name=name,
            id=identity,
            resume="allow",
            config=to_dict(config),
            dir=str(out),
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def end() -> None:
        with _terminal_of_the_bar():
            # as failed, if an exception is on its way
            run.finish(exit_code=int(sys.exc_info()[0] is not None))

    return run.log, end


def _identity(out: Path, tracker: str) -> tuple[str, str]:
    """The name and the identity of a run at a tracker, the same ones when it is resumed."""
    file = out / f"{tracker}.id"
    if not file.exists():
        file.write_text(secrets.token_hex(4), encoding="ascii")
    identity = file.read_text(encoding="ascii")
    return f"{out.resolve().name}-{identity}", identity


def _terminal_of_the_bar() -> redirect_stdout[io.StringIO]:
    """A context in which a tracker prints nothing: the terminal belongs to the progress bar."""
    return redirect_stdout(io.StringIO())


OPEN = {"tensorboard": open_tensorboard, "trackio": open_trackio, "wandb": open_wandb}
"""What opens a tracker: a function of the configuration, the run directory and its last step."""
