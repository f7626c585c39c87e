"""Parallel sweeps give what position-by-position inversion gives, in no more passes than there are
positions.
"""

import time

import pytest
import torch

from helpers import normal, stack, tiny_flow
from tarflowlm.generation import generate, sweeps
from tarflowlm.generation.inverse import invert_block, invert_stack
from tarflowlm.model import TarFlowLM, seeded
from tarflowlm.model_config import FlowConfig

pytestmark = pytest.mark.slow

STACKS = [
    ("mix1",),
    ("affine",),
    ("token-affine",),
    ("mixd",),
    ("affine", "mix1"),
]


@pytest.mark.parametrize(
    ("couplings", "patch", "segment"),
    [
        (("mix1",), 1, 512),
        (("mixd", "mix1", "affine"), 2, 40),
        *(
            pytest.param(stack, patch, 40, marks=pytest.mark.nightly)
            for stack, patch in zip(STACKS, [1, 2, 1, 2, 1], strict=True)
        ),
        pytest.param(("mixd", "mix1", "affine"), 2, 512, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_sweeps_give_what_steps_give(couplings, patch, segment, monkeypatch):
    """Strongly coupled random blocks of both directions, longer than the first segment."""
    monkeypatch.setattr(sweeps, "LONGEST_SEGMENT", segment)
    model = tiny_flow(couplings=couplings, patch=patch, context=128)
    positions = 128 // patch
    noise = normal(3, positions, 2 * patch)
    for block in model.prior.blocks:
        by_steps, steps = invert_block(block, noise, decoder="steps")
        by_sweeps, swept = invert_block(block, noise, decoder="sweeps")
        chosen, _ = invert_block(block, noise, decoder="auto")
        assert steps.passes == positions
        # a few Newton steps that lead nowhere, then sweeps that finish a position each
        assert 1 <= swept.passes <= positions + 16
        torch.testing.assert_close(by_steps, by_sweeps, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(by_steps, chosen, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 65])
def test_any_length_can_be_swept(length):
    block = tiny_flow(couplings=("mix1", "mix1"), context=128).prior.blocks[1]
    u = normal(2, length, 2)
    with torch.no_grad():
        found, work = invert_block(block, u, decoder="sweeps")
        torch.testing.assert_close(block(found)[0], u, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found, block.inverse(u), rtol=1e-8, atol=1e-8)
    assert work.passes <= length + 16


@pytest.fixture
def no_clock(monkeypatch):
    """A path that depends on time makes the last digits of a seed depend on the machine."""
    for name in ("time", "perf_counter", "monotonic", "process_time"):
        monkeypatch.setattr(time, name, lambda: pytest.fail("a clock was read"))


@pytest.mark.parametrize(("decoder", "patch"), [("sweeps", 2), ("auto", 1)])
def test_blocks_near_the_identity_take_few_sweeps(decoder, patch, no_clock):
    """In both directions, with mixed channels."""
    with seeded(0):
        blocks = stack(("mix1", "affine", "mix1"), (1, 1, 1), (3, 1, 2))
        model = TarFlowLM(
            FlowConfig(vocab_size=5, context=256, latent_dim=2, patch=patch, blocks=blocks)
        )
    for dtype, tolerance, most in ((torch.float32, 1e-5, 8), (torch.float64, 1e-10, 14)):
        model = model.to(dtype)
        for batch in (1, 12):
            noise = normal(batch, 256, 2).to(dtype)
            with torch.no_grad():
                found, work = invert_stack(model, noise, decoder=decoder)
                again = model.prior(found[-1])[0]
            assert all(w.decoder == "sweeps" and w.passes <= most for w in work)
            torch.testing.assert_close(again, noise, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("coupling", ["mix1", "affine", "mixd"])
def test_auto_soon_notices_that_sweeps_do_not_converge(coupling, no_clock):
    block = tiny_flow(couplings=(coupling,), context=64, log_std=-6.0, scale=0.5).prior.blocks[0]
    u = normal(16, 64, 2)
    with torch.no_grad():
        found, work = invert_block(block, u, decoder="auto")
        torch.testing.assert_close(found, block.inverse(u), rtol=1e-8, atol=1e-8)
    assert work.decoder == "steps"
    assert work.passes <= 64 + 1


def test_a_row_that_needs_many_sweeps_does_not_spoil_the_others():
    block = tiny_flow(couplings=("mix1",), context=64, scale=0.5).prior.blocks[0]
    u = normal(5, 64, 2)
    u[0] *= 4
    with torch.no_grad():
        together, _ = invert_block(block, u, decoder="sweeps")
        alone, _ = invert_block(block, u[1:2], decoder="sweeps")
    torch.testing.assert_close(together[1:2], alone, rtol=1e-8, atol=1e-8)


def test_steps_and_auto_write_the_same_text():
    model = tiny_flow(couplings=("mixd", "mix1", "mix1"), context=32).float()
    for seed in range(6):
        texts = []
        for decoder in ("steps", "auto"):
            generator = torch.Generator().manual_seed(seed)
            texts.append(
                generate(model, num_tokens=32, num=2, decoder=decoder, generator=generator).tokens
            )
        assert torch.equal(texts[0], texts[1])


@pytest.mark.parametrize("num", [7, pytest.param(63, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("decoder", ["steps", "sweeps", "auto"])
def test_settled_positions_are_copied_and_the_rest_is_inverted(decoder, num):
    """In both directions, the first positions in the block's own order."""
    for block in tiny_flow(couplings=("mix1", "mix1"), context=64).prior.blocks:
        u = normal(2, 64, 2)
        with torch.no_grad():
            h = block.inverse(u)
            other = torch.where(
                torch.arange(64)[:, None] < num, normal(2, 64, 2, seed=5), block.order(u)
            )
            other = block.order.inverse(other)  # wrong noise where it must not be read
            settled = block.order(h)[:, :num]
            found, _ = invert_block(block, other, decoder=decoder, settled=settled)
        torch.testing.assert_close(found, h, rtol=1e-8, atol=1e-8)
        same = block.order(found)[:, :num]
        assert torch.equal(same, block.order(h)[:, :num])


def test_a_position_that_sweeps_got_wrong_is_inverted_again(monkeypatch):
    """Sweeps that call everything settled at once leave a wrong answer; the way back to the noise
    shows it.
    """
    monkeypatch.setitem(sweeps.TOLERANCE, torch.float64, 1e9)
    block = tiny_flow(couplings=("mix1",), context=64).prior.blocks[0]
    u = normal(2, 64, 2)
    with torch.no_grad():
        found, work = invert_block(block, u, decoder="sweeps")
        expected = block.inverse(u)
    assert 2 < work.passes < 64 + 2
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
