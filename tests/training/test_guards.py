"""Steps that must not be taken leave everything as it was, and are told; losses that jump are recorded."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from tarflowlm.training.step import optimizer_step

from tarflowlm.errors import UserError
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.training import lifecycle, loop
from tarflowlm.training.guards import Guard, RunningLoss, all_finite, gradient_range
from tarflowlm.training.metrics import Reporter
from tarflowlm.training.optim import build_optimizers
from tarflowlm.training.parallel import Engine

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("loss", [1.0, NAN, INF, -INF])
@pytest.mark.parametrize("norm", [1.0, NAN, INF])
def test_a_step_needs_a_finite_loss_and_norm(loss, norm):
    assert all_finite(torch.tensor(loss), torch.tensor(norm)) == (loss == norm == 1.0)


def test_the_range_is_that_of_the_finite_part():
    gradient = torch.tensor([[1.0, NAN], [-2.5, INF]])
    assert gradient_range(gradient) == {"not_finite": 2, "of": 4, "range": [-2.5, 1.0]}
    assert gradient_range(torch.full((3,), NAN)) == {"not_finite": 3, "of": 3, "range": None}


def snapshot(model, optimizers):
    states = [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in optimizers]
    return {name: p.detach().clone() for name, p in model.named_parameters()}, states


def assert_same_states(ours, theirs):
    assert ours.keys() == theirs.keys()
    for index, state in ours.items():
        assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(theirs[index][key])) for key in state)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_skipped_step_changes_neither_parameters_nor_optimisers(tiny_run, optimizer, value):
    run = tiny_run(optim={"optimizer": optimizer}, mode="joint", stage_steps=(3,))
    model = replace(run.model, vocab_size=27).build()
    engine, optimizers = Engine(model, run), build_optimizers(run.optim, model)
    tokens, generator, guard = torch.arange(32).view(2, 16) % 27, torch.Generator(), Guard()

    def step():
        return optimizer_step(engine, optimizers, tokens, generator=generator, guard=guard)

    step()
    assert guard.broken is None
    parameters, states = snapshot(model, optimizers)
    start = model.prior.blocks[1].start
    hook = start.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), value))
    loss, norm = step()
    assert math.isfinite(loss.item())
    assert not math.isfinite(norm.item())
    assert list(guard.broken) == ["prior.blocks.1.start"]
    found = guard.broken["prior.blocks.1.start"]
    assert (found["not_finite"], found["of"]) == (1, 8)
    assert all(map(math.isfinite, found["range"]))
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    for optimizer_, before in zip(optimizers, states, strict=True):
        assert_same_states(optimizer_.state_dict()["state"], before)
    assert all(p.grad is None for p in model.parameters())
    # and nothing of it is left in the next step
    hook.remove()
    step()
    assert guard.broken is None
    assert not torch.equal(start, parameters["prior.blocks.1.start"])
    assert all(torch.isfinite(p).all() for p in model.parameters())


class Notices(Reporter):
    def __init__(self) -> None:
        self.notices = []

    def notice(self, text):
        self.notices.append(text)


@pytest.fixture
def poison(monkeypatch):
    """poison(steps): the gradient of block 1's start vector is NaN in one element at these calls (from 1)."""

    def apply(steps):
        calls, real = [], loop.optimizer_step

        def poisoned(engine, *args, **options):
            calls.append(None)
            if len(calls) not in steps:
                return real(engine, *args, **options)
            start = engine.model.prior.blocks[0].start
            hook = start.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), NAN))
            result = real(engine, *args, **options)
            hook.remove()
            return result

        monkeypatch.setattr(loop, "optimizer_step", poisoned)

    return apply


def lines(out, split):
    records = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [record for record in records if record["split"] == split]


