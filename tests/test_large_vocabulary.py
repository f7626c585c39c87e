"""With 50,257 tokens no path may hold a tensor of tokens x vocabulary: the largest one that any
operation makes.
"""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import TRUNK, stack
from tarflowlm import chunks
from tarflowlm.baseline import TokenLM
from tarflowlm.evaluation.blocks import latent_report
from tarflowlm.model import TarFlowLM, seeded
from tarflowlm.model_config import BaselineConfig, FlowConfig
from tarflowlm.objective import elbo

pytestmark = pytest.mark.slow

VOCABULARY, BATCH, LENGTH, DIM = 50_257, 2, 64, 4
HELD = chunks.HELD_CPU
"""Elements that may be held, two thirds of tokens x vocabulary."""


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return result


def largest(run: Callable[[], object]) -> int:
    with Largest() as watch:
        run()
    return watch.elements


@pytest.fixture(scope="module")
def model() -> TarFlowLM:
    """One tied Mix-d block under one of Mix-1, as in the OpenWebText presets, with a trunk of
    almost nothing.
    """
    config = FlowConfig(
        vocab_size=VOCABULARY,
        context=LENGTH,
        latent_dim=DIM,
        trunk=TRUNK,
        head_hidden=4,
        blocks=stack(("mixd", "mix1"), (1, 1), (0, 2)),
    )
    with seeded(0):
        return TarFlowLM(config)


@pytest.fixture
def first(model):
    """Stage 1: the Mix-d block alone."""
    with seeded(0):
        alone = TarFlowLM(model.config.first_blocks(1))
    alone.load_state_dict(model.state_dict(), strict=False)
    return alone


@pytest.fixture
def tokens():
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise(model, tokens):
    return model.draw_noise(tokens, torch.Generator().manual_seed(1))


def test_stage_1(first, tokens, noise):
    def step():
        first.bound(tokens, noise).mean().backward()

    assert largest(step) <= HELD


@pytest.mark.parametrize(
    "frozen",
    [pytest.param(1, id="stage 2"), pytest.param(0, id="joint", marks=pytest.mark.nightly)],
)
def test_the_block_above(model, tokens, noise, frozen):
    def step():
        model.bound(tokens, noise, frozen=frozen).mean().backward()

    assert largest(step) <= HELD < BATCH * LENGTH * VOCABULARY


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("frozen", [1, 0], ids=["stage 2", "joint"])
def test_the_block_above_on_an_accelerator(model, tokens, noise, frozen, monkeypatch):
    """Its log-space path, with chunks as much smaller as the batch is here."""
    limit = 4 * VOCABULARY
    monkeypatch.setattr(chunks, "HELD_ACCELERATOR", limit)
    monkeypatch.setattr(chunks, "HELD_CPU", limit)

    def step():
        short = tokens[:1, :16], noise[:1, :16]
        model.bound(short[0], short[1], frozen=frozen).mean().backward()

    # the head's own weight is larger than four rows
    parameters = VOCABULARY * max(TRUNK.width, DIM + 2)
    assert largest(step) <= max(limit, parameters) < 16 * VOCABULARY


def test_evaluation(model, tokens, noise):
    with torch.no_grad():
        assert largest(lambda: elbo(model, tokens, noise=noise)) <= HELD
    assert largest(lambda: latent_report(model, tokens)) <= HELD


def test_the_baseline(tokens, monkeypatch):
    """Its logits come a few tokens at a time, with the value and gradients of all at once."""
    with seeded(0):
        lm = TokenLM(BaselineConfig(vocab_size=VOCABULARY, context=LENGTH, trunk=TRUNK, layers=1))
        torch.nn.init.normal_(lm.head.weight, std=0.5)

    def step():
        lm.zero_grad()
        loss = -lm.log_prob(tokens).mean()
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in lm.named_parameters()}

    loss, gradients = step()
    # in parts that stay in the cache
    assert largest(step) <= HELD < BATCH * LENGTH * VOCABULARY
    monkeypatch.setattr(chunks, "LOGITS", HELD)
    assert largest(step) <= HELD
    with torch.no_grad():
        assert largest(lambda: lm.log_prob(tokens)) <= HELD
    again, others = step()
    assert again == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)
