"""Steps that must not be taken change nothing and are recorded."""

import copy
import functools
import itertools
import logging
import math
from dataclasses import replace

import pytest
import torch

from helpers import metrics_of
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.training import loop
from tarflowlm.training import train as training
from tarflowlm.training.loop import optimizer_step
from tarflowlm.training.optim import build_optimizers, not_finite
from tarflowlm.training.parallel import ParallelModel

INF, NAN = math.inf, math.nan
JOINT = {"mode": "joint", "evaluate_every": 100, "checkpoint_every": 100}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("value", [NAN, INF])
def test_skipped_step_changes_neither_parameters_nor_optimisers(
    tiny_run, optimizer, deferred, value
):
    run = tiny_run(optim={"optimizer": optimizer}, mode="joint", stage_steps=(3,))
    model = replace(run.model, vocab_size=27).build()
    parallel_model, optimizers = ParallelModel(model, run), build_optimizers(run.optim, model)
    tokens, start = torch.arange(32).view(2, 16) % 27, model.prior.blocks[1].start

    def step():
        generator = torch.Generator()
        return optimizer_step(
            parallel_model, optimizers, tokens, generator=generator, deferred=deferred
        )

    def tensors():
        states = [
            value for o in optimizers for state in o.state.values() for value in state.values()
        ]
        return copy.deepcopy(
            [*model.state_dict().values(), *(torch.as_tensor(value) for value in states)]
        )

    assert not step().skipped
    before = tensors()
    hook = start.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), value))
    result = step()
    hook.remove()
    assert result.skipped
    assert math.isfinite(result.loss.item())
    assert not math.isfinite(result.norm.item())
    assert not_finite(result.names, result.norms) == ["prior.blocks.1.start"]
    assert all(torch.equal(a, b) for a, b in zip(tensors(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    # and nothing of it is left in the next step
    assert not step().skipped
    assert not all(torch.equal(a, b) for a, b in zip(tensors(), before, strict=True))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.fixture
def instead(monkeypatch):
    """instead(steps, act): at these calls (from 1) the result of a step is that of act(model,
    take_step).
    """

    def apply(steps, act):
        calls, real = itertools.count(1), loop.optimizer_step

        def watched(model, *args, **options):
            take_step = functools.partial(real, model, *args, **options)
            return act(model.model, take_step) if next(calls) in steps else take_step()

        monkeypatch.setattr(loop, "optimizer_step", watched)

    return apply


def poisoned(model, take_step):
    """The gradient of block 1's start vector is NaN in one element."""
    start = model.prior.blocks[0].start
    hook = start.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), NAN))
    result = take_step()
    hook.remove()
    return result


def lines(out, split):
    return [record for record in metrics_of(out) if record["split"] == split]


@pytest.mark.slow
def test_skipped_steps_are_recorded_with_their_cause(tmp_path, tiny_run, go, instead, caplog):
    instead({2, 4, 5}, poisoned)
    run = tiny_run(**JOINT, stage_steps=(8,), max_skipped=2, log_every=2)
    with caplog.at_level(logging.WARNING, "tarflowlm"):
        assert go(run, tmp_path / "run")["steps"] == 8
    skipped = lines(tmp_path / "run", "skipped")
    assert [record["step"] for record in skipped] == [2, 4, 5]
    assert skipped[0].keys() == {
        "split",
        "step",
        "tokens",
        "block",
        "nats_per_token",
        "parameters",
        "gradients",
        "num_gradients",
    }
    assert skipped[0]["gradients"] == ["prior.blocks.0.start"]
    assert (skipped[0]["parameters"], skipped[0]["num_gradients"]) == ([], 1)
    notices = [record.getMessage() for record in caplog.records if record.name == "tarflowlm"]
    assert "step 2: parameters all finite; gradients prior.blocks.0.start" in notices[0]
    # the averages are over the steps that were taken
    assert [record["step"] for record in lines(tmp_path / "run", "train")] == [2, 4, 6, 8]
    assert all(
        math.isfinite(record["grad_norm_max"]) for record in lines(tmp_path / "run", "train")
    )


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 4])  # steps between readings; with a GPU 16
def test_too_many_skipped_steps_stop_the_run_and_keep_the_last_checkpoint(
    tmp_path, tiny_run, go, instead, monkeypatch, every
):
    monkeypatch.setitem(loop.STEPS_BETWEEN_READS, "cpu", every)
    instead({5, 6, 7}, poisoned)
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"step 7: .* 3 in a row: lower optim\.lr"):
        go(tiny_run(mode="joint", stage_steps=(20,), max_skipped=2, checkpoint_every=4), out)
    assert load_checkpoint(out).info["step"] == "4"
    assert [path.name for path in (out / "state").iterdir()] == ["step-00000004"]
    assert [record["step"] for record in lines(out, "skipped")] == [5, 6, 7]


@pytest.mark.slow
def test_reading_seldom_changes_nothing(tmp_path, tiny_run, go, read_metrics, monkeypatch):
    run = tiny_run(log_every=3, stage_steps=(9, 4, 4))
    go(run, tmp_path / "often")
    monkeypatch.setitem(loop.STEPS_BETWEEN_READS, "cpu", 4)
    go(run, tmp_path / "seldom")
    often, seldom = read_metrics(tmp_path / "often"), read_metrics(tmp_path / "seldom")
    assert [line["step"] for line in often] == [line["step"] for line in seldom]
    for ours, theirs in zip(often, seldom, strict=True):
        assert ours["nats_per_token"] == pytest.approx(theirs["nats_per_token"], rel=1e-5)


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, tiny_run, go, instead):
    def overflows(model, take_step):
        result = take_step()
        model.codebook.mean.data[0, 0] = INF
        return result

    instead({4}, overflows)
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"codebook\.mean are not finite at step 4"):
        go(tiny_run(mode="joint", stage_steps=(20,), checkpoint_every=2), out)
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
def test_loss_that_is_not_finite_stops_the_run_and_names_the_culprit(
    tmp_path, tiny_run, tiny_baseline, go, monkeypatch, mode, stage, name
):
    train_stage = training.train_stage

    def poisoned(run):
        if run.counters.stage == stage:
            dict(run.model.named_parameters())[name].data.fill_(NAN)
        return train_stage(run)

    monkeypatch.setattr(training, "train_stage", poisoned)
    run = (
        tiny_baseline()
        if mode == "baseline"
        else tiny_run(mode=mode, stage_steps=(4,) if stage == 0 else (1, 4, 2))
    )
    run = replace(run, train=replace(run.train, checkpoint_every=100, evaluate_every=100))
    with pytest.raises(FloatingPointError) as raised:
        go(run, tmp_path / "run")
    assert f"parameters {name}; " in str(raised.value)
