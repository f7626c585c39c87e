"""Drawing the last block is exact: what it draws has standard normal noise, which inverts to it."""

import math

import pytest
import torch
from torch import Tensor

from helpers import FILLS, mostly_slow, tiny_flow
from tarflowlm.generation import Generation, generate
from tarflowlm.generation.inverse import invert_stack
from tarflowlm.model import TarFlowLM

NUM = 3000
MODELS = {
    "affine": {"couplings": ("affine",)},
    "token-affine": {"couplings": ("token-affine",)},
    "mix1": {"couplings": ("mix1",)},
    "mixd": {"couplings": ("mixd",)},
    "own-components": {"couplings": ("affine", "mixd")},
    "mix1-mix1": {"couplings": ("mix1", "mix1")},
    "left": {"couplings": ("mixd", "mix1"), "alternate": False},
    "patch": {"couplings": ("mixd", "mix1"), "patch": 2},
    "in-patch": {"couplings": ("mixd",), "patch": 2, "in_patch": "autoregressive"},
    "places": {"couplings": ("affine", "mixd"), "patch": 2, "in_patch": "independent"},
    "fills": FILLS | {"alternate": False, "log_std": -1.0},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(name: str) -> TarFlowLM:
    return tiny_flow(**({"context": 4, "log_std": -1.0, "scale": 0.3, "seed": 2} | MODELS[name]))


def drawn(model: TarFlowLM, num: int = NUM, **options) -> Generation:
    return generate(model, num_tokens=4, num=num, decoder="auto", generator=generator(3), **options)


def assert_standard_normal(u: Tensor) -> None:
    """Columns by Kolmogorov's distance, pairs of columns by the correlations of u and of u^2."""
    num = len(u)
    ranked = torch.special.ndtr(u).sort(0).values
    steps = torch.arange(num + 1, dtype=u.dtype)[:, None] / num
    distance = torch.maximum((ranked - steps[:-1]).abs(), (ranked - steps[1:]).abs()).amax(0)
    # exceeded by chance with probability 7e-4
    assert (distance * math.sqrt(num) < 2.0).all()
    for x in (u, u.square()):
        off = torch.corrcoef(x.T) - torch.eye(u.shape[1])
        assert off.abs().max() < 5 / math.sqrt(num)


@pytest.mark.parametrize("name", mostly_slow(MODELS, "mix1", "mixd"))
def test_the_noise_of_what_is_drawn_is_standard_normal_and_inverts_to_it(name):
    model = build(name)
    found = drawn(model)
    assert found.work[0].decoder == "draw"
    assert len(found.work) == model.num_blocks
    states = found.states(model)
    assert_standard_normal(states[0].flatten(1))
    few = [h[:50] for h in states]
    with torch.no_grad():
        states, _ = invert_stack(model, few[0])
    for ours, theirs in zip(few, states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_test_of_normality_notices_a_component_drawn_twice_as_often():
    model = build("mixd")
    with torch.no_grad():
        model.prior.blocks[0].coupling.weight_head.bias[0] += math.log(2)
        latents = drawn(model).latents[-1]
        model.prior.blocks[0].coupling.weight_head.bias[0] -= math.log(2)
        noise, _ = model.prior(latents)
    with pytest.raises(AssertionError):
        assert_standard_normal(noise.flatten(1))


@pytest.mark.parametrize("prompt", [None, [2, 0], [-1, -1, 1]])
@pytest.mark.parametrize("name", ["mix1", "mixd", "patch"])
def test_what_a_row_draws_does_not_depend_on_the_others(name, prompt):
    model = build(name)
    given = None if prompt is None else torch.tensor(prompt)
    together = drawn(model, num=3, prompt=given)
    alone = drawn(model, num=1, prompt=given)
    assert torch.equal(alone.tokens[0], together.tokens[0])
    assert together.work == alone.work
    assert together.work[0].decoder == "draw"


def test_settled_positions_of_a_prompt_are_kept_and_the_rest_is_drawn():
    model = tiny_flow(**FILLS, alternate=False, log_std=-4.0)
    found = drawn(model, num=5, prompt=torch.tensor([1, 0]))
    assert found.tokens[:, :2].tolist() == [[1, 0]] * 5
    assert found.work[0].decoder == "draw"
    assert found.evidence is not None


@pytest.mark.parametrize("couplings", [("mix1",), ("mixd",), ("mix1", "mix1")], ids=str)
def test_auto_draws_a_block_far_from_the_identity(couplings):
    model = tiny_flow(couplings=couplings, scale=0.5, context=16)
    assert generate(model, num_tokens=16).work[0].decoder == "draw"


def test_auto_sweeps_a_block_near_the_identity():
    model = tiny_flow(couplings=("mixd", "affine"), scale=0.01, context=16)
    assert generate(model, num_tokens=16).work[0].decoder == "sweeps"


def test_drawing_is_for_the_last_block_of_a_sampler_alone():
    model = build("mix1-mix1")
    decoders = [work.decoder for work in generate(model, num_tokens=4).work]
    assert decoders[0] == "draw" != decoders[1]
