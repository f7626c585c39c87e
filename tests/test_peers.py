"""examples/peers.py: the likelihoods of models of others are likelihoods, and their samples are texts."""

import importlib.util
import itertools
import math
from pathlib import Path

import pytest
import torch

from tarflowlm.baseline import BaselineConfig
from tarflowlm.language_model import seeded
from tarflowlm.shapes import TransformerConfig

pytest.importorskip("transformers")
VOCAB, LENGTH = 3, 4
SHAPE = BaselineConfig(context=LENGTH, trunk=TransformerConfig(width=16, num_heads=2, mlp_ratio=4), layers=1)


@pytest.fixture(scope="module")
def peers():
    path = Path(__file__).parents[1] / "examples" / "peers.py"
    spec = importlib.util.spec_from_file_location("peers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def masked(peers):
    pytest.importorskip("flow_matching", reason="flow-matching is not installed: its licence is CC BY-NC")
    with seeded(0):
        return peers.Masked(SHAPE, VOCAB)


def every_text() -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))


def test_the_probabilities_of_all_texts_sum_to_one(peers):
    with seeded(0):
        gpt2 = peers.Gpt2(SHAPE, VOCAB)
    gpt2.model.eval()
    with torch.no_grad():
        total = gpt2.nats(every_text()).sum(1).neg().exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-5)
    with seeded(1):
        samples = gpt2.sample(20, LENGTH)
    assert samples.shape == (20, LENGTH)
    assert samples.max() < VOCAB


@torch.no_grad()
def test_the_bound_of_the_masked_flow_is_that_of_guessing_in_random_order(masked):
    """Over a linear schedule the expected loss is the mean over orders of the cost of the tokens, one at a time."""
    masked.model.eval()
    text = torch.tensor([[0, 2, 1, 1]])
    orders = list(itertools.permutations(range(LENGTH)))
    exact = 0.0
    for order in orders:
        seen = torch.full_like(text, VOCAB)
        for place in order:
            exact -= masked.logits(seen)[0, place].log_softmax(-1)[text[0, place]].item() / len(orders)
            seen[0, place] = text[0, place]
    with seeded(0):
        nats = masked.nats(text.expand(20_000, -1), 2).sum(1)
    assert nats.mean().item() == pytest.approx(exact, abs=4 * nats.std().item() / math.sqrt(len(nats)))


def test_the_masked_flow_writes_no_masks(masked):
    masked.model.eval()
    masked.steps = 8
    with seeded(1):
        samples = masked.sample(20, LENGTH)
    assert samples.shape == (20, LENGTH)
    assert samples.max() < VOCAB