def test_nan_in_a_gradient_is_skipped_recorded_and_told(tmp_path, tiny_run, go, poison):
    poison({2, 4, 5})
    seen = Notices()
    run = tiny_run(mode="joint", stage_steps=(8,), max_skipped=2, log_every=2, evaluate_every=100)
    assert go(run, tmp_path / "run", seen)["steps"] == 8
    skipped = lines(tmp_path / "run", "skipped")
    assert [record["step"] for record in skipped] == [2, 4, 5]
    assert skipped[0].keys() == {
        "split", "step", "tokens", "block", "nats_per_token", "terms", "parameters", "gradients", "num_gradients"
    }  # fmt: skip
    assert skipped[0]["gradients"].keys() == {"prior.blocks.0.start"}
    assert (skipped[0]["terms"], skipped[0]["parameters"], skipped[0]["num_gradients"]) == ([], [], 1)
    told = [text for text in seen.notices if text.startswith("skipped: ")]
    assert len(told) == 3
    assert "step 2: terms all finite; parameters all finite; gradients prior.blocks.0.start (1 of 8, the" in told[0]
    # the averages are those of the steps that were taken
    assert [record["step"] for record in lines(tmp_path / "run", "train")] == [2, 4, 6, 8]
    assert all(math.isfinite(record["grad_norm_max"]) for record in lines(tmp_path / "run", "train"))


@pytest.fixture
def looks_seldom(monkeypatch):
    """The CPU is looked at every fourth step, as an accelerator is every few."""
    monkeypatch.setattr(loop, "steps_between_looks", lambda device: 4)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_deferred_guard_leaves_the_step_to_the_device(tiny_run, optimizer):
    run = tiny_run(optim={"optimizer": optimizer}, mode="joint", stage_steps=(3,))
    model = replace(run.model, vocab_size=27).build()
    engine, optimizers = Engine(model, run), build_optimizers(run.optim, model)
    tokens, guard = torch.arange(32).view(2, 16) % 27, Guard(deferred=True)
    optimizer_step(engine, optimizers, tokens, generator=torch.Generator(), guard=guard)
    assert guard.found_inf == 0
    parameters, states = snapshot(model, optimizers)
    hook = model.prior.blocks[1].start.register_hook(lambda gradient: gradient * NAN)
    optimizer_step(engine, optimizers, tokens, generator=torch.Generator(), guard=guard)
    hook.remove()
    assert guard.found_inf == 1
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    for optimizer_, before in zip(optimizers, states, strict=True):
        assert_same_states(optimizer_.state_dict()["state"], before)
    optimizer_step(engine, optimizers, tokens, generator=torch.Generator(), guard=guard)
    assert not torch.equal(model.prior.blocks[1].start, parameters["prior.blocks.1.start"])
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_step_that_is_looked_at_later_is_still_named(tmp_path, tiny_run, go, poison, looks_seldom):
    poison({2, 6, 7})
    seen = Notices()
    run = tiny_run(mode="joint", stage_steps=(12,), max_skipped=2, log_every=100, evaluate_every=100)
    go(replace(run, train=replace(run.train, checkpoint_every=100)), tmp_path / "run", seen)
    skipped = lines(tmp_path / "run", "skipped")
    assert [record["step"] for record in skipped] == [2, 6, 7]
    # this gradient was only broken by hand: repeated, all is well
    assert all(record["num_gradients"] == 0 for record in skipped)
    told = [text for text in seen.notices if text.startswith("skipped: ")]
    assert ["step 2:" in told[0], "step 6:" in told[1], "step 7:" in told[2]] == [True] * 3


def test_what_recurs_is_named_with_its_parameter(tmp_path, tiny_run, go, monkeypatch, looks_seldom):
    real = Engine.backward

    def breaks(engine, tokens, generator):
        loss = real(engine, tokens, generator)
        if not hasattr(engine, "first"):
            engine.first = tokens
        if torch.equal(tokens, engine.first):
            engine.model.prior.blocks[0].start.grad[3] = NAN
        return loss

    monkeypatch.setattr(Engine, "backward", breaks)
    run = tiny_run(mode="joint", stage_steps=(6,), log_every=100, evaluate_every=100)
    go(run, tmp_path / "run")
    (record,) = lines(tmp_path / "run", "skipped")
    assert record["step"] == 1
    assert record["gradients"]["prior.blocks.0.start"]["not_finite"] == 1


def test_too_many_in_a_row_that_are_looked_at_later_stop_the_run(tmp_path, tiny_run, go, poison, looks_seldom):
    poison(set(range(3, 100)))
    with pytest.raises(FloatingPointError, match=r"step 5: .* 3 in a row"):
        go(tiny_run(mode="joint", stage_steps=(20,), max_skipped=2, checkpoint_every=100), tmp_path / "run")


