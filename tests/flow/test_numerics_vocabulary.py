"""mixture_log_prob, mixture_log_prob_from_features, log_component_densities."""

import math

import mpmath
import pytest
import torch
from numerics_cases import codebook_case

from tarflowlm import chunks
from tarflowlm.flow.numerics import component_finder, log_normaliser, mixture_log_prob, nearby
from tarflowlm.flow.numerics.nearby import near_components
from tarflowlm.flow.numerics.normal import log_component_densities
from tarflowlm.flow.numerics.vocabulary import mixture_log_prob_from_features


def plain(z, log_w, mean, log_std):
    """The same number by differences, all at once."""
    squares = ((z[..., None, :] - mean) ** 2).sum(-1)
    d = z.shape[-1]
    log_n = -0.5 * squares * torch.exp(-2 * log_std) - d * (log_std + 0.5 * math.log(2 * math.pi))
    return torch.logsumexp(torch.log_softmax(log_w, -1) + log_n, -1)


def head_case(rows, components, d, width, seed=0, dtype=torch.float64):
    z, _, mean, log_std = codebook_case(rows, components, d, seed, dtype)
    g = torch.Generator().manual_seed(seed + 1)
    features, weight, bias = (
        torch.randn(*s, generator=g, dtype=torch.float64).to(dtype)
        for s in ((rows, width), (components, width), (components,))
    )
    return z, features, 0.5 * weight, bias, mean, log_std


@pytest.fixture(params=["one chunk", "chunks of two rows", "computed again in the backward"])
def budget(request, monkeypatch):
    if request.param != "one chunk":
        monkeypatch.setattr(chunks, "HELD_CPU", 4 * 7 * 2)
    if request.param == "computed again in the backward":
        monkeypatch.setattr(chunks, "KEPT", 0)
    return request.param


@pytest.mark.slow
def test_values_and_gradients(budget):
    z, log_w, mean, log_std = (t.requires_grad_() for t in codebook_case(6, 7, 3, 0))
    torch.testing.assert_close(
        mixture_log_prob(z, log_w, mean, log_std), plain(z, log_w, mean, log_std)
    )
    assert torch.autograd.gradcheck(mixture_log_prob, (z, log_w, mean, log_std))
    assert torch.autograd.gradcheck(log_normaliser, (z, mean, log_std))
    inputs = [t.requires_grad_() for t in head_case(6, 7, 3, 4)]
    logits = inputs[1] @ inputs[2].T + inputs[3]
    expected = plain(inputs[0], logits, *inputs[4:])
    torch.testing.assert_close(mixture_log_prob_from_features(*inputs), expected)
    assert torch.autograd.gradcheck(mixture_log_prob_from_features, inputs)


