"""A run that was killed anywhere and resumed is the run that was never stopped."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tarflowlm.training.lifecycle import resume

from tarflowlm.errors import UserError
from tarflowlm.runs.checkpoint import export, load_checkpoint
from tarflowlm.training import state
from tarflowlm.training.metrics import Reporter

CPU = torch.device("cpu")


class Killed(BaseException):
    """Like the interrupt of a user: no `except Exception` may swallow it."""


class Killer(Reporter):
    """Counts everything a run tells, and kills it at event number `at`."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.events = at, 0

    def _event(self) -> None:
        if self.events == self.at:
            raise Killed
        self.events += 1

    def stage(self, index, num_stages, num_steps, done, description):
        self._event()

    def step(self, num_tokens, share=None):
        self._event()

    def record(self, record):
        self._event()

    def notice(self, text):
        # whether the corpus was cached differs between runs; where it is evaluated does not
        if text.startswith("evaluating"):
            self._event()


def killed_run(go, run, out: Path, at: int) -> None:
    with pytest.raises(Killed):
        go(run, out, Killer(at))


@pytest.fixture(scope="module")
def assert_same_run(same_weights, read_metrics):
    def check(left: Path, right: Path) -> None:
        assert same_weights(left, right)
        assert read_metrics(left) == read_metrics(right)
        summaries = [json.loads((d / "summary.json").read_text(encoding="utf-8")) for d in (left, right)]
        for name in ("steps", "tokens", "stage_tokens", "stage_valid_bpc", "parameters"):
            assert summaries[0][name] == summaries[1][name]

    return check


def state_names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "state").glob("step-*"))


def assert_loads_or_is_new(out: Path) -> bool:
    """The directory holds a complete model, or says that there is none yet."""
    if not (out / "model.safetensors").exists():
        with pytest.raises(UserError, match="no trained weights yet"):
            load_checkpoint(out)
        return False
    checkpoint = load_checkpoint(out)
    assert checkpoint.model.num_blocks == int(checkpoint.info["blocks"])
    return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_run, go):
    """The run that was never stopped, and the number of its events. Logging is sparser than checkpoints."""
    out, counter = tmp_path_factory.mktemp("whole") / "run", Killer()
    run = tiny_run(log_every=3, stage_steps=(3, 2, 3))
    go(run, out, counter)
    return run, out, counter.events


# in four parts, so that a failure is found and rerun sooner
@pytest.mark.parametrize("part", range(4))
def test_killed_anywhere_and_resumed_equals_never_stopped(tmp_path, whole, go, assert_same_run, part):
    run, never_stopped, num_events = whole
    for at in range(part, num_events, 4):
        out = tmp_path / str(at)
        killed_run(go, run, out, at)
        loads = assert_loads_or_is_new(out)
        assert loads or not state_names(out)
        resume(out, device=CPU)
        assert_same_run(never_stopped, out)


