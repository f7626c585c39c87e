"""Faults, one by one: what is printed, and what survives. docs/reliability.md has a row for every test."""

import contextlib
import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tarflowlm.training.lifecycle import resume

from tarflowlm.cli import main as cli
from tarflowlm.data import TokenizerConfig, prepare_corpus
from tarflowlm.errors import UserError
from tarflowlm.runs import checkpoint, weights
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.training import lifecycle
from tarflowlm.training import run as training_run
from tarflowlm.training.metrics import MetricsLog, Reporter

CPU = torch.device("cpu")


class Stop(BaseException):
    pass


class Listener(Reporter):
    """Keeps what is told, does `action` at step `at`, and stops a run at step `stop`."""

    def __init__(self, at: int = 0, action=None, stop: int = 0) -> None:
        self.at, self.action, self.stop, self.steps, self.notices = at, action, stop, 0, []

    def step(self, num_tokens, share=None):
        self.steps += 1
        if self.steps == self.at:
            self.action()
        if self.steps == self.stop:
            raise Stop

    def notice(self, text):
        self.notices.append(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_run, go):
    """A finished run."""
    out, run = tmp_path_factory.mktemp("whole") / "run", tiny_run(log_every=3, stage_steps=(3, 2, 3))
    go(run, out)
    return run, out


@pytest.fixture
def finished(tmp_path, whole) -> Path:
    """A copy of it to be damaged."""
    return Path(shutil.copytree(whole[1], tmp_path / "finished"))


@pytest.fixture
def stopped(tmp_path, whole, go) -> Path:
    """The same run, stopped at step 7: it has the states of steps 5 and 6."""
    with pytest.raises(Stop):
        go(whole[0], tmp_path / "stopped", Listener(stop=7))
    return tmp_path / "stopped"


@pytest.fixture
def refused(capsys):
    """refused(*argv): the one line that the command prints before it ends with status 2."""

    def call(*argv: object) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main([*map(str, argv)])
        torch.set_flush_denormal(False)
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (2, "", 1), (out, err)
        return err

    return call


@pytest.fixture
def assert_goes_on(whole, same_weights, read_metrics):
    """assert_goes_on(out): resumed, it ends as the run that nothing happened to. Returns what it told."""

    def check(out: Path) -> list[str]:
        seen = Listener()
        resume(out, device=CPU, reporter=seen)
        for ours, theirs in ((out, whole[1]), (out / "best", whole[1] / "best")):
            load_checkpoint(ours)
            assert same_weights(ours, theirs)
        assert read_metrics(out) == read_metrics(whole[1])
        return seen.notices

    return check


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path, where: int = -7) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_damaged_weights_are_named_and_written_again_from_the_state(finished, refused, assert_goes_on, damage):
    damage(finished / "model.safetensors")
    line = refused("eval", finished)
    assert f"{finished / 'model.safetensors'} is damaged ({'truncated' if damage is truncate else 'altered'}" in line
    assert f"`tarflowlm train --resume {finished}` restores it from state/step-00000008" in line
    assert f"{finished / 'best'} is undamaged" in line
    load_checkpoint(finished / "best")
    notices = assert_goes_on(finished)
    assert any("restored from step-00000008" in text for text in notices)
    # and now it is a finished run as before
    with pytest.raises(UserError, match="is finished"):
        resume(finished, device=CPU)


def test_damaged_weights_of_a_stopped_run_too(stopped, refused, assert_goes_on):
    flip(stopped / "model.safetensors")
    assert "restores it from state/step-00000006" in refused("sample", stopped)
    assert_goes_on(stopped)