def test_looking_seldom_changes_nothing(tmp_path, tiny_run, go, read_metrics, monkeypatch):
    run = tiny_run(log_every=3, stage_steps=(9, 4, 4))
    go(run, tmp_path / "often")
    monkeypatch.setattr(loop, "steps_between_looks", lambda device: 4)
    go(run, tmp_path / "seldom")
    often, seldom = read_metrics(tmp_path / "often"), read_metrics(tmp_path / "seldom")
    assert [list(line) for line in often] == [list(line) for line in seldom]
    for ours, theirs in zip(often, seldom, strict=True):
        numbers = {name for name, value in ours.items() if isinstance(value, (int, float))}
        assert {n: ours[n] for n in numbers} == pytest.approx({n: theirs[n] for n in numbers}, rel=1e-5)


def test_too_many_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(tmp_path, tiny_run, go, poison):
    poison({5, 6, 7})
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError) as raised:
        go(tiny_run(mode="joint", stage_steps=(20,), max_skipped=2, checkpoint_every=4), out)
    message = str(raised.value)
    assert "\n" not in message
    assert "prior.blocks.0.start (1 of 8" in message
    assert "3 in a row" in message
    assert load_checkpoint(out).info["step"] == "4"
    assert [path.name for path in (out / "state").iterdir()] == ["step-00000004"]
    assert [record["step"] for record in lines(out, "skipped")] == [5, 6, 7]


def test_skipped_steps_are_counted_over_a_resume(tmp_path, tiny_run, go, poison):
    poison(set(range(5, 100)))
    out = tmp_path / "run"

    class Stop(BaseException):
        pass

    class Stopper(Reporter):
        def step(self, num_tokens, share=None):
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 7:
                raise Stop

    with pytest.raises(Stop):
        go(tiny_run(mode="joint", stage_steps=(20,), max_skipped=3, checkpoint_every=1), out, Stopper())
    # steps 5 and 6 are in the state, and 7 and 8 follow
    with pytest.raises(FloatingPointError, match=r"step 8: .* 4 in a row"):
        lifecycle.resume(out, device=torch.device("cpu"))


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, tiny_run, go, monkeypatch):
    real = loop.optimizer_step

    def overflows(engine, *args, **options):
        result = real(engine, *args, **options)
        if len(steps := [*seen, None]) == 4:
            engine.model.codebook.mean.data[0, 0] = INF
        seen[:] = steps
        return result

    seen = []
    monkeypatch.setattr(loop, "optimizer_step", overflows)
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"codebook\.mean are not finite at step 4"):
        go(tiny_run(mode="joint", stage_steps=(20,), checkpoint_every=2), out)
    assert load_checkpoint(out).info["step"] == "2"


def test_the_running_loss_is_a_mean_and_variance_and_sees_jumps():
    running = RunningLoss()
    values = [2.0 + 0.1 * (-1) ** n for n in range(60)]
    assert all(running.take_in(value) < 2 for value in values)
    assert running.mean == pytest.approx(sum(values) / 60)
    assert running.variance == pytest.approx(0.01, rel=0.05)
    assert running.take_in(3.0) == pytest.approx(10, rel=0.05)
    assert running.take_in(1.0) < 0
    # few values say nothing
    fresh = RunningLoss()
    assert [fresh.take_in(v) for v in (1.0, 1.1, 500.0)] == [0.0, 0.0, 0.0]
    # a lasting change of level stops being one
    assert max([running.take_in(4.0) for _ in range(300)][100:]) < 6


def test_a_spike_is_recorded_with_its_step(tmp_path, tiny_run, go, monkeypatch):
    real, calls = loop.optimizer_step, []

    def jumps(*args, **options):
        loss, norm = real(*args, **options)
        calls.append(None)
        return loss + (50 if len(calls) == 59 else 0), norm

    monkeypatch.setattr(loop, "optimizer_step", jumps)
    run = tiny_run(mode="joint", stage_steps=(64,), log_every=8, evaluate_every=100, checkpoint_every=100)
    go(run, tmp_path / "run")
    (spike,) = lines(tmp_path / "run", "spike")
    assert (spike["step"], spike["block"]) == (59, 1)
    assert spike["nats_per_token"] > 50 > spike["mean"]
    assert spike["sigmas"] > 6


@pytest.mark.parametrize(
    ("field", "value"), [("keep_last", 0), ("max_skipped", -1), ("spike_sigma", 0.0), ("spike_sigma", NAN)]
)
def test_senseless_settings_are_refused_by_name(tiny_run, field, value):
    with pytest.raises(UserError, match=rf"train\.{field} {value}"):
        tiny_run(**{field: value})