def test_killed_twice(tmp_path, whole, go, assert_same_run):
    run, never_stopped, num_events = whole
    out = tmp_path / "run"
    killed_run(go, run, out, num_events // 3)
    with pytest.raises(Killed):
        resume(out, device=CPU, reporter=Killer(num_events // 3))
    assert_loads_or_is_new(out)
    resume(out, device=CPU)
    assert_same_run(never_stopped, out)


def test_killed_while_a_state_is_written(tmp_path, whole, go, assert_same_run, monkeypatch):
    run, never_stopped, _ = whole
    out, calls = tmp_path / "run", []

    def dies_at_the_second(path, value):
        calls.append(path)
        if len(calls) == 2:
            raise Killed
        return write_json(path, value)

    write_json = state.write_json
    monkeypatch.setattr(state, "write_json", dies_at_the_second)
    with pytest.raises(Killed):
        go(run, out)
    monkeypatch.setattr(state, "write_json", write_json)
    assert {path.name for path in (out / "state").iterdir()} == {"step-00000002"}
    # what a kill would have left, and an exception did not
    (out / "state" / ".step-00000003").mkdir()
    (out / "state" / ".step-00000003" / "__0_0.distcp").write_bytes(b"a part")
    (out / ".model.safetensors.x.tmp").write_bytes(b"a part")
    assert_loads_or_is_new(out)
    resume(out, device=CPU)
    assert_same_run(never_stopped, out)
    assert not list((out / "state").glob(".*"))
    assert not list(out.glob(".model*"))


def test_stall_counts_survive(tmp_path, tiny_run, go, assert_same_run):
    run = tiny_run(
        stage_steps=(40, 40, 2), advance="stall", stall_evaluations=3, stall_tolerance=1e9, checkpoint_every=4
    )
    never_stopped, out = tmp_path / "whole", tmp_path / "cut"
    counter = Killer()
    go(run, never_stopped, counter)
    for at in (counter.events // 4, counter.events // 2, 3 * counter.events // 4):
        killed_run(go, run, out, at)
        resume(out, device=CPU)
        assert_same_run(never_stopped, out)
        shutil.rmtree(out)


def test_joint_and_baseline_runs_resume(tmp_path, tiny_run, tiny_baseline, go, assert_same_run):
    for name, run in {"joint": tiny_run(mode="joint", stage_steps=(5,)), "baseline": tiny_baseline()}.items():
        go(run, tmp_path / name)
        killed_run(go, run, tmp_path / f"{name}-cut", 8)
        resume(tmp_path / f"{name}-cut", device=CPU)
        assert_same_run(tmp_path / name, tmp_path / f"{name}-cut")


def test_a_finished_run_has_nothing_to_resume(whole):
    with pytest.raises(UserError, match="is finished"):
        resume(whole[1], device=CPU)


def test_only_the_newest_states_are_kept(whole):
    assert state_names(whole[1]) == ["step-00000006", "step-00000008"]


def test_resuming_what_is_no_run_says_so(tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        resume(tmp_path / "nothing", device=CPU)
    with pytest.raises(UserError, match=r"config\.json is missing"):
        resume(tmp_path, device=CPU)


def test_a_run_without_a_checkpoint_begins_again(tmp_path, whole, go, assert_same_run):
    run, never_stopped, _ = whole
    out = tmp_path / "run"
    killed_run(go, run, out, 2)
    assert not state_names(out)
    # a log that an earlier beginning left, and a tokenizer that it did not come to
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"split": "train", "step": 1}\n')
    (out / "tokenizer.json").unlink()
    resume(out, device=CPU)
    assert_same_run(never_stopped, out)


def test_a_run_that_had_not_even_written_its_configuration_is_no_obstacle(tmp_path, whole, go, assert_same_run):
    run, never_stopped, _ = whole
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.json.x1.tmp").write_text("{", encoding="utf-8")
    (out / ".lock").touch()
    go(run, out)
    assert_same_run(never_stopped, out)
    assert not list(out.glob(".*.tmp"))


def test_a_model_without_its_training_is_not_begun_again(tmp_path, whole):
    _, never_stopped, _ = whole
    export(never_stopped, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="no state to resume from"):
        resume(tmp_path / "model", device=CPU)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_killed_while_its_first_state_is_written(tmp_path, whole, go, assert_same_run):
    run, never_stopped, _ = whole
    out = tmp_path / "run"
    killed_run(go, run, out, 2)
    (out / "state" / ".step-00000002").mkdir()
    (out / "state" / ".step-00000002" / "__0_0.distcp").write_bytes(b"a part")
    resume(out, device=CPU)
    assert_same_run(never_stopped, out)


def test_weights_whose_states_are_gone_are_set_aside(tmp_path, whole, go, assert_same_run):
    run, never_stopped, num_events = whole
    out = tmp_path / "run"
    killed_run(go, run, out, num_events // 2)
    before = [(out / name).read_bytes() for name in ("model.safetensors", "best/model.safetensors")]
    for kept in (out / "state").iterdir():
        shutil.rmtree(kept)
    resume(out, device=CPU)
    assert_same_run(never_stopped, out)
    aside = out / "before-restart-1"
    assert [(aside / name).read_bytes() for name in ("model.safetensors", "best/model.safetensors")] == before
    load_checkpoint(aside / "best")


def test_a_finished_run_without_states_is_not_begun_again(tmp_path, whole):
    out = tmp_path / "run"
    shutil.copytree(whole[1], out)
    for kept in (out / "state").iterdir():
        shutil.rmtree(kept)
    (out / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="no state to resume from"):
        resume(out, device=CPU)
    load_checkpoint(out / "best")