def test_a_flip_anywhere_is_found(finished):
    path = finished / "model.safetensors"
    before = path.read_bytes()
    for where in (0, 9, 200, len(before) // 2, len(before) - 1):
        flip(path, where)
        with pytest.raises(UserError, match=r"model\.safetensors is damaged \(altered"):
            load_checkpoint(finished)
        path.write_bytes(before)
    load_checkpoint(finished)


def test_damaged_best_weights_are_named_and_the_newest_offered(finished, refused):
    flip(finished / "best" / "model.safetensors")
    line = refused("eval", finished / "best")
    assert f"{finished / 'best' / 'model.safetensors'} is damaged" in line
    assert f"{finished} is undamaged" in line
    # with nothing whole around, nothing is offered
    shutil.rmtree(finished / "state")
    flip(finished / "model.safetensors")
    assert refused("eval", finished).endswith("restore it or train again\n")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_an_altered_config_or_tokenizer_is_named_and_can_be_accepted(finished, refused, name):
    path = finished / name
    path.write_text(path.read_text(encoding="utf-8") + " \n", encoding="utf-8")
    line = refused("eval", finished)
    assert f"{path} is damaged (altered" in line
    assert f"{finished / 'best'} is undamaged" in line
    assert f"`tarflowlm seal {finished}` accepts it if you changed it yourself" in line
    cli.main(["seal", str(finished)])
    torch.set_flush_denormal(False)
    load_checkpoint(finished)


def test_a_missing_manifest_is_named_and_can_be_made_anew(finished, refused):
    (finished / "manifest.json").unlink()
    for line in (refused("eval", finished), refused("train", "--resume", finished)):
        assert f"{finished / 'manifest.json'} is missing" in line
        assert f"`tarflowlm seal {finished}`" in line
    cli.main(["seal", str(finished)])
    torch.set_flush_denormal(False)
    load_checkpoint(finished)


def test_what_does_not_load_is_not_accepted(finished, refused):
    truncate(finished / "model.safetensors")
    before = (finished / "manifest.json").read_bytes()
    assert "model.safetensors is damaged" in refused("seal", finished)
    assert (finished / "manifest.json").read_bytes() == before
    assert "is not a directory" in refused("seal", finished / "nothing")


def test_directories_from_before_there_were_manifests_load(finished, monkeypatch):
    model = load_checkpoint(finished).model
    monkeypatch.setattr(weights, "LISTED", {})
    checkpoint.save_weights(finished, model.state_dict(), {"blocks": "3"})
    (finished / "manifest.json").unlink()
    load_checkpoint(finished)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no-manifest", "missing"])
def test_a_damaged_state_is_set_aside_for_the_one_before(stopped, assert_goes_on, damage):
    state = stopped / "state" / "step-00000006"
    (tensors,) = state.glob("*.distcp")
    actions = {"truncated": lambda: truncate(tensors), "flipped": lambda: flip(tensors), "missing": tensors.unlink}
    actions.get(damage, (state / "manifest.json").unlink)()
    notices = assert_goes_on(stopped)
    message = f"{state} is damaged, set aside as damaged-step-00000006: resuming from step-00000005"
    assert message in notices
    names = sorted(path.name for path in (stopped / "state").iterdir())
    assert names == ["damaged-step-00000006", "step-00000006", "step-00000008"]


def test_without_a_whole_state_nothing_is_touched(stopped, refused):
    for state in (stopped / "state").iterdir():
        flip(state / "counters.json")
    before = sorted((stopped / "state").rglob("*"))
    assert "all of step-00000005, step-00000006 are damaged" in refused("train", "--resume", stopped)
    assert sorted((stopped / "state").rglob("*")) == before
    load_checkpoint(stopped)


def test_a_state_of_another_run_is_refused(stopped, tmp_path, tiny_run, go):
    with pytest.raises(Stop):
        go(tiny_run(stage_steps=(3, 2, 3), model={"latent_dim": 4}), tmp_path / "other", Listener(stop=7))
    shutil.rmtree(stopped / "state")
    shutil.copytree(tmp_path / "other" / "state", stopped / "state")
    log = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"does not fit this run \(.*Size mismatch.*codebook\.mean") as raised:
        resume(stopped, device=CPU)
    assert "\n" not in str(raised.value)
    assert (stopped / "metrics.jsonl").read_bytes() == log


