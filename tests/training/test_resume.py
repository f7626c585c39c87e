"""A run that was killed or stopped anywhere, and resumed, equals the run that was never stopped.

More kills of processes, or the same ones again: TARFLOWLM_KILLS=200 TARFLOWLM_KILL_SEED=7 pytest -s
-k random_instants
"""

import errno
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_cases import (
    CPU,
    Killer,
    assert_same_run,
    cut,
    go,
    read_metrics,
    resume,
    tiny_baseline,
    tiny_run,
)

from helpers import flip, mostly_nightly
from tarflowlm.cli.signals import handled, stop_on_signals
from tarflowlm.config import TokenizerConfig
from tarflowlm.data.bpe import train_bpe
from tarflowlm.errors import SILENT, Progress, Stopped, UserError
from tarflowlm.runs.checkpoint import load_checkpoint, read_run
from tarflowlm.runs.weights import write_manifest
from tarflowlm.training import checkpoint, parallel, writer
from tarflowlm.training import train as training
from tarflowlm.training.checkpoint import newest_state
from tarflowlm.training.train import train

PARTS = 6
"""Of the events at which a run is killed; the first is tested with every change."""
KILLS = int(os.environ.get("TARFLOWLM_KILLS", "12"))
NEEDS_TERMINAL = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
SEED = int(os.environ.get("TARFLOWLM_KILL_SEED", "0")) or random.randrange(1, 10**6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus_file):
    """A run that was never stopped: configuration, directory, number of events. It logs less often
    than it saves.
    """
    out, counter = tmp_path_factory.mktemp("whole") / "run", Killer()
    config = tiny_run(corpus_file, log_every=3, stage_steps=(3, 2, 3), dropout=0.1)
    go(config, out, counter)
    return config, out, counter.events


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory, whole) -> Path:
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
        with pytest.raises(UserError, match=r"no trained weights|complete|config.json is missing"):
            load_checkpoint(out)


# kills and signals


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, PARTS))]
)
def test_run_killed_at_any_event_resumes_to_the_same_bits(tmp_path, whole, part):
    config, never_stopped, num_events = whole
    for at in range(1 + part, num_events + 1, PARTS):
        out = tmp_path / str(at)
        cut(config, out, at)
        assert_loads_or_is_new(out)
        train(config, out, device=CPU)
        assert_same_run(out, never_stopped)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("keep", ["last", "best"])
def test_run_whose_block_leaves_resumes_to_the_same_bits(tmp_path, corpus_file, keep):
    """Block 2 has no step; block 3, which takes its place, goes astray: with best weights it
    leaves as well.
    """
    config = tiny_run(
        corpus_file,
        stage_steps=(2, 0, 3),
        keep_idle=False,
        keep=keep,
        optim={"lr": 1.0},
    )
    counter = Killer()
    go(config, tmp_path / "whole", counter)
    for at in range(1, counter.events + 1):
        out = tmp_path / str(at)
        cut(config, out, at)
        assert_loads_or_is_new(out)
        assert_loads_or_is_new(out / "best")
        go(config, out)
        assert_same_run(out, tmp_path / "whole")
        assert read_run(out) == read_run(out / "best") == read_run(tmp_path / "whole")
    # the state of a run without the block, from before it left
    damaged = tmp_path / "whole" / "model.safetensors"
    flip(damaged)
    resume(tmp_path / "whole")
    assert_same_run(out, tmp_path / "whole")


def test_finished_run_is_left_alone_and_another_one_refused(finished, whole):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert (
        go(whole[0], finished) == resume(finished) == json.loads(before[finished / "summary.json"])
    )
    with pytest.raises(
        UserError, match=r"optim\.lr 1\.0: the run in .* has 0\.006; .*`tarflowlm train --resume"
    ):
        go(replace(whole[0], optim=replace(whole[0].optim, lr=1.0)), finished)
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_an_evaluation_comes_after_a_state_of_its_step(tmp_path, corpus_file, monkeypatch):
    config = tiny_run(corpus_file, stage_steps=(8,), mode="joint")
    seldom = replace(config.train, checkpoint_every=100, evaluate_every=4, keep="last")

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "validate", kill)
    with pytest.raises(KeyboardInterrupt):
        go(replace(config, train=seldom), tmp_path / "run")
    assert names(tmp_path / "run") == ["step-00000004"]


