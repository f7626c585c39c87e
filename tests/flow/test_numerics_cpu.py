"""Every fast path of a CPU against `reference` in float64: hard mixtures, both tails to 30 sigma,
both formats.
"""

from functools import cache

import pytest
import torch
from numerics_cases import codebook_case, nasty_mixtures, wide_noise

from tarflowlm import compiled, flow
from tarflowlm.flow.numerics import (
    cpu,
    mixture_cdf,
    mixture_log_prob,
    reference,
    rosenblatt,
)
from tarflowlm.flow.numerics.normal import log_component_densities

ROWS = 1000
DTYPES = [torch.float32, torch.float64]
BOUND = {torch.float32: 2e-4, torch.float64: 1e-10}
"""Of what passes through many channels."""
COMPONENTS = [1, 2, 8, 27]
"""On both sides of the two layouts of a chunk."""


@cache
def scalar_case(components, dtype, shared=()):
    """u, z and parameters in `dtype`, z also in float64; |u| to 30, so float32 has rows in all
    three spaces.
    """
    params = nasty_mixtures(ROWS, components, components, dtype)
    params = tuple(p[:1] if i in shared else p for i, p in enumerate(params))
    u = wide_noise(ROWS, components, dtype)
    wide = reference.mixture_cdf_inverse(*double(u, *params))
    return u, wide.to(dtype), wide, params


def double(*tensors):
    return [t.double() for t in tensors]


def largest(found, expected, size):
    """Error over `size`, which is 1 or more, in units of the format's rounding; NaN where a value
    is none.
    """
    return ((found - expected).abs() / size).max() / torch.finfo(found.dtype).eps


@pytest.mark.parametrize("shared", [(), (1, 2), (0,)])
@pytest.mark.parametrize("components", COMPONENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixture_cdf_and_density(dtype, components, shared):
    _, z, _, params = scalar_case(components, dtype, shared)
    u, log_det = cpu.mixture_cdf(z, *params)
    log_p = cpu.mixture_log_density(z, *params)
    exact_u, exact_log_det = reference.mixture_cdf(*double(z, *params))
    exact_log_p = reference.mixture_log_density(*double(z, *params))
    assert exact_u.abs().max() > 29
    assert largest(u, exact_u, 1 + exact_u.abs()) <= 8
    # What the two are differences of.
    size = 1 + exact_log_p.abs() + exact_log_det.abs() + exact_u.square() / 2
    assert largest(log_p, exact_log_p, size) <= 8
    assert largest(log_det, exact_log_det, size) <= 8


@pytest.mark.parametrize("shared", [(), (1, 2), (0,)])
@pytest.mark.parametrize("components", COMPONENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_scalar_mixtures(dtype, components, shared):
    _, z, _, params = scalar_case(components, dtype, shared)
    g = torch.Generator().manual_seed(1)
    grad_u, grad_log_p = torch.randn(2, ROWS, generator=g, dtype=torch.float64).to(dtype)
    wide_z, *wide = double(z, *params)
    wide_u, wide_log_det = reference.mixture_cdf(wide_z, *wide)
    bound = 1e-4 if dtype == torch.float32 else 1e-12
    assert_gradients(
        cpu.mixture_backward(z, *params, grad_log_p),
        reference.mixture_backward(wide_z, *wide, grad_log_p.double()),
        bound,
    )
    # Those of u are differences of terms that are u^2 times larger.
    assert_gradients(
        cpu.mixture_backward(z, *params, grad_log_p, *cpu.mixture_cdf(z, *params), grad_u),
        reference.mixture_backward(
            wide_z, *wide, grad_log_p.double(), wide_u, wide_log_det, grad_u.double()
        ),
        2e-4 if dtype == torch.float32 else 1e-10,
    )


def assert_gradients(found, expected, bound):
    """Relative to the largest of a row, or to the sum of sizes where a shared parameter sums over
    rows.
    """
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            size, other = other.abs().sum(0) + 1, other.sum(0)
        else:
            size = 1 + (other.abs().amax(-1, keepdim=True) if other.ndim == 2 else other.abs())
        assert ((one - other).abs() / size).max() <= bound


@pytest.mark.parametrize("components", COMPONENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_solvers(dtype, components, request):
    """In noise, and beyond what an ulp of z is worth: where F is flat, many z are right."""
    u, _, exact, params = scalar_case(components, dtype)
    slope = reference.mixture_cdf(exact, *double(*params))[1].exp()
    found = {"many": cpu.by_bisection(u, *params)}
    if dtype == torch.float32 and compiled.is_installed():
        request.getfixturevalue("compiled_steps")
        from tarflowlm.compiled.invert import invert_mixtures

        z = torch.from_numpy(invert_mixtures(*(x.contiguous().numpy() for x in (u, *params))))
        assert z.isfinite().double().mean() > 0.99
        found["one by one"] = torch.where(z.isfinite(), z, found["many"])
    eps = torch.finfo(dtype).eps
    for solver, z in found.items():
        error = ((z - exact).abs() - 2 * eps * exact.abs()).clamp(min=0) * slope
        assert (error / (1 + u.abs())).max() <= 8 * eps, solver


SHAPES = [(500, 1, 3), (500, 5, 3), (300, 27, 8), (60, 400, 16)]


def codebook(shape, dtype):
    """A third of the rows far out: u up to 40 with few components, 20 with many."""
    z, log_w, mean, log_std = codebook_case(*shape, seed=4, dtype=dtype)
    z[::3] *= 12
    return z, log_w, mean, log_std


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rosenblatt(dtype, shape):
    case = codebook(shape, dtype)
    u, log_det = rosenblatt(*case)
    exact_u, exact_log_det = reference.rosenblatt(*double(*case))
    assert exact_u.abs().max() > 20
    assert largest(u, exact_u, 1 + exact_u.abs()) <= 200
    assert (
        largest(log_det, exact_log_det, 1 + exact_log_det.abs() + exact_u.square().sum(-1) / 2)
        <= 16
    )


@pytest.mark.slow
@pytest.mark.parametrize("sharper", [0.0, 4.0], ids=["overlapping", "certain components"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rosenblatt_inverse(dtype, shape, sharper):
    noise, log_w, mean, log_std = codebook_case(*shape, seed=4, dtype=dtype)
    noise[0] = torch.linspace(-9, 9, shape[-1], dtype=dtype)
    book = log_w, mean, log_std - sharper
    exact = reference.rosenblatt_inverse(*double(noise, *book))
    assert (cpu.rosenblatt_inverse(noise, *book) - exact).abs().max() <= BOUND[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_rosenblatt(dtype, shape, monkeypatch):
    leaves = [t.requires_grad_() for t in codebook(shape, dtype)]
    found = torch.autograd.grad([t.sum() for t in rosenblatt(*leaves)], leaves)
    monkeypatch.setattr(flow, "is_eager_cpu", lambda t: False)
    leaves = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(
        [t.sum() for t in reference.rosenblatt(*leaves, mixture_cdf)], leaves
    )
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= BOUND[dtype] * (1 + other.abs().max())


@pytest.mark.parametrize("components", [1, 27, 3000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mixture_of_a_vocabulary(dtype, components):
    case = codebook_case(60, components, 5, components, dtype)
    z, log_w, *book = double(*case)
    exact = torch.logsumexp(torch.log_softmax(log_w, -1) + log_component_densities(z, *book), -1)
    assert largest(mixture_log_prob(*case), exact, 1 + exact.abs()) <= 4