# a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_an_export_to_a_full_disk_is_one_line_and_leaves_nothing(small_disk, finished, refused):
    with (small_disk / "filler").open("wb") as filler:
        filler.write(bytes(4 * 2**20 - 20_000))
    line = refused("export", finished, "--out", small_disk / "out")
    assert f"cannot write to {small_disk / 'out'} ({os.strerror(errno.ENOSPC)})" in line
    assert not (small_disk / "out").exists()


def assert_says_what_survives(message: str, out: Path, reason: str) -> None:
    assert "\n" not in message
    assert f"cannot write to {out} ({reason}): what was saved before is kept" in message
    assert f"`tarflowlm train --resume {out}`" in message


@pytest.mark.parametrize("room", [0, 30, 90], ids=lambda kilobytes: f"{kilobytes}k")
def test_a_full_disk_is_one_line_and_loses_nothing(small_disk, whole, go, assert_goes_on, room):
    out, filler = small_disk / "run", small_disk / "filler"

    def fill():
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1024))
        os.truncate(filler, max(0, filler.stat().st_size - room * 1024))

    with pytest.raises(UserError) as raised:
        go(whole[0], out, Listener(at=4, action=fill))
    assert_says_what_survives(str(raised.value), out, os.strerror(errno.ENOSPC))
    load_checkpoint(out)
    filler.unlink()
    assert_goes_on(out)


def limited(run, out, kilobytes, result) -> None:
    """In a process of its own: a run that may write no file of more than so many kilobytes from step 4 on."""
    torch.set_num_threads(1)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, resource.RLIM_INFINITY))

    try:
        train_it(run, out, Listener(at=4, action=limit))
    except UserError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        result.put(str(error))


def train_it(run, out, reporter) -> None:
    from tarflowlm.training.lifecycle import train

    train(run, out, device=CPU, reporter=reporter)


@pytest.mark.parametrize("kilobytes", [0, 20])
def test_a_file_too_large_is_one_line_and_loses_nothing(tmp_path, whole, go, assert_goes_on, kilobytes):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tarflowlm.training.lifecycle"])
    result, out, run = context.SimpleQueue(), tmp_path / "run", whole[0]
    run = replace(run, train=replace(run.train, test_windows=3))
    process = context.Process(target=limited, args=(run, out, kilobytes, result))
    process.start()
    process.join()
    assert not result.empty()
    assert_says_what_survives(result.get(), out, os.strerror(errno.EFBIG))
    load_checkpoint(out)
    assert_goes_on(out)


# data


@pytest.fixture
def corpus(tmp_path, corpus_file) -> Path:
    """The text in several shards."""
    prepare_corpus(str(corpus_file), TokenizerConfig(), tmp_path / "corpus", shard_tokens=1000)
    return tmp_path / "corpus"


def test_a_shard_removed_while_training_is_missed_by_the_next_start_alone(
    tmp_path, whole, go, corpus, refused, assert_goes_on
):
    shard = corpus / "train-00001.bin"
    shard.rename(tmp_path / "kept.bin")
    shutil.copy(tmp_path / "kept.bin", shard)
    run = replace(whole[0], data=replace(whole[0].data, source=str(corpus)))
    out = tmp_path / "run"
    with pytest.raises(Stop):
        go(run, out, Listener(at=2, action=shard.unlink, stop=7))
    assert load_checkpoint(out).info["step"] == "6"
    assert f"{shard} is missing: prepare the corpus again" in refused("train", "--resume", out)
    shutil.copy(tmp_path / "kept.bin", shard)
    assert_goes_on(out)


def truncated_while_training(run, out, shard, cache) -> None:
    os.environ["TARFLOWLM_CACHE"] = cache
    torch.set_num_threads(1)
    train_it(run, out, Listener(at=4, action=lambda: os.truncate(shard, 0)))