@pytest.mark.slow
def test_relative_to_the_normaliser_in_one_sweep(budget):
    """Eq. 12 of docs/math.md: log sum_k pi_k p(k | z)."""
    inputs = [t.requires_grad_() for t in head_case(6, 7, 3, 4)]
    log_pi = torch.log_softmax(inputs[1] @ inputs[2].T + inputs[3], -1)
    log_posterior = torch.log_softmax(log_component_densities(inputs[0], *inputs[4:]), -1)
    found = mixture_log_prob_from_features(*inputs, relative=True)
    torch.testing.assert_close(found, torch.logsumexp(log_pi + log_posterior, -1))
    assert torch.autograd.gradcheck(
        lambda *a: mixture_log_prob_from_features(*a, relative=True), inputs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_near_components_are_as_good_as_all(dtype, budget, monkeypatch):
    """The general path's values and gradients of a large vocabulary, with rows at codes, between
    them, far from all, and at codes that the head finds impossible.
    """
    if budget != "one chunk":
        monkeypatch.setattr(chunks, "HELD_CPU", 4 * 300 * 2)
    inputs = list(head_case(60, 300, 12, 4, seed=3))
    inputs[5] = inputs[5] - 1.5
    inputs[0][:40] = inputs[4][:40] + inputs[5][:40, None].exp() * inputs[0][:40]
    inputs[0][40:50] = 0.5 * (inputs[4][:10] + inputs[4][10:20])
    inputs[3][:5] = -60.0
    inputs = [t.to(dtype).requires_grad_() for t in inputs]
    pairs = near_components(inputs[0], *inputs[4:])
    assert 60 < len(pairs.rows) < 60 * 300 / 32
    shares = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=dtype)

    def results():
        for relative in (True, False):
            log_p = mixture_log_prob_from_features(*inputs, relative=relative)
            yield from (log_p, *torch.autograd.grad(log_p @ shares, inputs))
        log_p = log_normaliser(inputs[0], *inputs[4:])
        yield from (log_p, *torch.autograd.grad(log_p @ shares, (inputs[0], *inputs[4:])))

    found = list(results())
    monkeypatch.setattr(nearby, "FEWEST", 301)
    assert near_components(inputs[0], *inputs[4:]) is None
    bound = 5e-6 if dtype == torch.float32 else 1e-13
    for one, other in zip(found, results(), strict=True):
        torch.testing.assert_close(
            one, other, rtol=bound, atol=bound * (1 + other.abs().max().item())
        )


def test_near_components_miss_none():
    """Every component within reach of the nearest is there, also with scales of 1e-3 at means of
    4.
    """
    for sigma in (1e-3, 0.1, 0.2):
        z, _, mean, log_std = codebook_case(200, 500, 12, 9, torch.float32)
        log_std, mean = log_std + 0.7 + math.log(sigma), 2 * mean
        z = mean[:200] + 4 * log_std[:200, None].exp() * z
        pairs = near_components(z, mean, log_std)
        exact = log_component_densities(z.double(), mean.double(), log_std.double())
        wanted = exact >= exact.amax(-1, keepdim=True) - nearby.reach(torch.float32, 500)
        found = torch.zeros_like(wanted)
        found[pairs.rows, pairs.components] = True
        assert found[wanted].all()


