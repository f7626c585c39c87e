"""TensorBoard, Weights & Biases and Trackio, in addition to metrics.jsonl. A tracker that fails never stops a run."""

import importlib.util
import io
import json
import os
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, Protocol

from tarflowlm.config import RunConfig, TrackerName
from tarflowlm.errors import UserError
from tarflowlm.files import read_json, write_json
from tarflowlm.runs.strict_json import to_dict

TENSORBOARD, WANDB, TRACKIO = "tensorboard", "wandb.json", "trackio.json"
TRACKIO_PROJECT = "tarflowlm"


class Sink(Protocol):
    """A tracker that receives the records of metrics.jsonl. Its methods may raise; `Sinks` handles that."""

    def record(self, record: dict[str, Any]) -> None:
        """Take one record."""

    def close(self) -> None:
        """Finish; nothing is recorded afterwards."""


def scalars(record: dict[str, Any]) -> dict[str, int | float]:
    """The numbers of a record under the names trackers show: train/bpc, valid/nats_per_token, ..."""
    numbers = {key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"}
    return {f"{record['split']}/{key}": value for key, value in numbers.items()}


def check_installed(names: tuple[TrackerName, ...]) -> None:
    """UserError for a tracker whose package is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        # no origin: only a folder of that name, such as W&B creates
        if spec is None or spec.origin is None:
            raise UserError(f"train.track {name}: the package is not installed; pip install 'tarflowlm[track]'")


class Sinks:
    """The trackers of a run. One that fails, at the start or later, is dropped with one notice.

    `resume_at` is the step of the state that is resumed. Later steps are sent again where a tracker can replace them,
    so no point appears twice.
    """

    def __init__(self, run: RunConfig, out: Path, notice: Callable[[str], None], *, resume_at: int | None) -> None:
        self.notice = notice
        self.sinks: dict[str, Sink] = {}
        kinds: dict[TrackerName, Callable[..., Sink]] = {
            "tensorboard": TensorBoardSink,
            "wandb": WandbSink,
            "trackio": TrackioSink,
        }
        for name in dict.fromkeys(run.train.track):
            with self._dropping(name):
                check_installed((name,))
                self.sinks[name] = kinds[name](run, out, notice, resume_at=resume_at)

    def record(self, record: dict[str, Any]) -> None:
        """Pass one record to every tracker."""
        for name, sink in list(self.sinks.items()):
            with self._dropping(name):
                sink.record(record)

    def close(self) -> None:
        """Close every tracker."""
        for name, sink in list(self.sinks.items()):
            with self._dropping(name):
                sink.close()

    @contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        """A context in which an error becomes one notice, and sink `name` is closed and dropped."""
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            self.notice(f"{name} is dropped ({text}); metrics.jsonl continues")
            with suppress(Exception):
                if (failed := self.sinks.pop(name, None)) is not None:
                    failed.close()


class TensorBoardSink:
    """Writes event files to DIR/tensorboard, flushed after every record."""

    def __init__(self, run: RunConfig, out: Path, notice: Callable[[str], None], *, resume_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides the points of earlier files from `purge_step` on
        purge = None if resume_at is None else resume_at + 1
        self.writer = SummaryWriter(str(out / TENSORBOARD), purge_step=purge)
        if resume_at is None:
            self.writer.add_text("config", f"```\n{json.dumps(to_dict(run), indent=2)}\n```")
        notice(f"tensorboard --logdir {out / TENSORBOARD}")

    def record(self, record: dict[str, Any]) -> None:
        """Write the numbers of a record."""
        for tag, value in scalars(record).items():
            self.writer.add_scalar(tag, value, record["step"])
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


class SentOnce(ABC):
    """A sink that cannot replace points: a resumed run, which repeats its steps bit for bit, sends none twice.

    A file in the run directory keeps an id of the run there and the last step sent of every split.
    """

    def __init__(self, path: Path, *, resume_at: int | None) -> None:
        self.path = path
        known = resume_at is not None and path.exists()
        self.state: dict[str, Any] = read_json(path) if known else {"id": secrets.token_hex(4), "sent": {}}
        write_json(path, self.state)

    @abstractmethod
    def send(self, values: dict[str, int | float], step: int) -> None:
        """Send the numbers of one record."""

    def record(self, record: dict[str, Any]) -> None:
        """Send the numbers of a record, unless its step was sent before."""
        split, step = record["split"], record["step"]
        if step <= self.state["sent"].get(split, 0):
            return
        # saved first: a kill in between loses a point, where the other order would send it twice
        self.state["sent"][split] = step
        write_json(self.path, self.state)
        self.send(scalars(record), step)


class WandbSink(SentOnce):
    """A run of Weights & Biases, online or offline according to WANDB_MODE, with its files in DIR/wandb."""

    def __init__(self, run: RunConfig, out: Path, notice: Callable[[str], None], *, resume_at: int | None) -> None:
        import wandb

        super().__init__(out / WANDB, resume_at=resume_at)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tarflowlm"),
            name=out.resolve().name,
            id=self.state["id"],
            resume="allow",
            reinit="create_new",
            dir=str(out),
            config=to_dict(run),
            # the terminal belongs to the progress bar
            settings=wandb.Settings(silent=True, console="off"),
        )
        where = f"offline, send it with `wandb sync {out}/wandb/offline-*`" if self.run.offline else self.run.url
        notice(f"wandb: {where}")

    def send(self, values: dict[str, int | float], step: int) -> None:
        """Send the numbers of one record."""
        self.run.log(values, step=step)

    def close(self) -> None:
        """Finish the W&B run, as failed if an exception is passing through."""
        self.run.finish(exit_code=int(sys.exc_info()[0] is not None))


class TrackioSink(SentOnce):
    """A run of Trackio in the project `tarflowlm`, on this machine: `trackio show` draws it."""

    def __init__(self, run: RunConfig, out: Path, notice: Callable[[str], None], *, resume_at: int | None) -> None:
        import trackio

        super().__init__(out / TRACKIO, resume_at=resume_at)
        # the terminal belongs to the progress bar
        with redirect_stdout(io.StringIO()):
            self.run = trackio.init(
                project=TRACKIO_PROJECT,
                # runs are resumed by their name
                name=f"{out.resolve().name}-{self.state['id']}",
                resume="allow",
                config=to_dict(run),
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        notice(f"trackio show --project {TRACKIO_PROJECT}")

    def send(self, values: dict[str, int | float], step: int) -> None:
        """Send the numbers of one record."""
        self.run.log(values, step=step)

    def close(self) -> None:
        """Write what is pending and finish the run."""
        import trackio

        # not `self.run.finish()`: that would be called, and print a line, once more at the end of the program
        with redirect_stdout(io.StringIO()):
            trackio.finish()
