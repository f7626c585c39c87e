"""The records of a run: metrics.jsonl, one JSON object per line, the trackers, and the reporter of
a front end.
"""

import importlib.util
import io
import json
import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from tarflowlm.config import RunConfig, TrackerName
from tarflowlm.errors import UserError
from tarflowlm.files import read_json, write_json
from tarflowlm.progress import Silent
from tarflowlm.schema import to_dict

METRICS = "metrics.jsonl"
PROJECT = "tarflowlm"
"""Project of W&B (unless WANDB_PROJECT is set) and of Trackio."""

logger = logging.getLogger("tarflowlm")


def check_installed(names: tuple[TrackerName, ...]) -> None:
    """UserError for a tracker whose package is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        # no origin: only a folder of that name, such as W&B creates
        if spec is None or spec.origin is None:
            raise UserError(
                f"train.track {name}: the package is not installed; pip install 'tarflowlm[track]'"
            )


class Trackers:
    """The trackers of a run. One that fails is dropped with one notice.

    `resume_at` is the step of the state that is resumed, or 0. Repeated steps after it leave no
    point twice.
    """

    def __init__(self, run: RunConfig, out: Path, *, resume_at: int) -> None:
        self._open: dict[str, TensorBoard | TrackedRun] = {}
        for name in dict.fromkeys(run.train.track):
            with self._dropping(name):
                check_installed((name,))
                kind = TensorBoard if name == "tensorboard" else TrackedRun
                self._open[name] = kind(name, run, out, resume_at)

    def record(self, record: dict[str, Any]) -> None:
        """Pass the numbers of a record on as train/bpc, valid/nats_per_token, ..."""
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        values = {f"{record['split']}/{name}": value for name, value in numbers.items()}
        for name, tracker in list(self._open.items()):
            with self._dropping(name):
                tracker.log(values, record["step"], record["split"])

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            with self._dropping(name):
                tracker.close()

    @contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        """A context in which an error becomes one notice, and tracker `name` is closed and
        dropped.
        """
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            logger.warning("%s is dropped (%s); metrics.jsonl continues", name, text)
            with suppress(Exception):
                if (failed := self._open.pop(name, None)) is not None:
                    failed.close()


class TensorBoard:
    """Event files in DIR/tensorboard, flushed after every record."""

    def __init__(self, name: str, run: RunConfig, out: Path, resume_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides the points of earlier files from `purge_step` on
        self.writer = SummaryWriter(str(out / name), purge_step=resume_at + 1)
        if not resume_at:
            self.writer.add_text("config", f"```\n{json.dumps(to_dict(run), indent=2)}\n```")
        logger.info("tensorboard --logdir %s", out / name)

    def log(self, values: dict[str, int | float], step: int, split: str) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class TrackedRun:
    """A run of Weights & Biases, online or offline according to WANDB_MODE, or of Trackio, which
    has the same calls.

    They cannot replace points. So DIR/wandb.json or DIR/trackio.json keeps the run's id there and
    the last step sent of every split; a resumed run, which repeats its steps bit for bit, sends
    none twice.
    """

    def __init__(self, name: str, run: RunConfig, out: Path, resume_at: int) -> None:
        self.module, self.path = import_module(name), out / f"{name}.json"
        self.saved: dict[str, Any] = {"id": secrets.token_hex(4), "sent": {}}
        if self.path.exists():
            self.saved = read_json(self.path)
        write_json(self.path, self.saved)
        identity, title = self.saved["id"], out.resolve().name
        options: dict[str, Any] = {"resume": "allow", "config": to_dict(run)}
        if name == "wandb":
            options |= {
                "project": os.environ.get("WANDB_PROJECT", PROJECT),
                "name": title,
                "id": identity,
            }
            settings = self.module.Settings(silent=True, console="off")
            options |= {"dir": str(out), "reinit": "create_new", "settings": settings}
        else:
            options |= {
                "project": PROJECT,
                "name": f"{title}-{identity}",
            }  # runs are resumed by their name
            options |= {"auto_log_gpu": False, "auto_log_cpu": False}
        with redirect_stdout(io.StringIO()):  # the terminal belongs to the progress bar
            self.run = self.module.init(**options)
        if name == "trackio":
            logger.info("trackio show --project %s", PROJECT)
        else:
            offline = f"offline, send it with `wandb sync {out}/wandb/offline-*`"
            logger.info("wandb: %s", offline if self.run.offline else self.run.url)

    def log(self, values: dict[str, int | float], step: int, split: str) -> None:
        if step > self.saved["sent"].get(split, 0):
            # saved first: a kill in between loses a point, where the other order would send it
            # twice
            self.saved["sent"][split] = step
            write_json(self.path, self.saved)
            self.run.log(values, step=step)

    def close(self) -> None:
        """Finish the run, at W&B as failed if an exception is passing through."""
        if self.module.__name__ == "wandb":
            self.run.finish(exit_code=int(sys.exc_info()[0] is not None))
            return
        # not `self.run.finish()`: that would be called, and print a line, once more at the end of
        # the program
        with redirect_stdout(io.StringIO()):
            self.module.finish()


class Reporter(Silent):
    """The progress of a run, silent; a front end overrides what it shows. The parts are the
    preparation of the corpus, every stage (in steps, or in thousandths of its time) and the test
    split (in windows).
    """

    def record(self, record: dict[str, Any]) -> None:
        """A line was written to metrics.jsonl."""


class MetricsLog:
    """Appends records to metrics.jsonl, flushed, and passes them to the reporter and the trackers.

    Without `directory`, records go to the reporter only. `resume_at` is a saved `position`; later
    lines are dropped.
    """

    def __init__(
        self,
        directory: Path | None,
        reporter: Reporter,
        *,
        resume_at: int = 0,
        trackers: Trackers | None = None,
    ) -> None:
        self._file, self._reporter, self._trackers = None, reporter, trackers
        if directory is None:
            return
        path = directory / METRICS
        if path.exists():
            # a power failure may also have lost a part of the earlier lines
            kept = path.read_bytes()[:resume_at]
            os.truncate(path, kept.rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        self._reporter.record(record)
        if self._trackers is not None:
            self._trackers.record(record)

    def position(self) -> int:
        """Bytes written so far; returns once they are on disk."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._trackers is not None:
            self._trackers.close()
