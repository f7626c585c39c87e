"""Starts of a Mix-1 stack that the lottery compares."""

from dataclasses import replace

import pytest
import torch

from reproduction import lottery
from reproduction.settings import Settings
from tarflowlm.flow.channelwise import Mix1Coupling
from tarflowlm.flow.heads import HeadShape
from tarflowlm.model import seeded


@pytest.fixture
def plan():
    return {training.label: training.run for training in lottery.plan_lottery(Settings())}


def test_only_the_starts_differ(plan):
    shipped, *others = plan.values()
    for run in others:
        assert (run.optim, run.train, run.data) == (shipped.optim, shipped.train, shipped.data)
        sizes = [(block.layers, block.components) for block in run.model.blocks]
        assert sizes == [(block.layers, block.components) for block in shipped.model.blocks]
    with seeded(0):
        model = replace(plan[lottery.LAST_STARTS].model, vocab_size=27).build()
        heads = [block.coupling.head for block in model.prior.blocks]
    # identities do not read the features
    assert [bool(head.weights[0].any()) for head in heads] == [False, False, True]


def test_features_of_a_waiting_block_grow(monkeypatch):
    monkeypatch.setattr(lottery, "STEPS", 2)
    shape = HeadShape(width=4, hidden=3, features=2, noise=1.0)
    with seeded(0):
        waiting = lottery.WaitingMix1(channels=2, components=3, head=shape)
    with seeded(0):
        plain = Mix1Coupling(channels=2, components=3, head=shape)
        z, features = torch.randn(1, 5, 2), torch.randn(1, 5, 4)
    for share in (0.5, 1.0, 1.0):
        torch.testing.assert_close(waiting(z, features), plain(z, share * features))
    # outside training it does not grow, and a checkpoint keeps where it is
    waiting.eval()
    waiting(z, features)
    assert waiting.state_dict()["steps"] == 3
