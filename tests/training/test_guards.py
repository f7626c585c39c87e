"""A step whose loss or gradient is not finite ends the run, and the last checkpoint stays."""

import copy
import itertools
import math

import pytest
import torch
from training_cases import assert_same_run, go, read_metrics, resume, tiny_baseline, tiny_run

from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.training import optim, pace
from tarflowlm.training import train as training

JOINT = {"mode": "joint", "stage_steps": (20,), "evaluate_every": 100}


@pytest.fixture
def poisoned(monkeypatch):
    """poisoned(steps, value): at these steps (from 1) the gradient of block 1's start vector has
    one element of that value. Returns the weights and optimisers before every step.
    """

    def apply(steps, value):
        calls, before = itertools.count(1), []
        accumulate, take_step = training.accumulate_gradients, optim.take_step

        def accumulated(model, *args):
            loss = accumulate(model, *args)
            if next(calls) in steps:
                model.prior.blocks[0].start.grad[0] = value
            return loss

        def stepped(optimizers, parameters, *args, **options):
            take_step(optimizers, parameters, *args, **options)
            before.append(copy.deepcopy({n: p.detach() for n, p in parameters.items()}))

        monkeypatch.setattr(training, "accumulate_gradients", accumulated)
        monkeypatch.setattr(optim, "take_step", stepped)
        return before

    return apply


@pytest.mark.parametrize(
    ("optimizer", "value"),
    [pytest.param("muon", math.nan, marks=pytest.mark.slow), ("adamw", math.inf)],
)
def test_gradient_that_is_not_finite_ends_the_run_before_any_weight_changes(
    tmp_path, corpus_file, poisoned, optimizer, value
):
    taken = poisoned({4}, value)
    run = tiny_run(corpus_file, **JOINT, optim={"optimizer": optimizer}, checkpoint_every=2)
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"step 4: .*: prior\.blocks\.0\.start; lower"):
        go(run, out)
    assert len(taken) == 3
    assert all(torch.isfinite(p).all() for p in taken[-1].values())
    assert load_checkpoint(out).info["step"] == "2"
    assert [path.name for path in (out / "state").iterdir()] == ["step-00000002"]


@pytest.mark.slow
def test_nothing_is_saved_after_a_step_that_is_not_finite(
    tmp_path, corpus_file, poisoned, monkeypatch
):
    """Where the host reads the numbers of several steps at once, as with a GPU."""
    monkeypatch.setitem(pace.STEPS_BETWEEN_READS, "cpu", 4)
    poisoned({6}, math.nan)
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"step 6: .*: prior\.blocks\.0\.start"):
        go(tiny_run(corpus_file, **JOINT, checkpoint_every=5), out)
    assert load_checkpoint(out).info["step"] == "5"
    assert [path.name for path in (out / "state").iterdir()] == ["step-00000005"]


@pytest.mark.slow
def test_run_that_ended_resumes_from_its_last_checkpoint(tmp_path, corpus_file, poisoned):
    run = tiny_run(corpus_file, **JOINT | {"stage_steps": (8,)}, checkpoint_every=4)
    go(run, tmp_path / "whole")
    poisoned({6}, math.nan)
    with pytest.raises(FloatingPointError):
        go(run, tmp_path / "run")
    resume(tmp_path / "run")  # the seventh call is the step after the checkpoint
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_reading_seldom_changes_nothing(tmp_path, corpus_file, monkeypatch):
    run = tiny_run(corpus_file, log_every=3, stage_steps=(9, 4, 4))
    go(run, tmp_path / "often")
    monkeypatch.setitem(pace.STEPS_BETWEEN_READS, "cpu", 4)
    go(run, tmp_path / "seldom")
    assert read_metrics(tmp_path / "often") == read_metrics(tmp_path / "seldom")
    assert_same_run(tmp_path / "often", tmp_path / "seldom")


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_never_saved(tmp_path, corpus_file, monkeypatch):
    calls, take_step = itertools.count(1), optim.take_step

    def overflowing(optimizers, parameters, *args, **options):
        take_step(optimizers, parameters, *args, **options)
        if next(calls) == 4:
            parameters["codebook.mean"].data[0, 0] = math.inf

    monkeypatch.setattr(optim, "take_step", overflowing)
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"codebook\.mean are not finite at step 4"):
        go(tiny_run(corpus_file, **JOINT, checkpoint_every=2), out)
    assert load_checkpoint(out).info["step"] == "2"
    assert [path.name for path in (out / "state").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    ("mode", "stage", "name"),
    [
        ("progressive", 1, "prior.blocks.1.coupling.head.weights.1"),
        ("joint", 0, "prior.blocks.0.start"),
        ("baseline", 0, "head.bias"),
    ],
)
def test_loss_that_is_not_finite_ends_the_run_and_names_the_culprit(
    tmp_path, corpus_file, monkeypatch, mode, stage, name
):
    train_stage = training.train_stage

    def begun_with_nan(run):
        if run.counters.stage == stage:
            dict(run.model.named_parameters())[name].data.fill_(math.nan)
        return train_stage(run)

    monkeypatch.setattr(training, "train_stage", begun_with_nan)
    seldom = {"checkpoint_every": 100, "evaluate_every": 100}
    if mode == "baseline":
        run = tiny_baseline(corpus_file, **seldom)
    else:
        steps = (1, 4, 2) if mode == "progressive" else (4,)
        run = tiny_run(corpus_file, mode=mode, stage_steps=steps, **seldom)
    with pytest.raises(FloatingPointError, match=f"1 parameters are not finite: {name}; lower"):
        go(run, tmp_path / "run")


@pytest.mark.slow
def test_command_line_says_so_in_its_last_line(tmp_path, corpus_file, poisoned, run):
    poisoned({2}, math.nan)
    words = ["train", "mini-mix1", "--out", tmp_path / "run", "--data", corpus_file, "--steps", 3]
    words += ["--model.context", 16, "--model.trunk.width", 16, "--train.batch-size", 2]
    done = run(*words)
    last = done.err.splitlines()[-1]
    assert done.status == 2
    assert "Traceback" not in done.err
    assert all(name in last for name in ("step 2", "prior.blocks.0.start", "optim.lr"))