@pytest.mark.parametrize(
    ("at", "number"),
    [
        (9, signal.SIGTERM),
        pytest.param(2, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(14, signal.SIGINT, marks=[pytest.mark.slow, pytest.mark.nightly]),
        pytest.param("test", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(9, getattr(signal, "SIGHUP", None), marks=[NEEDS_TERMINAL, pytest.mark.slow]),
    ],
)
def test_signal_saves_and_run_resumes_to_the_same_bits(tmp_path, whole, at, number):
    config, never_stopped, num_events = whole
    out = tmp_path / "my run"
    reporter = Killer(num_events - 1 if at == "test" else at, lambda: os.kill(os.getpid(), number))
    how = f"stopped by {signal.Signals(number).name} and saved at step .*train --resume '{out}'"
    # whoever runs the tests may have it ignored
    with handled({number: signal.default_int_handler}):
        with pytest.raises(Stopped, match=how):
            train(config, out, device=CPU, reporter=reporter, stop_requests=stop_on_signals)
        assert signal.getsignal(number) is signal.default_int_handler
    load_checkpoint(out)
    resume(out)
    assert_same_run(out, never_stopped)


@NEEDS_TERMINAL
def test_a_closed_terminal_is_one_signal_and_takes_no_more_lines():
    """A shell repeats the signal to its programs; `nohup` has it ignored."""
    first, second = os.openpty()
    kept = os.dup(2)
    try:
        os.dup2(second, 2)
        with handled({signal.SIGHUP: signal.SIG_DFL}), stop_on_signals() as stopped:
            os.close(first)
            os.close(second)
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            os.write(2, b"a line to nobody")
            assert stopped() == "SIGHUP"
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    with handled({signal.SIGHUP: signal.SIG_IGN}), stop_on_signals() as stopped:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stopped() is None


@pytest.mark.slow
def test_second_signal_leaves_at_once(tmp_path, whole):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(
            whole[0],
            tmp_path / "run",
            device=CPU,
            reporter=Killer(12, twice),
            stop_requests=stop_on_signals,
        )
    load_checkpoint(tmp_path / "run")


class KilledAtStage(Progress):
    """Kills the process at the beginning of a stage."""

    def __init__(self, begins: str) -> None:
        self.begins = begins

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        if name.startswith(self.begins):
            os.kill(os.getpid(), signal.SIGKILL)


def work(config, out: Path, cache: str, reporter: Progress = SILENT) -> None:
    """In a process of its own: begin the run, or go on with it."""
    os.environ["TARFLOWLM_CACHE"] = cache
    torch.set_num_threads(1)
    train(config, out, device=CPU, reporter=reporter)


def processes() -> Any:
    """Where processes begin with PyTorch and this package loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tarflowlm.training.train"])
    return context


def unfinished(out: Path) -> bool:
    """Whether a file or a state is being written or deleted."""
    return any([*out.glob(".*.tmp"), *out.glob("best/.*.tmp"), *out.glob("state/.step-*")])


@pytest.mark.slow
def test_a_process_killed_as_each_stage_begins_resumes_to_the_same_bits(tmp_path, whole):
    config, never_stopped, _ = whole
    out, cache = tmp_path / "run", os.environ["TARFLOWLM_CACHE"]
    for begins in ("stage 1", "stage 2", "stage 3", "evaluating"):
        process = processes().Process(target=work, args=(config, out, cache, KilledAtStage(begins)))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert_loads_or_is_new(out)
    resume(out)
    assert_same_run(out, never_stopped)


@pytest.mark.slow
@pytest.mark.nightly
def test_processes_killed_at_random_instants_resume_to_the_same_bits(tmp_path, corpus_file):
    context, rng = processes(), random.Random(SEED)
    config = tiny_run(corpus_file, stage_steps=(3, 3, 2), log_every=3, checkpoint_every=1)

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
            assert_same_run(out, tmp_path / "whole")
            finished += 1
            continue
        assert process.exitcode == -signal.SIGKILL, f"TARFLOWLM_KILL_SEED={SEED}"
        kills, hits = kills + 1, hits + unfinished(out)
        assert_loads_or_is_new(out)
        assert_loads_or_is_new(out / "best")
    assert hits, "no kill came while something was written"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["joint", "baseline"])
def test_joint_and_baseline_runs_resume(tmp_path, family, corpus_file):
    config = (
        tiny_run(corpus_file, mode="joint", stage_steps=(5,))
        if family == "joint"
        else tiny_baseline(corpus_file)
    )
    go(config, tmp_path / "whole")
    cut(config, tmp_path / "cut", 8)
    resume(tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_run_resumes_without_the_file_of_its_tokenizer(tmp_path, corpus_file):
    text = corpus_file.read_text(encoding="utf-8")
    train_bpe([text], 280, alphabet=None, normalization="none").save(tmp_path)
    file = tmp_path / "tokenizer.json"
    pieces = TokenizerConfig(kind="bpe", source=str(file), normalize="none")
    config = tiny_baseline(corpus_file)
    config = replace(config, data=replace(config.data, tokenizer=pieces))
    go(config, tmp_path / "whole")
    cut(config, tmp_path / "cut", 8)
    file.unlink()
    resume(tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_compilation_that_is_asked_for_and_fails_is_refused(tmp_path, corpus_file, monkeypatch):
    monkeypatch.setattr(parallel, "compilation_problem", lambda _: "there is no compiler")
    with pytest.raises(UserError, match=r"compile True: .*\(there is no compiler\); leave it out"):
        go(tiny_baseline(corpus_file, compile=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.nightly
def test_run_ends_with_its_best_weights_even_if_killed(tmp_path, corpus_file):
    config = tiny_run(corpus_file, stage_steps=(6, 6, 6), keep="best", ema=0.5, optim={"lr": 0.3})
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
        assert_same_run(tmp_path / str(at), tmp_path / "whole")


@pytest.mark.slow
def test_state_of_another_kind_of_device_goes_on_repeatably(tmp_path, stopped, monkeypatch, caplog):
    of_gpu, real = {"generator": torch.zeros(16, dtype=torch.uint8)}, checkpoint.tensors_of
    monkeypatch.setattr(checkpoint, "tensors_of", lambda *args: real(*args) | of_gpu)
    for out in (Path(shutil.copytree(stopped, tmp_path / "again")), stopped):
        resume(out)
    assert "is from another kind of device" in caplog.text
    assert_same_run(tmp_path / "again", stopped)


# what can be resumed


@pytest.mark.slow
@pytest.mark.parametrize("damage", mostly_nightly(["flipped", "no-manifest", "missing"], "flipped"))
def test_damaged_state_is_set_aside_for_the_one_before(stopped, whole, caplog, damage):
    newest = stopped / "state" / "step-00000006"
    (tensors,) = newest.glob("*.distcp")
    {"flipped": lambda: flip(tensors), "missing": tensors.unlink}.get(
        damage, (newest / "manifest.json").unlink
    )()
    with caplog.at_level(logging.INFO, "tarflowlm"):
        resume(stopped)
    assert (
        "step-00000006 is damaged, set aside as damaged-step-00000006: resuming from step-00000005"
        in caplog.text
    )
    assert_same_run(stopped, whole[1])


@pytest.mark.slow
def test_manifest_names_every_file_of_a_state(stopped):
    newest = newest_state(stopped)
    listed = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))
    assert {*listed, "manifest.json"} == {path.name for path in newest.iterdir()}


class AtOnce(ThreadPoolExecutor):
    """Writes checkpoints when it is told to."""

    def submit(self, work, *args):
        done = Future()
        try:
            done.set_result(work(*args))
        except OSError as error:
            done.set_exception(error)
        return done


@pytest.mark.slow
def test_failed_checkpoint_ends_the_run_at_the_next_line_of_the_log(
    tmp_path, corpus_file, monkeypatch
):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(checkpoint, "save_shards", full)
    monkeypatch.setattr(writer, "ThreadPoolExecutor", AtOnce)
    config = tiny_run(
        corpus_file, mode="joint", stage_steps=(9,), checkpoint_every=4, evaluate_every=9
    )
    with pytest.raises(UserError, match="make room and start it again"):
        go(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4, 5]
    # weights without their state would leave a run that nothing continues
    monkeypatch.undo()
    assert go(config, tmp_path / "run")["steps"] == 9


@pytest.mark.slow
def test_run_without_an_undamaged_state_is_left_alone(stopped):
    for path in (stopped / "state").iterdir():
        flip(path / "counters.json")
    before = sorted(stopped.rglob("*"))
    with pytest.raises(UserError, match="all of step-00000005, step-00000006 are damaged"):
        resume(stopped)
    assert sorted(stopped.rglob("*")) == before


def with_counters(out: Path, part: str, change: Callable[[dict], object]) -> None:
    """Change what the newest state counts, as another version would have written it."""
    folder = newest_state(out)
    saved = json.loads((folder / "counters.json").read_text(encoding="utf-8"))
    change(saved[part])
    (folder / "counters.json").write_text(json.dumps(saved), encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    write_manifest(folder, set(manifest))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["counters", "window"])
def test_a_state_with_a_count_that_this_version_does_not_know_is_refused(stopped, part):
    with_counters(stopped, part, lambda counts: counts.update(elapsed=1.0))
    match = rf"counters.json: {part}.elapsed .*version of tarflowlm that wrote it"
    with pytest.raises(UserError, match=match):
        resume(stopped)


@pytest.mark.slow
def test_a_count_that_a_state_lacks_has_its_default(stopped, whole):
    # no stage has left this run
    with_counters(stopped, "counters", lambda counts: counts.pop("idle"))
    resume(stopped)
    assert_same_run(stopped, whole[1])


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "word"), [(flip, "damaged"), (Path.unlink, "missing")])
def test_damaged_weights_are_restored_from_the_state(finished, whole, damage, word):
    damage(finished / "model.safetensors")
    match = rf"is {word}.*`tarflowlm train --resume .*` restores it"
    with pytest.raises(UserError, match=match):
        load_checkpoint(finished)
    cut(None, finished, 1)
    assert not (finished / "summary.json").exists()
    resume(finished)
    assert_same_run(finished, whole[1])


@pytest.mark.slow
def test_state_of_another_run_is_refused(tmp_path, stopped, corpus_file):
    cut(
        tiny_run(corpus_file, stage_steps=(3, 2, 3), model={"latent_dim": 4}),
        tmp_path / "other",
        19,
    )
    shutil.rmtree(stopped / "state")
    shutil.copytree(tmp_path / "other" / "state", stopped / "state")
    with pytest.raises(UserError, match="does not fit this run"):
        resume(stopped)


@pytest.mark.slow
def test_changed_text_is_refused(tmp_path, whole, corpus_file):
    text = Path(shutil.copy(corpus_file, tmp_path / "mine.txt"))
    config = replace(whole[0], data=replace(whole[0].data, source=str(text)))
    cut(config, tmp_path / "run", 12)
    # as long as before
    text.write_text(text.read_text(encoding="utf-8").replace("cat", "cow"), encoding="utf-8")
    with pytest.raises(UserError, match="is not the text that"):
        resume(tmp_path / "run")


# directories


@pytest.mark.slow
def test_two_writers_exclude_each_other(tmp_path, corpus_file):
    out, config, refused = tmp_path / "run", tiny_run(corpus_file), []

    def second() -> None:
        for again in (lambda: resume(out), lambda: go(config, out)):
            with pytest.raises(UserError) as raised:
                again()
            refused.append(str(raised.value))

    go(config, out, Killer(9, second))
    assert all("is being written by" in message for message in refused)


@pytest.mark.parametrize("at", [3, 13])
def test_run_that_is_moved_away_ends_and_resumes_elsewhere(tmp_path, whole, monkeypatch, at):
    """Before its first state, or after one; the folder is not made again."""
    monkeypatch.setattr(writer, "ThreadPoolExecutor", AtOnce)
    out, moved = tmp_path / "run", tmp_path / "moved"
    with pytest.raises(UserError, match=f"{out} was moved or removed .*--resume"):
        go(whole[0], out, Killer(at, lambda: out.rename(moved)))
    assert not out.exists()
    assert bool(names(moved)) == (at > 3)
    go(whole[0], moved)
    assert_same_run(moved, whole[1])


@pytest.mark.parametrize("name", ["mine.txt", "config.json"])
def test_foreign_directory_is_left_alone(tmp_path, name, corpus_file):
    (tmp_path / name).write_text("{}", encoding="utf-8")
    for out in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match="exists already"):
            go(tiny_run(corpus_file), out)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.slow
def test_run_killed_while_it_wrote_its_first_state_begins_again(tmp_path, whole):
    config, never_stopped, _ = whole
    out = tmp_path / "run"
    cut(config, out, 3)
    assert (out / "best").exists()
    assert not names(out)
    (out / "state" / ".step-00000002").mkdir(parents=True)
    go(config, out)
    assert_same_run(out, never_stopped)
