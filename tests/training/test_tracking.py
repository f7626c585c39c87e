"""TensorBoard, W&B and Trackio beside metrics.jsonl: read back what was written, and let them fail."""

import importlib.util
import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tarflowlm.training.lifecycle import resume

from tarflowlm.config import RunConfig
from tarflowlm.errors import UserError
from tarflowlm.runs.checkpoint import read_run
from tarflowlm.runs.strict_json import from_dict, to_dict
from tarflowlm.training import tracking
from tarflowlm.training.metrics import Reporter
from tarflowlm.training.state import newest_state

CPU = torch.device("cpu")


needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


class Killed(BaseException):
    pass


class Watcher(Reporter):
    """Keeps the notices, and kills the run after its `at`-th step."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.steps, self.notices = at, 0, []

    def step(self, num_tokens, share=None):
        self.steps += 1
        if self.steps == self.at:
            raise Killed

    def notice(self, text):
        self.notices.append(text)


class FakeWandb(ModuleType):
    """Records what the module and its runs are asked for."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits, self.logged, self.finished = [], [], []
        self.Settings = dict

    def init(self, **options):
        self.inits.append(options)
        return SimpleNamespace(
            offline=False,
            url="https://example.org/run",
            log=lambda values, step: self.logged.append((step, values)),
            finish=lambda exit_code: self.finished.append(exit_code),
        )


@pytest.fixture
def fake_wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json" if name == "wandb" else name))
    return fake


@pytest.fixture(scope="module")
def interrupted(tiny_run, go):
    """interrupted(out, tracker): 8 steps, killed when 5 were logged and the newest state was that of step 3."""

    def start(out: Path, tracker: str) -> Watcher:
        run = tiny_run(track=(tracker,), mode="joint", stage_steps=(8,), checkpoint_every=3)
        watcher = Watcher(at=6)
        with pytest.raises(Killed):
            go(run, out, watcher)
        assert max(line["step"] for line in lines(out)) == 5
        assert newest_state(out, print).name == "step-00000003"
        return watcher

    return start


