"""Dropout thins what layers write while they train, repeatably; nothing else of a run changes."""

from dataclasses import replace

import pytest
import torch
from tarflowlm.training.lifecycle import resume

from tarflowlm.config import TrainConfig
from tarflowlm.errors import UserError
from tarflowlm.flow.transformer import Layer
from tarflowlm.training.parallel import Engine

CPU = torch.device("cpu")


def engine(run, **fields) -> Engine:
    run = replace(run, train=replace(run.train, **fields))
    torch.manual_seed(0)
    model = replace(run.model, vocab_size=27).build().train()
    for p in model.parameters():
        # projections to the residual stream start at zero, where dropout changes nothing
        torch.nn.init.normal_(p, std=0.2)
    return Engine(model, run)


def loss(engine: Engine, seed: int = 0) -> float:
    tokens = torch.arange(32).view(2, 16) % 27
    return float(engine.backward(tokens, torch.Generator().manual_seed(seed)))


def test_it_changes_the_loss_repeatably_and_leaves_global_generators_alone(tiny_run):
    plain, thinned = engine(tiny_run()), engine(tiny_run(), dropout=0.5)
    before = torch.get_rng_state()
    assert loss(thinned) == loss(thinned) != loss(plain)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_are_those_of_the_thinned_loss_with_checkpointed_activations_too(tiny_run):
    gradients = []
    for checkpointed in (False, True):
        made = engine(tiny_run(), dropout=0.3, checkpoint_activations=checkpointed)
        loss(made)
        gradients.append([p.grad for p in made.model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_evaluation_and_frozen_blocks_are_whole(tiny_run):
    thinned, plain = engine(tiny_run(), dropout=0.5), engine(tiny_run())
    tokens, noise = torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 16, 3)
    bounds = [e.model.eval().bound(tokens, noise) for e in (thinned, plain)]
    torch.testing.assert_close(*bounds, rtol=0, atol=0)
    frozen = Engine(plain.model.train(), replace(plain.run, train=replace(plain.run.train, dropout=0.5)), frozen=1)
    shares = [layer.dropout for layer in frozen.model.modules() if isinstance(layer, Layer)]
    assert shares == [0.0, 0.5, 0.5]


def test_a_resumed_run_drops_the_same(tmp_path, tiny_run, go, same_weights):
    run = tiny_run(dropout=0.2)
    go(run, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    go(replace(run, train=replace(run.train, keep_last=9)), stopped)
    (stopped / "summary.json").unlink()
    for state in sorted((stopped / "state").glob("step-*"))[2:]:
        for file in sorted(state.rglob("*"), reverse=True):
            file.unlink()
        state.rmdir()
    resume(stopped, device=CPU)
    assert same_weights(tmp_path / "whole", stopped)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_is_at_least_0_and_below_1(share):
    with pytest.raises(UserError, match=r"train\.dropout"):
        TrainConfig(dropout=share)
