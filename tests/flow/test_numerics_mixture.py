"""mixture_cdf, mixture_cdf_inverse, mixture_log_density."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics_cases import nasty_mixtures, wide_noise

from tarflowlm import chunks
from tarflowlm.flow.numerics import (
    cpu,
    log_standard_normal,
    mixture_cdf,
    mixture_cdf_inverse,
    mixture_log_density,
    reference,
)
from tarflowlm.flow.numerics.normal import log_upper_tail

# z, [(log_w, mean, log_std), ...]: bulk, gap between narrow modes, far tails, tiny weights, a broad
# rare component.
HARD_CASES = [
    (0.3, [(0.0, 0.0, 0.0)]),
    (0.0, [(0.0, -10.0, -3.0), (0.0, 10.0, -3.0)]),
    (12.0, [(0.0, 0.0, 0.0), (-12.0, 1.0, 0.5)]),
    (-29.0, [(0.0, 0.0, 0.0), (-1.0, 0.5, -1.0)]),
    (36.9, [(0.0, 0.0, 0.0), (-3.0, -1.0, -0.2)]),
    (60.0, [(0.0, 0.0, 0.0), (-2.0, 0.0, 0.1)]),
    (-7.5, [(0.0, 0.0, -6.0), (-12.0, 0.0, 0.0)]),
    (1.0025, [(0.0, 1.0, -6.0), (-5.0, -100.0, 2.0)]),
    (-140.0, [(0.0, 3.0, 1.5), (-11.0, 4.0, 2.0), (0.0, -2.0, -6.0)]),
    (5.0, [(700.0, 0.0, 0.0), (699.0, 1.0, -0.5)]),
]


def exact(z, components):
    """(u, log_det, log p) at 50 digits; z and parameters are what the float type made of them."""
    with mpmath.workdps(50):
        weights = [mpmath.exp(mpmath.mpf(w)) for w, _, _ in components]
        lower = upper = density = mpmath.mpf(0)
        for w, (_, m, ls) in zip(weights, components, strict=True):
            s = mpmath.exp(mpmath.mpf(ls))
            a = (mpmath.mpf(z) - mpmath.mpf(m)) / s
            w = w / sum(weights)
            lower += w * mpmath.erfc(-a / mpmath.sqrt(2)) / 2
            upper += w * mpmath.erfc(a / mpmath.sqrt(2)) / 2
            density += w * mpmath.npdf(a) / s
        tail, sign = (upper, 1) if upper < lower else (lower, -1)
        log_tail, log_p = mpmath.log(tail), mpmath.log(density)
        guess = mpmath.sqrt(max(0, -2 * log_tail - mpmath.log(max(1, -4 * mpmath.pi * log_tail))))
        u = mpmath.findroot(
            lambda x: mpmath.log(mpmath.erfc(x / mpmath.sqrt(2)) / 2) - log_tail, guess
        )
        log_base = -u * u / 2 - mpmath.log(2 * mpmath.pi) / 2
        return float(sign * u), float(log_p - log_base), float(log_p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", range(len(HARD_CASES)))
def test_against_fifty_digits(case, dtype, path):
    z, components = HARD_CASES[case]
    z_t = torch.tensor(z, dtype=dtype)
    log_w, mean, log_std = torch.tensor(components, dtype=dtype).T
    u, log_det = mixture_cdf(z_t, log_w, mean, log_std)
    log_p = mixture_log_density(z_t, log_w, mean, log_std)
    stored = list(zip(log_w.tolist(), mean.tolist(), log_std.tolist(), strict=True))
    exact_u, exact_log_det, exact_log_p = exact(z_t.item(), stored)
    eps = torch.finfo(dtype).eps
    assert abs(u.item() - exact_u) <= 8 * eps * (1 + abs(exact_u))
    # log_det and log p are differences of terms of this size, and exp(-log_std) is itself rounded.
    size = 1 + abs(exact_log_p) + abs(exact_log_det) + exact_u**2 / 2
    assert abs(log_p.item() - exact_log_p) <= 8 * eps * size
    assert abs(log_det.item() - exact_log_det) <= 8 * eps * size


@pytest.mark.parametrize("components", [1, 2, 8, 27])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_of_nasty_mixtures(dtype, components):
    rows = 3000
    params = nasty_mixtures(rows, components, components, dtype)
    u = wide_noise(rows, components, dtype)
    z = mixture_cdf_inverse(u, *params)
    wide = [p.double() for p in params]
    back = mixture_cdf(z.double(), *wide)[0]
    neighbours = [mixture_cdf(torch.nextafter(z, z + s).double(), *wide)[0] for s in (-1, 1)]
    ulp = torch.stack([(n - back).abs() for n in neighbours]).amax(0)
    error = ((back - u).abs() - ulp).clamp(min=0)
    bounds = {torch.float32: (1e-6, 1e-5), torch.float64: (1e-14, 1e-11)}[dtype]
    assert error.median() <= bounds[0]
    assert error.max() <= bounds[1]


@pytest.mark.parametrize("scale", [1.0, 25.0])
def test_gradients(scale, path):
    g = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(2, generator=g, dtype=torch.float64)).requires_grad_()
    params = [
        torch.randn(2, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)
    ]
    log_std = (0.3 * torch.randn(3, generator=g, dtype=torch.float64)).requires_grad_()
    inputs = (x, *params, log_std)
    assert torch.autograd.gradcheck(mixture_cdf, inputs)
    assert torch.autograd.gradcheck(mixture_log_density, inputs)
    u = torch.tensor([-4.0, 1.3], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(mixture_cdf_inverse, (u, *inputs[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_in_the_far_tail_are_those_of_the_logarithms(dtype):
    """From autograd: log p itself, and u by way of its log tail, du = -+ d log Q / hazard."""
    params = [p.requires_grad_() for p in nasty_mixtures(300, 5, 9, dtype)]
    z = mixture_cdf_inverse(
        wide_noise(300, 9, dtype), *(p.detach() for p in params)
    ).requires_grad_()
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(2, 300, generator=g).to(dtype)
    ours = torch.autograd.grad(mixture_cdf(z, *params), (z, *params), tuple(weights))
    wide = [t.detach().double().requires_grad_() for t in (z, *params)]
    u = mixture_cdf(*wide)[0].detach()
    log_w, mean, log_std = wide[1:]
    a = (wide[0][:, None] - mean) * torch.exp(-log_std)
    log_w = torch.log_softmax(log_w, -1)
    log_p = torch.logsumexp(log_w + log_standard_normal(a) - log_std, -1)
    log_tail = torch.logsumexp(log_w + log_upper_tail(a * u.sign()[:, None]), -1)
    hazard = torch.exp(log_standard_normal(u) - log_upper_tail(u.abs()))
    noise = -u.sign() * log_tail / hazard
    expected = torch.autograd.grad((noise, log_p), wide, (weights[0] + weights[1] * u, weights[1]))
    for one, other in zip(ours, expected, strict=True):
        scale = other.abs().amax(-1, keepdim=True) if other.ndim == 2 else other.abs()
        assert ((one - other).abs() / (scale + 1)).max() < (
            2e-4 if dtype == torch.float32 else 1e-9
        )


@pytest.mark.parametrize("of", [0, 1], ids=["u", "log-det"])
def test_gradients_of_weights_keep_their_precision_in_float32(of):
    z = torch.tensor([1e3, -3e3, 1e4, -1e5])
    found = []
    for dtype in (torch.float32, torch.float64):
        log_w = torch.tensor([[0.0, 0.5]], dtype=dtype).repeat(4, 1).requires_grad_()
        params = torch.tensor([0.0, 1.0], dtype=dtype), torch.tensor([0.3, 0.2], dtype=dtype)
        value = mixture_cdf(z.to(dtype), log_w, *params)[of].sum()
        found.append(torch.autograd.grad(value, log_w)[0].double())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    data=st.lists(
        st.tuples(st.floats(-12, 0), st.floats(-50, 50), st.floats(-6, 2)), min_size=1, max_size=5
    ),
    points=st.lists(st.floats(-200, 200), min_size=2, max_size=8),
)
def test_monotone_and_symmetric(data, points):
    log_w, mean, log_std = torch.tensor(data, dtype=torch.float64).T
    z = torch.tensor(sorted(points), dtype=torch.float64)
    u, log_det = mixture_cdf(z, log_w, mean, log_std)
    assert (u.diff() >= -1e-13 * (1 + u[1:].abs())).all()
    mirrored, mirrored_det = mixture_cdf(-z, log_w, -mean, log_std)
    torch.testing.assert_close(mirrored, -u, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mirrored_det, log_det, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    data=st.lists(
        st.tuples(st.floats(-12, 0), st.floats(-50, 50), st.floats(-6, 2)), min_size=1, max_size=5
    ),
    noise=st.lists(st.floats(-37, 37), min_size=1, max_size=6),
)
def test_the_inverse_has_no_residual(data, noise):
    """Beyond what one ulp of z is worth."""
    log_w, mean, log_std = torch.tensor(data, dtype=torch.float64).T
    u = torch.tensor(noise, dtype=torch.float64)
    z = mixture_cdf_inverse(u, log_w, mean, log_std)
    assert torch.isfinite(z).all()
    back, log_det = mixture_cdf(z, log_w, mean, log_std)
    ulp = torch.finfo(z.dtype).eps * (z.abs() * torch.exp(log_det) + u.abs())
    assert ((back - u).abs() - ulp).max() <= 1e-9


@pytest.mark.parametrize("u", [0.0, 1e-215, -1e-215])
def test_the_inverse_next_to_the_only_mean(u):
    """Where F cannot tell u from 0."""
    params = torch.zeros(3, 1, 2, dtype=torch.float64)
    assert reference.mixture_cdf_inverse(torch.tensor([u]).double(), *params).abs() <= 1e-200


def test_the_reference_keeps_not_a_number():
    for where in range(4):
        inputs = torch.tensor([0.5, 0.5]).double(), *torch.zeros(3, 2, 2).double()
        inputs[where].view(2, -1)[1, 0] = math.nan
        assert reference.mixture_cdf_inverse(*inputs).isnan().tolist() == [False, True]


def test_log_det_is_the_autograd_one():
    params = nasty_mixtures(50, 4, 2, torch.float64)
    z = mixture_cdf_inverse(wide_noise(50, 2, torch.float64, 12.0), *params).requires_grad_()
    u, log_det = mixture_cdf(z, *params)
    (slope,) = torch.autograd.grad(u.sum(), z)
    torch.testing.assert_close(log_det, slope.log())


def test_density_integrates_to_one_and_is_that_of_the_map():
    log_w, mean, log_std = torch.tensor(
        [[0.0, -2.0, -1.0], [-1.0, 1.5, 0.0]], dtype=torch.float64
    ).T
    z = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    log_p = mixture_log_density(z, log_w, mean, log_std)
    assert abs(torch.trapezoid(log_p.exp(), z).item() - 1) < 1e-9
    u, log_det = mixture_cdf(z, log_w, mean, log_std)
    torch.testing.assert_close(log_det + log_standard_normal(u), log_p, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("rows", [3, 30, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_and_infinity(dtype, rows):
    params = [p.to(dtype) for p in nasty_mixtures(rows, 4, 0, torch.float64)]
    special = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype).repeat(rows // 3)
    for result in (*mixture_cdf(special, *params), mixture_cdf_inverse(special, *params)):
        assert result[::3].isnan().all()
    u, log_det = mixture_cdf(special, *params)
    for result in (u, mixture_cdf_inverse(special, *params)):
        assert torch.equal(result.view(-1, 3)[:, 1:], special.view(-1, 3)[:, 1:])
    assert log_det.isnan().sum() == rows // 3
    for bad in range(3):
        broken = [p.clone() for p in params]
        broken[bad][1, 2] = math.nan
        z = torch.zeros(rows, dtype=dtype)
        for result in (
            *mixture_cdf(z, *broken),
            mixture_cdf_inverse(z, *broken),
            mixture_log_density(z, *broken),
        ):
            assert result.isnan().nonzero().tolist() == [[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_is_finite_where_a_newton_step_is_not(dtype):
    """Weights that differ by e^(10^11), met only in untrained models. The bracket holds, whatever
    the steps leave.
    """
    log_w = torch.tensor([-46524387328.0, 30265151488.0, -33934106624.0], dtype=dtype)
    mean = torch.tensor([-3570401.5, 2932709.75, 6345151.0], dtype=dtype)
    log_std = torch.tensor([12.0, -12.0, -12.0], dtype=dtype)
    u = torch.tensor([-319355.84375, 319355.84375, -2e5], dtype=dtype)
    z = mixture_cdf_inverse(u, log_w, mean, log_std)
    ends = mean + log_std.exp() * u[:, None]
    assert (z >= ends.amin(-1)).all()
    assert (z <= ends.amax(-1)).all()


def test_rows_do_not_depend_on_the_chunk_they_are_in(monkeypatch):
    """Where F is flat, many z are right, and how many halvings a chunk takes decides between them:
    there the difference is measured in noise.
    """
    params = nasty_mixtures(5000, 3, 6, torch.float32)
    u = wide_noise(5000, 6, torch.float32)
    found, mapped = [], []
    for elements in (512, 65_536):
        monkeypatch.setattr(chunks, "CACHED", elements)
        found.append(mixture_cdf_inverse(u, *params))
        mapped.append(mixture_cdf(found[0], *params))
    torch.testing.assert_close(*mapped, rtol=1e-6, atol=1e-6)
    one, other = found
    difference = (one - other).abs() * torch.exp(mapped[0][1]).clamp(max=1)
    assert (difference / (1 + one.abs())).max() <= 1e-6


def in_rows_of(num):
    """The CPU's inverse, `num` rows at a time: one by one, or together."""

    def inverse(u, *params):
        rows = zip(u.split(num), *(p.split(num) for p in params), strict=True)
        return torch.cat([cpu.mixture_cdf_inverse(*row) for row in rows])

    return inverse