def test_a_shard_cut_off_while_training_ends_the_process_and_not_the_run(
    tmp_path, whole, go, corpus, refused, assert_goes_on
):
    shard = corpus / "train-00001.bin"
    shutil.copy(shard, tmp_path / "kept.bin")
    run = replace(whole[0], data=replace(whole[0].data, source=str(corpus)))
    run = replace(run, train=replace(run.train, test_windows=3, batch_size=64))
    out, context = tmp_path / "run", multiprocessing.get_context("forkserver")
    process = context.Process(target=truncated_while_training, args=(run, out, shard, os.environ["TARFLOWLM_CACHE"]))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGBUS
    load_checkpoint(out)
    assert f"{shard} has 0 bytes where 1000 belong" in refused("train", "--resume", out)
    shutil.copy(tmp_path / "kept.bin", shard)
    assert resume(out, device=CPU)["steps"] == 8


def test_a_text_that_changed_is_not_trained_on(tmp_path, whole, go, corpus_file):
    text = tmp_path / "mine.txt"
    shutil.copy(corpus_file, text)
    run = replace(whole[0], data=replace(whole[0].data, source=str(text)))
    with pytest.raises(Stop):
        go(run, tmp_path / "run", Listener(stop=7))
    # as long as before
    text.write_text(text.read_text(encoding="utf-8").replace("cat", "cow"), encoding="utf-8")
    with pytest.raises(UserError, match="is not the text that"):
        resume(tmp_path / "run", device=CPU)


def test_a_log_that_lost_lines_ends_whole(stopped, whole, read_metrics):
    """As after a power failure that took what was not yet on disk."""
    path = stopped / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:150])
    resume(stopped, device=CPU)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines
    assert read_metrics(stopped)[-1] == read_metrics(whole[1])[-1]


def test_a_log_that_cannot_be_written_is_one_line(tmp_path, whole, go, monkeypatch, assert_goes_on):
    def full(self, record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        listener = Listener(at=4, action=lambda: patch.setattr(MetricsLog, "write", full))
        with pytest.raises(UserError) as raised:
            go(whole[0], tmp_path / "run", listener)
    assert_says_what_survives(str(raised.value), tmp_path / "run", os.strerror(errno.ENOSPC))
    assert_goes_on(tmp_path / "run")


@pytest.mark.parametrize("begun", [False, True])
def test_a_disk_that_is_full_from_the_start_is_no_dead_end(tmp_path, whole, go, monkeypatch, assert_goes_on, begun):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        module, name = (training_run, "save_weights") if begun else (lifecycle, "write_run")
        patch.setattr(module, name, full)
        with pytest.raises(UserError) as raised:
            go(whole[0], out)
    remedy = f"continue with `tarflowlm train --resume {out}`" if begun else "start it again"
    assert os.strerror(errno.ENOSPC) in str(raised.value)
    assert str(raised.value).endswith(f"make room and {remedy}")
    if begun:
        assert_goes_on(out)
    else:
        assert go(whole[0], out)["steps"] == 8


def test_every_row_of_the_table_names_tests_that_are_there():
    root = Path(__file__).parents[2]
    tests = {path.name: path for path in (root / "tests").rglob("test_*.py")}
    table = (root / "docs" / "reliability.md").read_text(encoding="utf-8").split("## Faults")[1]
    rows = [row for row in table.splitlines() if row.startswith("| ")][2:]
    assert len(rows) > 15
    for row in rows:
        cell = row.split(" | ")[-1]
        names = re.findall(r"`(test_\w+)`", cell)
        file = re.search(r"`(test_\w+\.py)`", cell)
        source = tests[file[1] if file else Path(__file__).name].read_text(encoding="utf-8")
        assert names, row
        assert all(f"def {name}(" in source for name in names), row
