"""Parallel sweeps give what position-by-position inversion gives, in no more passes than there are positions."""

import pytest
import torch

from tarflowlm.generation import generate
from tarflowlm.generation.parallel import invert_parallel
from tarflowlm.generation.stack import invert_stack
from tarflowlm.model import FlowConfig, TarFlowLM, seeded

STACKS = [("mix1",), ("affine",), ("mixd",), ("affine", "mix1"), ("mixd", "mix1", "affine")]


@pytest.mark.parametrize("couplings", STACKS, ids="-".join)
@pytest.mark.parametrize("patch", [1, 2])
def test_parallel_equals_sequential(couplings, patch, tiny_flow, normal):
    """Strongly coupled random blocks of both directions, longer than the first window."""
    model = tiny_flow(couplings=couplings, patch=patch, context=128)
    noise = normal(3, 128, 2)
    with torch.no_grad():
        slow, one_each = invert_stack(model, noise, decoder="sequential")
        fast, sweeps = invert_stack(model, noise, decoder="parallel")
    positions = 128 // patch
    assert one_each == (positions,) * len(couplings)
    assert all(1 <= s <= positions for s in sweeps)
    for a, b in zip(slow, fast, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 65])
def test_any_length(length, tiny_flow, normal):
    block = tiny_flow(couplings=("mix1", "mix1"), context=128).prior.blocks[1]
    u = normal(2, length, 2)
    with torch.no_grad():
        h, sweeps = invert_parallel(block, u)
        torch.testing.assert_close(block(h)[0], u, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(h, block.inverse(u), rtol=1e-8, atol=1e-8)
    assert sweeps <= length


def test_a_block_near_the_identity_takes_few_sweeps(normal):
    with seeded(0):
        model = TarFlowLM(
            FlowConfig(vocab_size=5, context=256, latent_dim=2, couplings=("mix1",), layers=(1,), components=(2,))
        ).double()
    with torch.no_grad():
        h, sweeps = invert_parallel(model.prior.blocks[0], normal(4, 256, 2))
    assert sweeps < 30
    assert torch.isfinite(h).all()


def test_a_row_that_needs_many_sweeps_does_not_spoil_the_others(tiny_flow, normal):
    block = tiny_flow(couplings=("mix1",), context=64, scale=0.5).prior.blocks[0]
    u = normal(5, 64, 2)
    u[0] *= 4
    with torch.no_grad():
        together, _ = invert_parallel(block, u)
        alone, _ = invert_parallel(block, u[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-8, atol=1e-8)


def test_the_result_counts_positions_and_does_not_write_into_the_noise(tiny_flow, normal):
    block = tiny_flow(couplings=("mix1",), context=64).prior.blocks[0]
    u, ticks = normal(2, 64, 2), []
    before = u.clone()
    invert_parallel(block, u, tick=lambda: ticks.append(1))
    assert len(ticks) == 64
    assert torch.equal(u, before)


def test_decoders_write_the_same_text(tiny_flow):
    model = tiny_flow(couplings=("mixd", "mix1", "mix1"), context=32).float()
    texts = {}
    for decoder in ("sequential", "parallel", "auto"):
        rows = [
            generate(model, num_tokens=32, num=2, decoder=decoder, generator=torch.Generator().manual_seed(s)).tokens
            for s in range(25)
        ]
        texts[decoder] = torch.stack(rows)
    assert torch.equal(texts["sequential"], texts["parallel"])
    assert torch.equal(texts["sequential"], texts["auto"])


def test_auto_inverts_mixd_position_by_position_and_a_prompt_is_kept(tiny_flow):
    model = tiny_flow(couplings=("mixd", "mix1"), context=64)
    found = generate(model, num_tokens=64, decoder="auto", generator=torch.Generator().manual_seed(0))
    assert found.sweeps[1] == 64
    assert found.sweeps[0] < 64
    prompt = torch.tensor([1, 2, 0])
    generator = torch.Generator().manual_seed(0)
    kept = generate(model, num_tokens=16, decoder="parallel", prompt=prompt, generator=generator)
    assert kept.tokens[0, :3].tolist() == [1, 2, 0]
