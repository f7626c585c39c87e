"""Editing: what is not changed stays to the bit, what is changed follows the formulas, and what is
refused.
"""

import pytest
import torch

from helpers import mostly_nightly, tiny_flow
from tarflowlm.editing.states import Source, encode, renoise
from tarflowlm.errors import UserError
from tarflowlm.generation.sampling import row_generators
from tarflowlm.model import TarFlowLM
from tarflowlm.objective import elbo

STACKS = {
    "mixd": {"couplings": ("mixd",)},
    "mixd-mix1": {"couplings": ("mixd", "mix1", "mix1")},
    "affine": {"couplings": ("affine", "affine")},
    "mixd-mix1-P2": {"couplings": ("mixd", "mix1"), "patch": 2},
}
TEXT = torch.tensor([[0, 3, 1, 4, 1, 0, 2], [2, 2, 0, 1, 3, 4, 4]])


@pytest.fixture(params=mostly_nightly(STACKS, "mixd-mix1", "mixd-mix1-P2"))
def model(request) -> TarFlowLM:
    return tiny_flow(log_std=-3.0, **STACKS[request.param])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_encoding_gives_the_states_and_fills_the_last_patch(model):
    text = encode(model, TEXT, generator())
    assert torch.equal(text.tokens[:, :7], TEXT)
    assert text.length == 7
    assert text.tokens.shape[1] == (8 if model.config.patch == 2 else 7)
    assert torch.equal(model.codebook.decode(text.states[0]), text.tokens)
    with torch.no_grad():
        u, _ = model.prior(text.states[0])
    assert torch.equal(u, text.states[-1])


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["steps", "sweeps", "auto"])
def test_strength_zero_returns_the_text_to_the_bit(model, decoder):
    text = encode(model, TEXT, generator())
    for level in range(model.num_blocks + 1):
        edit = renoise(
            Source(model, text, generator(1)), level=level, strength=0.0, decoder=decoder
        )
        assert torch.equal(edit.tokens, TEXT)
        assert not edit.changed.any()
        assert torch.equal(edit.states[-1], text.states[0][:, :7])


@pytest.mark.slow
def test_strength_one_forgets_the_state_and_less_keeps_more(model):
    text = encode(model, TEXT, generator())
    counts = []
    for strength in (0.05, 0.5, 1.0):
        changed = [
            renoise(
                Source(model, text, generator(s)), level=model.num_blocks, strength=strength
            ).changed.float()
            for s in range(6)
        ]
        counts.append(torch.cat(changed).mean().item())
    assert counts[0] < counts[1] < counts[2]
    a = renoise(Source(model, text, generator(5)), level=1, strength=1.0)
    other = encode(model, TEXT.flip(0), generator())
    b = renoise(Source(model, other, generator(5)), level=1, strength=1.0)
    torch.testing.assert_close(a.states[-1], b.states[-1], rtol=1e-6, atol=1e-6)


def test_renoising_follows_its_formula_and_comes_down_the_stack(model):
    text = encode(model, TEXT, generator())
    edit = renoise(Source(model, text, generator(2)), level=1, strength=0.6)
    streams = row_generators(range(len(text.states[1])), generator(2))
    eps = [torch.randn(text.states[1].shape[1:], generator=g) for g in streams]
    eps = torch.stack(eps).to(text.states[1])
    expected = 0.8 * text.states[1] + 0.6 * eps
    torch.testing.assert_close(edit.states[0], expected[:, :7])
    with torch.no_grad():
        z = model.prior.patch.inverse(model.prior.blocks[0].inverse(model.prior.patch(expected)))
    torch.testing.assert_close(edit.states[-1], z[:, :7], rtol=1e-6, atol=1e-6)
    assert torch.equal(edit.tokens, model.codebook.decode(z)[:, :7])
    assert torch.equal(edit.changed, edit.tokens != TEXT)


def test_a_change_late_in_the_text_leaves_what_block_1_saw_before_it(model):
    """At level 1 only block 1 is inverted, from left to right."""
    text = encode(model, TEXT, generator())
    where = torch.arange(text.tokens.shape[1]) >= 4
    edit = renoise(Source(model, text, generator(3)), level=1, strength=1.0, where=where)
    assert torch.equal(edit.states[-1][:, :4], text.states[0][:, :4])
    assert not edit.changed[:, :4].any()


def test_bounds_are_means_of_the_negative_elbo():
    model = tiny_flow(log_std=-6.0, couplings=("mixd",))
    text = encode(model, TEXT, generator())
    edit = renoise(Source(model, text, generator(1)), level=1, strength=1.0)
    with torch.no_grad():
        for tokens, found in ((TEXT, edit.bounds[0]), (edit.tokens, edit.bounds[1])):
            expected = torch.stack(
                [elbo(model, tokens, generator=generator(s)).nelbo for s in range(20)]
            ).mean(0)
            torch.testing.assert_close(found, expected, rtol=0.01, atol=0.05)


@pytest.mark.parametrize("level", [4, -1])
def test_renoising_refuses(level):
    model = tiny_flow(couplings=("mixd", "mix1", "mix1"))
    text = encode(model, TEXT, generator())
    with pytest.raises(UserError, match=f"level {level}"):
        renoise(Source(model, text, generator()), level=level, strength=0.5)