def points(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: tag -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def expected(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """The same from metrics.jsonl; TensorBoard keeps float32."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines(directory):
        for key in line.keys() - {"split", "step"}:
            value = torch.tensor(line[key], dtype=torch.float32).item()
            found.setdefault(f"{line['split']}/{key}", []).append((line["step"], value))
    return found


def wandb_history(file: Path) -> Iterator[tuple[int, dict]]:
    """Step and values of every point in a .wandb file: a LevelDB log (here of one block) of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position = file.read_bytes(), 7
    assert len(data) < 32768
    while position < len(data):
        size, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        assert kind == 1  # not in parts
        record = Record.FromString(data[position + 7 : position + 7 + size])
        position += 7 + size
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield record.history.step.num, {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


@needs_tensorboard
def test_tensorboard_shows_the_lines_of_metrics(tmp_path, tiny_run, go):
    watcher = Watcher()
    go(tiny_run(track=("tensorboard",)), tmp_path / "run", watcher)
    assert not [text for text in watcher.notices if "dropped" in text]
    assert points(tmp_path / "run" / "tensorboard") == expected(tmp_path / "run")


@needs_tensorboard
@pytest.mark.parametrize("cut", [0, 7])
def test_a_resumed_run_repeats_no_point_in_tensorboard(tmp_path, interrupted, cut):
    out = tmp_path / "run"
    interrupted(out, "tensorboard")
    # a kill may cut the last record short
    (file,) = (out / "tensorboard").glob("events*")
    file.write_bytes(file.read_bytes()[: -cut or None])
    resume(out, device=CPU)
    assert points(out / "tensorboard") == expected(out)
    assert [step for step, _ in points(out / "tensorboard")["train/bpc"]] == list(range(1, 9))


def test_wandb_gets_every_line_once_and_one_run_over_resumes(tmp_path, interrupted, fake_wandb):
    out, watcher = tmp_path / "run", Watcher()
    interrupted(out, "wandb")
    resume(out, device=CPU, reporter=watcher)
    first, second = fake_wandb.inits
    assert first["id"] == second["id"] == json.loads((out / "wandb.json").read_text(encoding="utf-8"))["id"]
    assert (first["resume"], first["name"], first["dir"]) == ("allow", "run", str(out))
    assert from_dict(RunConfig, first["config"]) == read_run(out)
    assert fake_wandb.finished == [1, 0]
    assert "wandb: https://example.org/run" in watcher.notices
    keys = [(step, name) for step, values in fake_wandb.logged for name in values]
    assert len(keys) == len(set(keys))
    sent = {(step, name): value for step, values in fake_wandb.logged for name, value in values.items()}
    written = {(line["step"], n): v for line in lines(out) for n, v in tracking.scalars(line).items()}
    assert sent.keys() == written.keys()
    same = [key for key in sent if not key[1].endswith("tokens_per_second")]
    assert [sent[key] for key in same] == [written[key] for key in same]


def test_wandb_offline_for_real(tmp_path, interrupted, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "run"
    assert any("wandb sync" in text for text in interrupted(out, "wandb").notices)
    resume(out, device=CPU)
    wandb.teardown()  # its process writes behind
    files = list(out.glob("wandb/offline-run-*/*.wandb"))
    identity = json.loads((out / "wandb.json").read_text(encoding="utf-8"))["id"]
    assert {file.name for file in files} == {f"run-{identity}.wandb"}
    sent = [item for file in sorted(files, key=lambda f: f.parent.name) for item in wandb_history(file)]
    assert [(step, loss) for step, values in sent for name, loss in values.items() if name == "train/bpc"] == [
        (line["step"], line["bpc"]) for line in lines(out) if line["split"] == "train"
    ]
    assert [step for step, values in sent if "valid/bpc" in values] == [2, 4, 6, 8]


def test_trackio_for_real(tmp_path, interrupted, monkeypatch, capsys):
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    for module in ("trackio.utils", "trackio.sqlite_storage"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio")
    out = tmp_path / "run"
    assert "trackio show --project tarflowlm" in interrupted(out, "trackio").notices
    resume(out, device=CPU)
    identity = json.loads((out / "trackio.json").read_text(encoding="utf-8"))["id"]
    assert SQLiteStorage.get_runs("tarflowlm") == [f"run-{identity}"]
    sent = SQLiteStorage.get_logs("tarflowlm", f"run-{identity}")
    for split in ("train", "valid"):
        shown = [(point["step"], point[f"{split}/bpc"]) for point in sent if f"{split}/bpc" in point]
        assert shown == [(line["step"], line["bpc"]) for line in lines(out) if line["split"] == split]
    assert "rackio" not in capsys.readouterr().out
    assert trackio.context_vars.current_run.get() is None  # it would print a line as the program ends


class Broken:
    def __init__(self, run, out, notice, *, resume_at):
        self.left = 2

    def record(self, record):
        self.left -= 1
        if self.left < 0:
            raise OSError("no space left\non the tracker")

    def close(self):
        raise RuntimeError("closing fails too")


@needs_tensorboard
def test_a_sink_that_fails_is_told_of_once_and_dropped(tmp_path, tiny_run, go, monkeypatch, same_weights):
    monkeypatch.setattr(tracking, "TensorBoardSink", Broken)
    watcher = Watcher()
    go(tiny_run(track=("tensorboard",)), tmp_path / "tracked", watcher)
    told = [text for text in watcher.notices if "tensorboard" in text]
    assert told == ["tensorboard is dropped (no space left on the tracker); metrics.jsonl continues"]
    go(tiny_run(), tmp_path / "plain")
    assert same_weights(tmp_path / "tracked", tmp_path / "plain")


@needs_tensorboard
def test_a_sink_that_cannot_start_or_end_stops_nothing(tmp_path, tiny_run, go, fake_wandb, monkeypatch):
    monkeypatch.setattr(fake_wandb, "init", lambda **options: 1 / 0)
    monkeypatch.setattr(Broken, "record", lambda self, record: None)
    monkeypatch.setattr(tracking, "TensorBoardSink", Broken)
    watcher = Watcher()
    summary = go(tiny_run(track=("wandb", "tensorboard")), tmp_path / "run", watcher)
    assert math.isfinite(summary["test"]["bpc"])
    dropped = [text for text in watcher.notices if "dropped" in text]
    assert len(dropped) == 2
    assert "wandb is dropped (division by zero)" in dropped[0]
    assert "tensorboard is dropped (closing fails too)" in dropped[1]


def test_a_missing_package_is_told_before_anything_is_written(tmp_path, tiny_run, go, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tarflowlm\[track\]'"):
        go(tiny_run(track=("tensorboard",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_same_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="the package is not installed"):
        tracking.check_installed(("wandb",))


@needs_tensorboard
def test_a_package_that_is_gone_does_not_stop_a_resumed_run(tmp_path, tiny_run, go, monkeypatch):
    out, watcher = tmp_path / "run", Watcher()
    with pytest.raises(Killed):
        go(tiny_run(track=("tensorboard",)), out, Watcher(at=5))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    resume(out, device=CPU, reporter=watcher)
    assert len([text for text in watcher.notices if "tarflowlm[track]" in text]) == 1


def test_trackers_survive_the_config_file(tiny_run):
    run = tiny_run(track=("wandb", "tensorboard"))
    assert from_dict(RunConfig, to_dict(run)) == run
    wrong = to_dict(run) | {"train": to_dict(run)["train"] | {"track": ["mlflow"]}}
    with pytest.raises(UserError, match="'mlflow' is not one of 'tensorboard', 'wandb', 'trackio'"):
        from_dict(RunConfig, wrong)
