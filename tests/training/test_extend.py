"""A run that is made longer goes on as if it had been asked for that length."""

import pytest
from training_cases import assert_same_run, go, read_metrics, resume, same_weights, tiny_run

import tarflowlm
from tarflowlm.errors import UserError
from tarflowlm.runs.checkpoint import read_run, read_summary
from tarflowlm.training.extend import extend

LENGTH = {"mode": "joint", "keep": "last", "evaluate_every": 100, "checkpoint_every": 100}


def states(out):
    return sorted(path.name for path in (out / "state").iterdir())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus_file):
    """A run of 10 steps that is made one of 16, and a run of 16."""
    folder = tmp_path_factory.mktemp("extended")
    short, long = folder / "short", folder / "long"
    go(tiny_run(corpus_file, stage_steps=(10,), **LENGTH), short)
    go(tiny_run(corpus_file, stage_steps=(16,), **LENGTH), long)
    # the last step with the full rate, whatever the steps between checkpoints
    assert states(short) == ["step-00000006", "step-00000010"]
    extend(short, steps=16)
    return short, long


@pytest.mark.slow
def test_a_longer_run_has_the_weights_of_one_of_that_length(runs):
    short, long = runs
    assert read_summary(short) is None
    assert states(short) == ["step-00000006"]
    resume(short)
    assert same_weights(short, long)
    assert read_metrics(short) == read_metrics(long)
    assert_same_run(short, long)
    assert read_run(short).train == read_run(long).train
    # and once more
    extend(short, steps=20)
    assert resume(short)["steps"] == 20


@pytest.mark.slow
def test_a_longer_run_that_is_stopped_at_once_stays_longer(tmp_path, corpus_file):
    out = tmp_path / "run"
    go(tiny_run(corpus_file, stage_steps=(10,), **LENGTH), out)
    extend(out, steps=12)
    # a kill before anything else is written
    assert tarflowlm.resume(out, steps=13).info["step"] == "13"


@pytest.mark.slow
def test_a_progressive_run_goes_on_in_its_last_stage(tmp_path, corpus_file):
    out = tmp_path / "run"
    go(tiny_run(corpus_file, stage_steps=(3, 2, 5)), out)
    extend(out, steps=14)
    assert resume(out)["steps"] == 14
    assert read_run(out).train.stage_steps == (3, 2, 9)


@pytest.mark.slow
def test_a_finished_run_takes_more_time(tmp_path, corpus_file):
    out = tmp_path / "run"
    done = go(tiny_run(corpus_file, stage_steps=(10,), **LENGTH), out)
    longer = tarflowlm.resume(out, minutes=(done["wall_seconds"] + 2) / 60)
    assert int(longer.info["step"]) > 10


@pytest.mark.slow
def test_what_cannot_be_longer_says_why(tmp_path, corpus_file):
    out = tmp_path / "run"
    go(tiny_run(corpus_file, stage_steps=(10,), **LENGTH), out)
    with pytest.raises(UserError, match=r"steps 9: the run in .* has had 10; give more"):
        extend(out, steps=9)
    with pytest.raises(UserError, match=r"minutes 1e-06: the run in .* has had .*; give more"):
        extend(out, minutes=1e-6)
    with pytest.raises(UserError, match=r"leave one of them out"):
        extend(out, minutes=1, steps=20)
    (out / "state" / "step-00000006").rename(out / "state" / "gone")
    with pytest.raises(UserError, match=r"no checkpoint from before its rate fell: .*--from"):
        extend(out, steps=20)
    assert read_summary(out) is not None


@pytest.mark.slow
def test_the_command_makes_a_run_longer(tmp_path, corpus_file, run_json, refused):
    out = tmp_path / "run"
    go(tiny_run(corpus_file, stage_steps=(10,), **LENGTH), out)
    assert run_json("train", "--resume", out, "--steps", 12)["steps"] == 12
    refused("train", "--resume", out, "--steps", 12, names=["steps 12", "has had 12", "more"])
    refused("train", "--resume", tmp_path / "no", "--steps", 12, names=["no state to resume"])
