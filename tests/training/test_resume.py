"""A run that was killed or stopped anywhere, and resumed, equals the run that was never stopped.

More kills of processes, or the same ones again: TARFLOWLM_KILLS=200 TARFLOWLM_KILL_SEED=7 pytest -s
-k processes
"""

import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import flip
from tarflowlm.cli.main import stop_on_signals
from tarflowlm.errors import Stopped, UserError
from tarflowlm.files import read_json
from tarflowlm.runs.checkpoint import load_checkpoint, read_run
from tarflowlm.training import optim, run, state
from tarflowlm.training.state import Counters, TimeSpent
from tarflowlm.training.train import resume, train

CPU = torch.device("cpu")
KILLS = int(os.environ.get("TARFLOWLM_KILLS", "12"))
SEED = int(os.environ.get("TARFLOWLM_KILL_SEED", "0")) or random.randrange(1, 10**6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_run, go, killer):
    """A run that was never stopped: configuration, directory, number of events. It logs less often
    than it saves.
    """
    out, counter = tmp_path_factory.mktemp("whole") / "run", killer()
    config = tiny_run(log_every=3, stage_steps=(3, 2, 3), dropout=0.1)
    go(config, out, counter)
    return config, out, counter.events


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory, whole, cut) -> Path:
    """The same run, killed in step 7, with the states of steps 5 and 6."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    cut(whole[0], out, whole[2] - 5)
    assert names(out) == ["step-00000005", "step-00000006"]
    return out


@pytest.fixture
def stopped(tmp_path, stopped_once) -> Path:
    """A copy of the stopped run, to be damaged or resumed."""
    return Path(shutil.copytree(stopped_once, tmp_path / "stopped"))


@pytest.fixture
def finished(tmp_path, whole) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(whole[1], tmp_path / "finished"))


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "state").iterdir())


def assert_loads_or_is_new(out: Path) -> None:
    """The directory holds a complete model, or says that there is none yet."""
    if (out / "model.safetensors").exists():
        checkpoint = load_checkpoint(out)
        assert checkpoint.model.num_blocks == int(checkpoint.info["blocks"])
    elif out.exists():
        with pytest.raises(UserError, match=r"no trained weights yet|not a complete run directory"):
            load_checkpoint(out)


# kills and signals


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_run_killed_at_any_event_resumes_to_the_same_bits(tmp_path, whole, cut, same_run, part):
    config, never_stopped, num_events = whole
    for at in range(1 + part, num_events + 1, 3):
        out = tmp_path / str(at)
        cut(config, out, at)
        assert_loads_or_is_new(out)
        train(config, out, device=CPU)
        same_run(out, never_stopped)


def test_finished_run_is_left_alone_and_another_one_refused(finished, whole, go):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert (
        go(whole[0], finished)
        == resume(finished, device=CPU)
        == json.loads(before[finished / "summary.json"])
    )
    with pytest.raises(
        UserError, match=r"optim\.lr 1\.0: the run in .* has 0\.006; go on with `tarflowlm"
    ):
        go(replace(whole[0], optim=replace(whole[0].optim, lr=1.0)), finished)
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("at", "number"),
    [
        (9, signal.SIGTERM),
        pytest.param(2, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(14, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("test", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_signal_saves_and_run_resumes_to_the_same_bits(
    tmp_path, whole, same_run, killer, at, number
):
    config, never_stopped, num_events = whole
    out, before = tmp_path / "run", signal.getsignal(number)
    reporter = killer(num_events - 1 if at == "test" else at, lambda: os.kill(os.getpid(), number))
    with pytest.raises(
        Stopped, match=f"stopped by {signal.Signals(number).name} and saved at step"
    ):
        train(config, out, device=CPU, reporter=reporter, stop_requests=stop_on_signals)
    assert signal.getsignal(number) == before
    load_checkpoint(out)
    resume(out, device=CPU)
    same_run(out, never_stopped)


def test_second_signal_leaves_at_once(tmp_path, whole, killer):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(
            whole[0],
            tmp_path / "run",
            device=CPU,
            reporter=killer(12, twice),
            stop_requests=stop_on_signals,
        )
    load_checkpoint(tmp_path / "run")


def work(config, out: Path, cache: str) -> None:
    """In a process of its own: begin the run, or go on with it."""
    os.environ["TARFLOWLM_CACHE"] = cache
    torch.set_num_threads(1)
    train(config, out, device=CPU)


def unfinished(out: Path) -> bool:
    """Whether a file or a state is being written or deleted."""
    return any([*out.glob(".*.tmp"), *out.glob("best/.*.tmp"), *out.glob("state/.step-*")])


@pytest.mark.slow
def test_processes_killed_at_random_instants_resume_to_the_same_bits(tmp_path, tiny_run, same_run):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tarflowlm.training.train"])
    config, rng = (
        tiny_run(stage_steps=(3, 3, 2), log_every=3, checkpoint_every=1),
        random.Random(SEED),
    )

    def start(out: Path) -> multiprocessing.Process:
        process = context.Process(target=work, args=(config, out, os.environ["TARFLOWLM_CACHE"]))
        process.start()
        return process

    for folder in ("warm", "whole"):  # the first one waits for PyTorch
        begun, process = time.monotonic(), start(tmp_path / folder)
        process.join()
        assert process.exitcode == 0
        seconds = time.monotonic() - begun
    kills, finished, hits = 0, 0, 0
    while kills < KILLS or finished == 0:
        out = tmp_path / f"run-{finished}"
        process = start(out)
        if kills < KILLS:
            process.join(rng.uniform(0, seconds))
            while (
                kills % 2 and process.is_alive() and not unfinished(out)
            ):  # the next thing that is written
                time.sleep(0.0005)
            process.kill()
        process.join()
        if process.exitcode == 0:
            same_run(out, tmp_path / "whole")
            finished += 1
            continue
        assert process.exitcode == -signal.SIGKILL, f"TARFLOWLM_KILL_SEED={SEED}"
        kills, hits = kills + 1, hits + unfinished(out)
        assert_loads_or_is_new(out)
        assert_loads_or_is_new(out / "best")
    assert hits, "no kill came while something was written"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["joint", "baseline"])
def test_joint_and_baseline_runs_resume(
    tmp_path, tiny_run, tiny_baseline, go, cut, same_run, family
):
    config = tiny_run(mode="joint", stage_steps=(5,)) if family == "joint" else tiny_baseline()
    go(config, tmp_path / "whole")
    cut(config, tmp_path / "cut", 8)
    resume(tmp_path / "cut", device=CPU)
    same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_run_ends_with_its_best_weights_even_if_killed(
    tmp_path, tiny_run, go, cut, same_run, read_metrics
):
    config = tiny_run(stage_steps=(6, 6, 6), keep="best", ema=0.5, optim={"lr": 0.3})
    go(config, tmp_path / "whole")
    bounds = [
        line["nats_per_token"]
        for line in read_metrics(tmp_path / "whole")
        if line["split"] == "valid"
    ]
    assert bounds[1] < bounds[3]  # of the first stage, after its start
    last, best = (
        load_file(tmp_path / "whole" / name / "model.safetensors") for name in ("", "best")
    )
    assert all(torch.equal(tensor, best[name]) for name, tensor in last.items())
    for at in range(2, 46, 6):
        cut(config, tmp_path / str(at), at)
        go(config, tmp_path / str(at))
        same_run(tmp_path / str(at), tmp_path / "whole")


@pytest.mark.slow
def test_state_of_another_kind_of_device_goes_on_repeatably(
    tmp_path, stopped, same_run, monkeypatch, caplog
):
    of_gpu, real = {"generator": torch.zeros(16, dtype=torch.uint8)}, state.state_tensors
    monkeypatch.setattr(state, "state_tensors", lambda *args: real(*args) | of_gpu)
    for out in (Path(shutil.copytree(stopped, tmp_path / "again")), stopped):
        resume(out, device=CPU)
    assert "is from another kind of device" in caplog.text
    same_run(tmp_path / "again", stopped)


# what can be resumed


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped", "no-manifest", "missing"])
def test_damaged_state_is_set_aside_for_the_one_before(stopped, whole, same_run, caplog, damage):
    newest = stopped / "state" / "step-00000006"
    (tensors,) = newest.glob("*.distcp")
    {"flipped": lambda: flip(tensors), "missing": tensors.unlink}.get(
        damage, (newest / "manifest.json").unlink
    )()
    with caplog.at_level(logging.INFO, "tarflowlm"):
        resume(stopped, device=CPU)
    assert (
        "step-00000006 is damaged, set aside as damaged-step-00000006: resuming from step-00000005"
        in caplog.text
    )
    same_run(stopped, whole[1])


def test_run_without_an_undamaged_state_is_left_alone(stopped):
    for path in (stopped / "state").iterdir():
        flip(path / "counters.json")
    before = sorted(stopped.rglob("*"))
    with pytest.raises(UserError, match="all of step-00000005, step-00000006 are damaged"):
        resume(stopped, device=CPU)
    assert sorted(stopped.rglob("*")) == before


def test_damaged_weights_are_restored_from_the_state(finished, whole, same_run):
    flip(finished / "model.safetensors")
    with pytest.raises(UserError, match=r"is damaged .*`tarflowlm train --resume .*` restores it"):
        load_checkpoint(finished)
    resume(finished, device=CPU)
    same_run(finished, whole[1])


@pytest.mark.slow
def test_state_of_another_run_is_refused(tmp_path, stopped, tiny_run, cut):
    cut(tiny_run(stage_steps=(3, 2, 3), model={"latent_dim": 4}), tmp_path / "other", 19)
    shutil.rmtree(stopped / "state")
    shutil.copytree(tmp_path / "other" / "state", stopped / "state")
    with pytest.raises(UserError, match="does not fit this run"):
        resume(stopped, device=CPU)


def test_changed_text_is_refused(tmp_path, whole, cut, corpus_file):
    text = Path(shutil.copy(corpus_file, tmp_path / "mine.txt"))
    config = replace(whole[0], data=replace(whole[0].data, source=str(text)))
    cut(config, tmp_path / "run", 12)
    # as long as before
    text.write_text(text.read_text(encoding="utf-8").replace("cat", "cow"), encoding="utf-8")
    with pytest.raises(UserError, match="is not the text that"):
        resume(tmp_path / "run", device=CPU)


def test_counters_of_earlier_versions_are_read(stopped):
    saved = read_json(stopped / "state" / "step-00000006" / "counters.json")["counters"]
    older = {k: v for k, v in saved.items() if k != "spent"} | {"best": 3.0, "stalled": 1}
    assert Counters.restored(older) == replace(Counters.restored(saved), spent=TimeSpent())


def test_run_from_before_muon_had_options_resumes_as_it_began(stopped, monkeypatch):
    path = stopped / "config.json"
    older = "\n".join(
        line for line in path.read_text(encoding="utf-8").splitlines() if "muon_" not in line
    )
    path.write_text(older, encoding="utf-8")
    built = []

    def watched(config, model):
        built.append((config.muon_precision, config.muon_qkv))
        return optim.build_optimizers(config, model)

    monkeypatch.setattr(run, "build_optimizers", watched)
    resume(stopped, device=CPU)
    assert set(built) == {("bfloat16", "together")}


def test_fields_of_stalled_stages_in_old_configurations_are_dropped(finished, whole):
    path = finished / "config.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["train"] |= {"advance": "budget", "stall_evaluations": 4, "stall_tolerance": 0.002}
    path.write_text(json.dumps(document), encoding="utf-8")
    assert read_run(finished) == read_run(whole[1])


# directories


@pytest.mark.slow
def test_two_writers_exclude_each_other(tmp_path, tiny_run, go, killer):
    out, config, refused = tmp_path / "run", tiny_run(), []

    def second() -> None:
        for again in (lambda: resume(out, device=CPU), lambda: go(config, out)):
            with pytest.raises(UserError) as raised:
                again()
            refused.append(str(raised.value))

    go(config, out, killer(9, second))
    assert all("is being written by" in message for message in refused)


@pytest.mark.parametrize("name", ["mine.txt", "config.json"])
def test_foreign_directory_is_left_alone(tmp_path, tiny_run, go, name):
    (tmp_path / name).write_text("{}", encoding="utf-8")
    for out in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match="exists already"):
            go(tiny_run(), out)
    assert [path.name for path in tmp_path.iterdir()] == [name]
