"""TensorBoard and Weights & Biases beside metrics.jsonl, which stays the truth: one that fails never stops a run."""

import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from tarflowlm.errors import UserError
from tarflowlm.files import read_json, write_json
from tarflowlm.runs.config import RunConfig, TrackerName
from tarflowlm.runs.strict_json import to_dict

TENSORBOARD, WANDB = "tensorboard", "wandb.json"


class Sink(Protocol):
    """Takes the records of metrics.jsonl as they are written. Any method may raise: `Sinks` sees to it."""

    def record(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def scalars(record: dict[str, Any]) -> dict[str, int | float]:
    """The numbers of a record as trackers name them: train/bpc, valid/nats_per_token, ..."""
    numbers = {key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"}
    return {f"{record['split']}/{key}": value for key, value in numbers.items()}


def check_installed(names: tuple[TrackerName, ...]) -> None:
    """UserError for a tracker whose package is not there."""
    for name in names:
        spec = importlib.util.find_spec(name)
        # without an origin it is a mere folder of that name, such as W&B leaves behind
        if spec is None or spec.origin is None:
            raise UserError(f"train.track {name}: the package is not installed; pip install 'tarflowlm[track]'")


class Sinks:
    """The trackers of a run. One that fails, at the start or later, is told of once and dropped.

    `resume_at` is the step of the state that is resumed: what a tracker holds of later steps is written anew, and no
    point appears twice.
    """

    def __init__(self, run: RunConfig, out: Path, notice: Callable[[str], None], *, resume_at: int | None) -> None:
        self.notice = notice
        self.sinks: dict[str, Sink] = {}
        kinds: dict[TrackerName, Callable[..., Sink]] = {"tensorboard": TensorBoardSink, "wandb": WandbSink}
        for name in dict.fromkeys(run.train.track):
            with self._dropping(name):
                check_installed((name,))
                self.sinks[name] = kinds[name](run, out, notice, resume_at=resume_at)

    def record(self, record: dict[str, Any]) -> None:
        for name, sink in list(self.sinks.items()):
            with self._dropping(name):
                sink.record(record)

    def close(self) -> None:
        for name, sink in list(self.sinks.items()):
            with self._dropping(name):
                sink.close()

    @contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        """An error in this context becomes one notice, and sink `name` is closed and forgotten."""
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            self.notice(f"{name} is dropped ({text}); metrics.jsonl goes on")
            with suppress(Exception):
                if (failed := self.sinks.pop(name, None)) is not None:
                    failed.close()


class TensorBoardSink:
    """Event files in DIR/tensorboard, flushed with every record as metrics.jsonl is."""

    def __init__(self, run: RunConfig, out: Path, notice: Callable[[str], None], *, resume_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # readers hide what earlier files hold from `purge_step` on
        purge = None if resume_at is None else resume_at + 1
        self.writer = SummaryWriter(str(out / TENSORBOARD), purge_step=purge)
        if resume_at is None:
            self.writer.add_text("config", f"```\n{json.dumps(to_dict(run), indent=2)}\n```")
        notice(f"tensorboard --logdir {out / TENSORBOARD}")

    def record(self, record: dict[str, Any]) -> None:
        for tag, value in scalars(record).items():
            self.writer.add_scalar(tag, value, record["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    """A run of Weights & Biases, online or offline as WANDB_MODE says; its files are in DIR/wandb.

    DIR/wandb.json keeps the run's id and the last step sent of either split. A resumed run takes the same steps to
    the same bits, so that what was sent before the stop need not, and must not, be sent again: W&B cannot take points
    back.
    """

    def __init__(self, run: RunConfig, out: Path, notice: Callable[[str], None], *, resume_at: int | None) -> None:
        import wandb

        self.path = out / WANDB
        known = resume_at is not None and self.path.exists()
        self.state: dict[str, Any] = read_json(self.path) if known else {"id": secrets.token_hex(4), "sent": {}}
        write_json(self.path, self.state)
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

    def record(self, record: dict[str, Any]) -> None:
        split, step = record["split"], record["step"]
        if step <= self.state["sent"].get(split, 0):
            return
        # noted first: a kill in between loses a point here, where the other order would repeat one
        self.state["sent"][split] = step
        write_json(self.path, self.state)
        self.run.log(scalars(record), step=step)

    def close(self) -> None:
        # called while an exception passes through: the run failed
        self.run.finish(exit_code=int(sys.exc_info()[0] is not None))
