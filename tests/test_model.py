"""Assembling a TarFlowLM from its configuration; precision and modes."""

import copy

import pytest
import torch

from helpers import normal, tiny_ar, tiny_flow
from tarflowlm.flow import numerics
from tarflowlm.flow.channelwise import AffineCoupling, Mix1Coupling
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.model import TarFlowLM, seeded
from tarflowlm.objective import elbo


@pytest.fixture(params=[1, 2], ids=["P1", "P2"])
def model(request) -> TarFlowLM:
    return tiny_flow(couplings=("mixd", "mix1", "affine"), patch=request.param)


@pytest.fixture
def tokens():
    return torch.randint(5, (3, 8), generator=torch.Generator().manual_seed(0))


def test_blocks_follow_the_configuration():
    model = tiny_flow(couplings=("mixd", "mix1", "affine", "mixd"), layers=(3, 1, 2, 1))
    blocks = model.prior.blocks
    assert [type(b.coupling) for b in blocks] == [
        MixDCoupling,
        Mix1Coupling,
        AffineCoupling,
        MixDCoupling,
    ]
    assert [len(b.transformer.layers) for b in blocks] == [3, 1, 2, 1]
    assert [b.order.reverse for b in blocks] == [False, True, False, True]
    assert blocks[0].coupling.components is model.codebook
    assert blocks[3].coupling.components is not model.codebook
    assert blocks[3].coupling.components.vocab_size == 4
    assert blocks[1].coupling.head.biases[0].shape == (2, 3)


def test_the_tied_codebook_is_one_parameter(model):
    names = [
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if p is model.codebook.mean
    ]
    assert names == ["codebook.mean"]
    assert [name for name in model.state_dict() if "mean" in name] == ["codebook.mean"]


def test_a_tie_survives_copying_and_conversion(model, tokens):
    other = copy.deepcopy(model).float().double()
    assert other.prior.blocks[0].coupling.components is other.codebook
    with torch.no_grad():
        other.codebook.mean.mul_(3.0)
    noise = normal(3, 8, 2)
    assert not torch.allclose(other.bound(tokens, noise), model.bound(tokens, noise))


def test_appending_blocks_gives_the_same_stack(model):
    """A model grown block by block has the parameters, in shape, of one built at once."""
    first = TarFlowLM(model.config.first_blocks(1))
    first.config = model.config
    while first.num_blocks < 3:
        first.append_block()
    shapes = [
        {name: tensor.shape for name, tensor in m.state_dict().items()} for m in (first, model)
    ]
    assert shapes[0] == shapes[1]


def test_calling_a_model_gives_a_bound_of_every_text_with_noise_of_its_own(model, tokens):
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.manual_seed(0)
    nats = model(tokens)
    torch.manual_seed(0)
    torch.testing.assert_close(nats, model.bound(tokens, model.draw_noise(tokens)))
    assert seen == [nats]
    exact = tiny_ar()
    torch.testing.assert_close(exact(tokens), -exact.log_prob(tokens))


def test_building_depends_on_the_seed_and_leaves_the_global_generator_alone(model):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    states = []
    for seed in (1, 1, 2):
        with seeded(seed):
            states.append(TarFlowLM(model.config).state_dict())
    assert torch.equal(torch.randn(3), expected)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["codebook.mean"], states[2]["codebook.mean"])


def test_float64_stays_float64(model, tokens):
    terms = elbo(model, tokens, generator=torch.Generator().manual_seed(0))
    for value in (terms.reconstruction, terms.log_q, terms.base, *terms.log_dets, terms.nelbo):
        assert value.dtype == torch.float64
    model.bound(tokens, model.draw_noise(tokens)).sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float64}
    z = model.codebook.mean[tokens].detach()
    u, _ = model.prior(z)
    assert u.dtype == torch.float64
    with torch.no_grad():
        assert model.prior.inverse(u).dtype == torch.float64


def test_float32_is_close_to_float64(model, tokens):
    noise = normal(3, 8, 2)
    single = copy.deepcopy(model).float()
    bound = model.bound(tokens, noise)
    bound_single = single.bound(tokens, noise.float())
    assert bound_single.dtype == torch.float32
    torch.testing.assert_close(bound_single.double(), bound, rtol=1e-4, atol=1e-3)
    z = model.codebook.encode(tokens, noise).detach()
    for value, value_single in zip(model.prior(z), single.prior(z.float()), strict=True):
        torch.testing.assert_close(value_single.double(), value, rtol=1e-3, atol=1e-3)
    for loss in (bound, bound_single):
        loss.sum().backward()
    for (name, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
        if p.grad is not None:
            scale = float(p.grad.abs().max()) if p.numel() else 1.0
            torch.testing.assert_close(
                q.grad.double(), p.grad, rtol=1e-2, atol=1e-3 * max(scale, 1.0), msg=name
            )


def test_float32_round_trip(model):
    single = copy.deepcopy(model).float()
    u = normal(16, 8, 2).float()
    with torch.no_grad():
        again, _ = single.prior(single.prior.inverse(u))
    error = (again - u).abs()
    assert error.median() < 1e-5
    assert error.max() < 5e-2  # between modes a rounding of z is a large step of u


DENSITIES = {
    "mixture_log_prob_from_features": 1,
    "mixture_log_density": 2,
    "rosenblatt": 2,
    "mixture_cdf": 3,
}
"""Function, and the number of blocks of a model that calls it."""


@pytest.mark.parametrize("name", DENSITIES)
def test_bfloat16_products_leave_densities_in_float32(name, model, tokens, monkeypatch):
    calls, original = [], getattr(numerics, name)

    def spy(z, *parameters, **options):
        fused = name == "mixture_log_prob_from_features"  # holds the product of the head as well
        # a function holds the product of the head, too; what it gives is used in full precision
        asked = not isinstance(parameters[0], torch.Tensor)
        wide = parameters[3:] if fused else parameters[asked:]
        calls.append({tensor.dtype for tensor in (z, *wide)})
        assert fused or asked or not torch.is_autocast_enabled("cpu")
        return original(z, *parameters, **options)

    monkeypatch.setattr(numerics, name, spy)
    single, noise = copy.deepcopy(model).float(), normal(3, 8, 2).float()
    single.prior.blocks = single.prior.blocks[: DENSITIES[name]]
    with torch.autocast("cpu", torch.bfloat16):
        terms = elbo(single, tokens, noise=noise)
        bound = single.bound(tokens, noise)
    assert calls
    assert all(call == {torch.float32} for call in calls)
    parts = (terms.reconstruction, terms.log_q, terms.base, *terms.log_dets, bound)
    assert {part.dtype for part in parts} == {torch.float32}
    torch.testing.assert_close(bound, single.bound(tokens, noise), rtol=0.05, atol=0.5)
    torch.testing.assert_close(bound, terms.nelbo, rtol=0.05, atol=0.5)
    exact = elbo(single, tokens, noise=noise)  # no network stands before these two
    torch.testing.assert_close(terms.reconstruction, exact.reconstruction)
    torch.testing.assert_close(terms.log_q, exact.log_q)
    bound.sum().backward()
    gradients = [p.grad for p in single.parameters() if p.grad is not None]
    assert {g.dtype for g in gradients} == {torch.float32}
    assert all(torch.isfinite(g).all() for g in gradients)
