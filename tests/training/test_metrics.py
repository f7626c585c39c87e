"""metrics.jsonl and the trackers: what was written is read back, and trackers may fail."""

import importlib.util
import logging
import math
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from training_cases import cut, go, resume, same_weights, tiny_run

from helpers import metrics_of
from tarflowlm.config import RunConfig
from tarflowlm.errors import SILENT, Progress, UserError
from tarflowlm.runs.checkpoint import read_run
from tarflowlm.schema import from_dict
from tarflowlm.training.log import MetricsLog

# the log


class Heard(Progress):
    """Keeps the records."""

    def __init__(self) -> None:
        self.records = []

    def record(self, record) -> None:
        self.records.append(record)


def test_lines_are_on_disk_before_the_log_is_closed(tmp_path):
    heard = Heard()
    log = MetricsLog(heard)
    log.open(tmp_path)
    log.write({"split": "valid", "step": 1, "bpc": 4.5})
    assert metrics_of(tmp_path) == heard.records == [{"split": "valid", "step": 1, "bpc": 4.5}]
    log.close()


def write(folder: Path, *steps: int, resume_at: int = 0) -> int:
    """Lines of these steps; returns the position at their end."""
    log = MetricsLog(SILENT)
    log.open(folder, resume_at=resume_at)
    for step in steps:
        log.write({"split": "train", "step": step})
    position = log.position()
    log.close()
    return position


def test_resuming_drops_later_lines_and_torn_ones(tmp_path):
    position = write(tmp_path, 1, 2)
    # of the same step, but after the checkpoint
    write(tmp_path, 2, resume_at=position)
    write(tmp_path, 3, resume_at=position)
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3]
    # a power failure lost the end of the log
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st', encoding="utf-8")
    write(tmp_path, 5, resume_at=1000)
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 5]


# trackers


class FakeTracker(ModuleType):
    """A module with the calls of wandb and trackio; keeps what it is asked for."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.inits, self.logged, self.num_finished, self.Settings = [], [], 0, dict

    def init(self, **options):
        self.inits.append(options)
        log = lambda values, step: self.logged.append((step, values))  # noqa: E731
        return SimpleNamespace(
            offline=False, url="https://example.org/run", log=log, finish=self.finish
        )

    def finish(self, exit_code=0):
        self.num_finished += 1


@pytest.fixture
def fake(monkeypatch):
    """fake(name): a tracker of that name."""

    def install(name: str) -> FakeTracker:
        module = FakeTracker(name)
        module.__spec__ = SimpleNamespace(origin="here")
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


@pytest.fixture
def interrupted(corpus_file):
    """interrupted(out, tracker): 8 steps, killed in step 6, when the newest state was that of step
    4, the last one with the full rate.
    """

    def start(out: Path, tracker: str) -> None:
        run = tiny_run(
            corpus_file,
            track=(tracker,),
            mode="joint",
            stage_steps=(8,),
            checkpoint_every=3,
            evaluate_every=100,
        )
        cut(run, out, 12)
        assert max(line["step"] for line in metrics_of(out)) == 5
        states = sorted(path.name for path in (out / "state").iterdir())
        assert states == ["step-00000003", "step-00000004"]

    return start


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_tracked_run_continues_under_its_name(tmp_path, interrupted, fake, name):
    out, module = tmp_path / "run", fake(name)
    interrupted(out, name)
    resume(out)
    first, second = module.inits
    identity = (out / f"{name}.id").read_text(encoding="ascii")
    assert first["name"] == f"run-{identity}"
    assert first.get("id", identity) == identity
    assert (first["resume"], first) == ("allow", second)
    assert from_dict(RunConfig, first["config"]) == read_run(out)
    assert module.num_finished == 2
    sent = {(step, tag, value) for step, values in module.logged for tag, value in values.items()}
    for line in metrics_of(out):
        assert (line["step"], f"{line['split']}/bpc", line["bpc"]) in sent


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
def test_tensorboard_shows_the_lines_of_metrics_once_over_a_resume(tmp_path, interrupted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    interrupted(out, "tensorboard")
    # a kill may cut the last record short
    (file,) = (out / "tensorboard").glob("events*")
    file.write_bytes(file.read_bytes()[:-7])
    resume(out)
    reader = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    for split in ("train", "valid"):
        shown = [(event.step, event.value) for event in reader.Scalars(f"{split}/bpc")]
        assert shown == [
            (r["step"], pytest.approx(r["bpc"])) for r in metrics_of(out) if r["split"] == split
        ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (lambda **_: 1 / 0, "division by zero"),
        (
            lambda **_: SimpleNamespace(log=lambda *_, **__: Path("/no\nfile").read_text()),
            "/no.*file",
        ),
    ],
    ids=["as it starts", "later"],
)
def test_tracker_that_fails_is_dropped_with_one_notice(
    tmp_path, fake, caplog, corpus_file, start, reason
):
    tracker = fake("wandb")
    tracker.init = start
    with caplog.at_level(logging.INFO, "tarflowlm"):
        summary = go(tiny_run(corpus_file, track=("wandb",)), tmp_path / "tracked")
    assert math.isfinite(summary["test"]["bpc"])
    dropped = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert len(dropped) == 1
    assert re.fullmatch(rf"wandb is dropped \(.*{reason}.*\); metrics.jsonl continues", dropped[0])
    go(tiny_run(corpus_file), tmp_path / "plain")
    assert same_weights(tmp_path / "tracked", tmp_path / "plain")


def test_missing_package_is_noticed_before_anything_is_written(tmp_path, monkeypatch, corpus_file):
    # a folder of that name, such as W&B creates, is no package
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match=r"pip install wandb"):
        go(tiny_run(corpus_file, track=("wandb",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # a run that was begun goes on without it
    log = MetricsLog(SILENT)
    log.track(tiny_run(corpus_file, track=("wandb",)), tmp_path, resume_at=5)
    log.write({"split": "train", "step": 6})
