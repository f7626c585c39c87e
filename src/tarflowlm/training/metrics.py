"""The log of a run: metrics.jsonl, one JSON object a line, and the trackers that get it as well."""

import io
import json
import logging
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TextIO, TypeVar

from tarflowlm.config import RunConfig
from tarflowlm.errors import Progress, Record, check_package
from tarflowlm.schema import to_dict

METRICS = "metrics.jsonl"
Tracker = tuple[Callable[[dict[str, int | float], int], None], Callable[[], None]]
"""Two functions: one takes the numbers of a step, the other one closes the tracker."""

T = TypeVar("T")

logger = logging.getLogger("tarflowlm")


class MetricsLog:
    """Appends records to metrics.jsonl, flushed, and passes them to the reporter and the trackers.

    Until it is opened, records go to the reporter alone.
    """

    def __init__(self, reporter: Progress) -> None:
        self.reporter = reporter
        self.trackers: dict[str, Tracker] = {}
        self._file: TextIO | None = None

    def open(self, directory: Path, *, resume_at: int = 0) -> None:
        """Continue the file in `directory` at a saved `position`; later lines are dropped."""
        path = directory / METRICS
        if path.exists():
            # a power failure may also have lost a part of the earlier lines
            kept = path.read_bytes()[:resume_at]
            os.truncate(path, kept.rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Add a line, with at least a `split` and a `step`."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        self.reporter.record(record)
        split, step = record["split"], record["step"]
        numbers = {
            f"{split}/{name}": value
            for name, value in record.items()
            if name != "step" and not isinstance(value, str)
        }
        for name, (send, _) in [*self.trackers.items()]:
            self.attempt(name, send, numbers, step)

    def position(self) -> int:
        """Bytes written so far; returns once they are on disk."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for name, (_, end) in [*self.trackers.items()]:
            self.attempt(name, end)

    def track(self, config: RunConfig, out: Path, *, resume_at: int) -> None:
        """Open the trackers that `config` asks for; `resume_at` is the step of the checkpoint."""
        for name in config.train.track:
            start = open_tensorboard if name == "tensorboard" else open_wandb
            if tracker := self.attempt(name, start, config, out, resume_at):
                self.trackers[name] = tracker

    def attempt(self, name: str, act: Callable[..., T], *args: object) -> T | None:
        """Call a function of a tracker. One that fails is dropped with one notice."""
        try:
            return act(*args)
        except Exception as error:
            self.trackers.pop(name, None)
            text = " ".join(str(error).split()) or type(error).__name__
            logger.warning("%s is dropped (%s); metrics.jsonl continues", name, text)
            return None


def open_tensorboard(_config: RunConfig, out: Path, resume_at: int) -> Tracker:
    """Event files in `out`/tensorboard, flushed after every record."""
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard hides the points of earlier files from `purge_step` on
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=resume_at + 1)
    logger.info("tensorboard --logdir %s", out / "tensorboard")

    def send(numbers: dict[str, int | float], step: int) -> None:
        for tag, value in numbers.items():
            writer.add_scalar(tag, value, step)
        writer.flush()

    return send, writer.close


def open_wandb(config: RunConfig, out: Path, _resume_at: int) -> Tracker:
    """A run of Weights & Biases. A resumed one continues under the identity in `out`/wandb.id."""
    check_package("wandb", "track", "train.track wandb")
    import wandb

    file = out / "wandb.id"
    if not file.exists():
        file.write_text(secrets.token_hex(4), encoding="ascii")
    identity = file.read_text(encoding="ascii")
    with redirect_stdout(io.StringIO()):  # the terminal belongs to the progress bar
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tarflowlm"),
            name=f"{out.resolve().name}-{identity}",
            id=identity,
            resume="allow",
            config=to_dict(config),
            dir=str(out),
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def send(numbers: dict[str, int | float], step: int) -> None:
        run.log(numbers, step=step)

    def end() -> None:
        with redirect_stdout(io.StringIO()):
            # as failed, if an exception is passing through
            run.finish(exit_code=int(sys.exc_info()[0] is not None))

    return send, end