@pytest.mark.parametrize("offset", [0.0, 10.0, 30.0])
def test_near_components_miss_none_under_autocast(offset):
    """Codes far from the origin, whose products cancel: bfloat16 would lose a row's own code."""
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(1024, 16, generator=g) + offset
    log_std = torch.full((1024,), -1.5)
    z = mean[:128] + log_std[:128, None].exp() * torch.randn(128, 16, generator=g)
    with torch.autocast("cpu", torch.bfloat16):
        pairs = near_components(z, mean, log_std)
    exact = log_component_densities(z.double(), mean.double(), log_std.double())
    wanted = exact >= exact.amax(-1, keepdim=True) - nearby.reach(torch.float32, 1024)
    found = torch.zeros_like(wanted)
    found[pairs.rows, pairs.components] = True
    assert wanted.sum() > 128
    assert found[wanted].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_most_probable_component(dtype, budget):
    """The first of the largest, and the largest but for the rounding of a product: components that
    are equal may lie in different tiles of it.
    """
    z, _, mean, log_std = codebook_case(50, 40, 3, 5, dtype)
    mean, log_std = mean[:20].repeat(2, 1), log_std[:20].repeat(2)
    z[7, 1] = math.nan
    z[8] = 0.0  # where products are exact
    find = component_finder(mean, log_std)
    found = find(z)
    density = log_component_densities(z.double(), mean.double(), log_std.double())
    below = density.amax(-1) - density.gather(-1, found[:, None])[:, 0]
    assert below.nan_to_num().max() <= 1e-12
    assert found[7] == 0
    assert found[8] == density[8].argmax() < 20
    assert torch.equal(find(z.view(5, 10, 3)), found.view(5, 10))
    assert find(z[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_scales_against_fifty_digits(dtype):
    """s = 1e-3, |mu| = 4, z within a few s of a component: float32 expansions of the square are off
    by a nat here.
    """
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 16, generator=g).to(dtype)
    log_std = torch.tensor([math.log(1e-3), math.log(1e-3), -2.0, 0.0], dtype=dtype)
    z = mean[:2] + 2e-3 * torch.randn(2, 16, generator=g).to(dtype)
    ours = log_component_densities(z, mean, log_std)
    for n in range(2):
        for k in range(4):
            with mpmath.workdps(50):
                square = sum(
                    (mpmath.mpf(z[n, i].item()) - mpmath.mpf(mean[k, i].item())) ** 2
                    for i in range(16)
                )
                s = mpmath.mpf(log_std[k].item())
                exact = -square / 2 * mpmath.exp(-2 * s) - 16 * (s + mpmath.log(2 * mpmath.pi) / 2)
            tolerance = (1e-7 if dtype == torch.float32 else 1e-14) * (1 + abs(float(exact))) + 1e-7
            assert abs(ours[n, k].item() - float(exact)) <= tolerance
    torch.testing.assert_close(
        log_normaliser(z, mean, log_std), ours.logsumexp(-1), rtol=1e-6, atol=1e-5
    )


def test_gradients_at_small_scales():
    case = codebook_case(8, 5, 16, 3, torch.float32)
    mean, log_std = case[2], torch.full((5,), math.log(1e-3))
    z = mean[torch.arange(8) % 5] + 1e-3 * case[0]
    single = [t.detach().requires_grad_() for t in (z, case[1], mean, log_std)]
    double = [t.detach().double().requires_grad_() for t in single]
    grads = torch.autograd.grad(mixture_log_prob(*single).sum(), single)
    exact = torch.autograd.grad(plain(*double).sum(), double)
    for one, other in zip(grads, exact, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max() + 1e-5


@pytest.mark.parametrize("components", [40, 100], ids=["all components", "near components"])
def test_under_autocast_only_the_head_is_half(budget, components):
    inputs = list(head_case(24, components, 4, 32, dtype=torch.float32))
    if components == 100:
        inputs[5] = inputs[5] - 3.0
        inputs[0] = inputs[4][:24] + inputs[5][:24, None].exp() * inputs[0]
    inputs = [t.requires_grad_() for t in inputs]
    assert (near_components(inputs[0], *inputs[4:]) is None) == (components == 40)
    exact = torch.autograd.grad(mixture_log_prob_from_features(*inputs).sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_p = mixture_log_prob_from_features(*inputs)
    assert log_p.dtype == torch.float32
    logits = (inputs[1].bfloat16() @ inputs[2].bfloat16().T).float() + inputs[3]
    # near components take logits with a bias in half precision, as a linear layer has it
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if components == 40 else {"rtol": 0, "atol": 0.05}
    torch.testing.assert_close(log_p, plain(inputs[0], logits, *inputs[4:]), **tolerance)
    for one, other in zip(torch.autograd.grad(log_p.sum(), inputs), exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= 0.1 * other.abs().max()


def test_nan_and_masked_components():
    z, log_w, mean, log_std = codebook_case(4, 5, 3, 1)
    masked = torch.cat([log_w, torch.full((4, 1), -math.inf, dtype=torch.float64)], -1)
    wide = mixture_log_prob(
        z, masked, torch.cat([mean, mean[:1]]), torch.cat([log_std, log_std[:1]])
    )
    torch.testing.assert_close(wide, mixture_log_prob(z, log_w, mean, log_std))
    z[1, 0] = math.nan
    assert mixture_log_prob(z, log_w, mean, log_std).isnan().tolist() == [False, True, False, False]


def test_second_derivatives_are_refused():
    z, log_w, mean, log_std = codebook_case(4, 5, 3, 1)
    log_p = mixture_log_prob(z.requires_grad_(), log_w, mean, log_std).sum()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(log_p, z, create_graph=True)