@pytest.mark.parametrize("components", [1, 2, 8, 40])
@pytest.mark.parametrize(
    ("inverse", "rows"),
    [
        (reference.mixture_cdf_inverse, 500),
        (cpu.by_bisection, 500),
        (in_rows_of(1), 100),
        (in_rows_of(100), 500),
    ],
    ids=["reference", "many rows", "one row", "few rows"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_finds_scales_of_e_12_and_their_inverses(dtype, inverse, rows, components):
    """All that the head of an untrained model can ask for, narrow components inside wide ones:
    u lies between the noise of z - 2 ulps and of z + 2 ulps.
    """
    g = torch.Generator().manual_seed(components)
    draw = torch.rand(4, 500, components, generator=g, dtype=torch.float64)
    log_std = 24 * draw[0] - 12
    wider = torch.exp(torch.maximum(log_std, log_std.roll(1, -1)))
    mean = torch.cumsum(20 * wider * draw[1], -1)
    mean[::2] = 6 * draw[2, ::2] - 3
    mean[::7] = 0.0
    params = [p[:rows].to(dtype) for p in (-12 * draw[3], mean, log_std)]
    u = wide_noise(500, components, dtype)[:rows]
    z = inverse(u, *params).double()
    ulps = 2 * torch.finfo(dtype).eps * z.abs()
    low, high = (
        reference.mixture_cdf(x, *(p.double() for p in params))[0] for x in (z - ulps, z + ulps)
    )
    error = torch.maximum(low - u, u - high) / (1 + u.abs())
    assert error.max() <= 8 * torch.finfo(dtype).eps


def test_broadcasting():
    log_w, mean, log_std = nasty_mixtures(6, 4, 1, torch.float64)
    z = torch.linspace(-3, 3, 30, dtype=torch.float64).view(5, 6)
    whole = mixture_cdf(z, log_w, mean, log_std[0])
    rows = [mixture_cdf(z[i], log_w, mean, log_std[0].expand(6, 4)) for i in range(5)]
    torch.testing.assert_close(whole, tuple(torch.stack(t) for t in zip(*rows, strict=True)))


def test_second_derivatives_are_refused_and_errors_name_the_value():
    z = torch.zeros(2, requires_grad=True)
    params = nasty_mixtures(2, 3, 1, torch.float32)
    total = mixture_cdf(z, *params)[0].sum()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(total, z, create_graph=True)
    # torch.func always asks for more
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.grad(lambda z: mixture_cdf(z, *params)[0].sum())(z.detach())
    with pytest.raises(ValueError, match="float64"):
        mixture_cdf(z.double(), *params)
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        mixture_cdf(z, params[0], params[1], torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\[0, 3\]"):
        mixture_cdf(z, params[0], params[1], torch.zeros(()))


@pytest.mark.slow
def test_the_log_tail_against_fifty_digits():
    a = torch.cat(
        [torch.linspace(-40, 40, 161, dtype=torch.float64), torch.tensor([1.0, 1e3, 1e6])]
    )
    with mpmath.workdps(450):  # the lower tail is 1 - 1e-350
        tails = [
            float(mpmath.log(mpmath.erfc(mpmath.mpf(x) / mpmath.sqrt(2)) / 2)) for x in a.tolist()
        ]
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(a.to(dtype).double(), a)
        for x, found, exact in zip(
            a.tolist(), log_upper_tail(a.to(dtype)).tolist(), tails, strict=True
        ):
            # an ulp of x alone is worth x^2 ulps of a small tail
            assert (
                abs(found - exact) <= 4 * torch.finfo(dtype).eps * (1 + x * x) * abs(exact) + 1e-44
            )
    ends = log_upper_tail(torch.tensor([math.inf, -math.inf, math.nan]))
    assert torch.equal(ends[:2], torch.tensor([-math.inf, 0.0]))
    assert ends[2].isnan()
