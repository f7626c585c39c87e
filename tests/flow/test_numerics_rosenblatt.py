"""rosenblatt, rosenblatt_inverse."""

import math

import pytest
import torch
from numerics_cases import codebook_case
from torch.autograd.functional import jacobian

from tarflowlm import chunks, flow
from tarflowlm.flow.numerics import (
    mixture_cdf,
    mixture_log_prob,
    reference,
    rosenblatt,
    rosenblatt_inverse,
)


def standard_normal(u):
    return -0.5 * (u * u).sum(-1) - 0.5 * u.shape[-1] * math.log(2 * math.pi)


@pytest.mark.parametrize("components", [1, 5, 27, 64])
def test_one_channel_is_the_mixture_cdf(components):
    z, log_w, mean, log_std = codebook_case(40, components, 1, 0)
    z = 20 * z
    u, log_det = rosenblatt(z, log_w, mean, log_std)
    one, one_det = mixture_cdf(z[:, 0], log_w, mean[:, 0], log_std)
    torch.testing.assert_close(u[:, 0], one, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det, one_det, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("shape", [(2000, 5, 3), (300, 27, 5), (40, 400, 16), (1, 27, 5)])
def test_round_trip(shape, dtype, bound):
    u, log_w, mean, log_std = codebook_case(*shape, seed=1, dtype=dtype)
    u[0] = torch.linspace(-9, 9, shape[-1], dtype=dtype)
    z = rosenblatt_inverse(u, log_w, mean, log_std)
    back, log_det = rosenblatt(z, log_w, mean, log_std)
    assert (back - u).abs().max() <= bound
    expected = mixture_log_prob(z, log_w, mean, log_std) - standard_normal(u)
    torch.testing.assert_close(log_det, expected, rtol=10 * bound, atol=10 * bound)


def plain(z, log_w, mean, log_std):
    """Eq. 9 of docs/math.md as it is written, in linear space."""
    alpha, std, channels, log_p = torch.softmax(log_w, -1), log_std.exp(), [], 0.0
    for i in range(z.shape[-1]):
        a = (z[:, i, None] - mean[:, i]) / std
        channels.append(torch.special.ndtri((alpha * torch.special.ndtr(a)).sum(-1)))
        alpha = alpha * torch.exp(-0.5 * a * a) / std / math.sqrt(2 * math.pi)
        p = alpha.sum(-1, keepdim=True)
        alpha, log_p = alpha / p, log_p + p.log().squeeze(-1)
    u = torch.stack(channels, -1)
    return u, log_p - standard_normal(u)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("elements", [2**26, 700], ids=["one chunk", "many chunks"])
def test_the_formula_itself(path, elements, dtype, bound, monkeypatch):
    case = codebook_case(100, 40, 5, 11, dtype)
    expected = plain(*(t.double() for t in case))
    monkeypatch.setattr(chunks, "HELD_ACCELERATOR", elements)
    monkeypatch.setattr(chunks, "CACHED", elements)
    u, log_det = rosenblatt(*case)
    torch.testing.assert_close(u.double(), expected[0], rtol=bound, atol=bound)
    torch.testing.assert_close(log_det.double(), expected[1], rtol=10 * bound, atol=10 * bound)
    back = rosenblatt_inverse(u, *case[1:])
    torch.testing.assert_close(back, case[0], rtol=10 * bound, atol=10 * bound)
    inputs = [t.clone().requires_grad_() for t in case]
    wide = [t.double().requires_grad_() for t in case]
    found, exact = (
        torch.autograd.grad((u.square().sum(), log_det.sum()), leaves)
        for leaves, (u, log_det) in ((inputs, rosenblatt(*inputs)), (wide, plain(*wide)))
    )
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=100 * bound, atol=100 * bound)


def test_a_map_redone_with_other_weights_is_triangular_and_has_their_density():
    """Eq. 12b of docs/math.md, where both weights are functions of the z before."""
    z, weights, mean, log_std = codebook_case(3, 4, 2, 0)
    others = weights.roll(1, 0)

    def law(z, weights):
        return torch.nn.functional.pad(z, (0, 0, 1, 0))[:-1].cumsum(0) @ weights[:2] + weights[2]

    def noise(z, weights):
        return rosenblatt(z.view(3, 2), law(z.view(3, 2), weights), mean, log_std)[0].flatten()

    first, both = (jacobian(lambda z, w=w: noise(z, w), z.flatten()) for w in (weights, others))
    by_noise = both @ first.inverse()
    assert by_noise.triu(1).abs().max() < 1e-9
    found = torch.linalg.slogdet(both).logabsdet
    found = found + standard_normal(noise(z, others))
    expected = mixture_log_prob(z, law(z, others), mean, log_std).sum()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_far_tails_in_log_space(monkeypatch):
    """Both tails, the middle where either side may be chosen, and infinities: as the CPU's path has
    them.
    """
    z, log_w, mean, log_std = codebook_case(60, 6, 1, 12)
    z[:40, 0] = torch.linspace(-40, 40, 40, dtype=torch.float64)
    z[58:, 0] = torch.tensor([-math.inf, math.inf])
    expected = rosenblatt(z, log_w, mean, log_std)[0]
    monkeypatch.setattr(flow, "is_eager_cpu", lambda t: False)
    torch.testing.assert_close(
        rosenblatt(z, log_w, mean, log_std)[0], expected, rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("spread", [0.0, 0.4, 3.0])
def test_a_vocabulary_in_one_sweep(spread, path, dtype, bound):
    """Sharp codes, of which few are left after some channels, against all of them in log space;
    equal scales, learnt ones, and some too far apart. Rows: at a code, between two codes, and far
    out.
    """
    z, log_w, mean, log_std = codebook_case(60, 500, 12, 3)
    log_std = spread / 0.4 * (log_std + 0.7) - 2.5
    z[:40] = mean[:40] + log_std[:40, None].exp() * z[:40]
    z[40:50] = 0.5 * (mean[:10] + mean[10:20])
    log_w[::2] *= 6.0
    case = [t.to(dtype) for t in (z, log_w, mean, log_std)]
    exact, exact_det = reference.rosenblatt(*(t.double() for t in case))
    u, log_det = rosenblatt(*case)
    for found, expected in ((u, exact), (log_det, exact_det)):
        torch.testing.assert_close(found.double(), expected, rtol=bound, atol=10 * bound)


def test_log_det_and_triangle_of_the_autograd_jacobian():
    z, log_w, mean, log_std = codebook_case(3, 6, 4, 2)
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda x, row=row: rosenblatt(x[None], log_w[row : row + 1], mean, log_std)[0][0],
            z[row],
        )
        assert jacobian.triu(1).abs().max() == 0
        _, log_det = rosenblatt(z[row], log_w[row], mean, log_std)
        torch.testing.assert_close(log_det, jacobian.diagonal().log().sum())


@pytest.mark.slow
@pytest.mark.parametrize("components", [3, pytest.param(21, marks=pytest.mark.nightly)])
def test_gradients(path, components):
    inputs = [t.requires_grad_() for t in codebook_case(2, components, 3, 3)]
    assert torch.autograd.gradcheck(rosenblatt, inputs)
    assert torch.autograd.gradcheck(rosenblatt_inverse, inputs)


def test_far_channels_and_tiny_scales():
    """A vector 25 sigma from everything, and one a few sigma from a component of scale 1e-3, in
    float32.
    """
    z, log_w, mean, _ = codebook_case(2, 6, 4, 5)
    log_std = torch.full((6,), math.log(1e-3), dtype=torch.float64)
    log_std[5] = 0.0
    z[0] = mean[5] + 25.0
    z[1] = mean[2] + 2e-3
    single = [t.float() for t in (z, log_w, mean, log_std)]
    exact = rosenblatt(*(t.double() for t in single))
    u, log_det = rosenblatt(*single)
    assert exact[0].abs().max() > 20
    torch.testing.assert_close(u.double(), exact[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(log_det.double(), exact[1], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rows", [20, 1000])
def test_sharp_codes_in_the_far_tails(rows, dtype, bound):
    """Up to 30 sigma between codes a hundred sigma apart: components of the smallest weight own the
    tails.
    """
    _, log_w, mean, log_std = codebook_case(rows, 27, 6, 3)
    random = torch.Generator().manual_seed(4)
    u = 60 * torch.rand(rows, 6, generator=random, dtype=torch.float64) - 30
    single = [t.to(dtype) for t in (u, log_w, mean, 0.02 * log_std - 4.0)]
    z = rosenblatt_inverse(*single)
    exact, exact_det = reference.rosenblatt(*(t.double() for t in (z, *single[1:])))
    assert (exact - single[0].double()).abs().max() < bound
    back, log_det = rosenblatt(z, *single[1:])
    assert (back.double() - exact).abs().max() < bound
    torch.testing.assert_close(log_det.double(), exact_det, rtol=bound, atol=bound)


def test_two_channels_integrate_to_one():
    _, log_w, mean, log_std = codebook_case(1, 4, 2, 6)
    axis = torch.linspace(-12, 12, 241, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    u, log_det = rosenblatt(grid, log_w, mean, log_std)
    density = (log_det + standard_normal(u)).exp().view(241, 241)
    assert abs(torch.trapezoid(torch.trapezoid(density, axis), axis).item() - 1) < 1e-6


def test_nan_stays_in_its_row_and_leading_shapes_are_free():
    z, log_w, mean, log_std = codebook_case(6, 5, 3, 7)
    z[2, 1] = math.nan
    u, log_det = rosenblatt(z.view(2, 3, 3), log_w.view(2, 3, 5), mean, log_std)
    assert u.shape == (2, 3, 3)
    assert log_det.flatten().isnan().tolist() == [i == 2 for i in range(6)]
    back = rosenblatt_inverse(u, log_w.view(2, 3, 5), mean, log_std)
    assert back.isnan().any(-1).flatten().tolist() == [i == 2 for i in range(6)]
    torch.testing.assert_close(back[0, 0], z[0])


@pytest.mark.parametrize("rows", [(), (0,)])
def test_no_rows(rows):
    _, log_w, mean, log_std = codebook_case(1, 5, 3, 7)
    u = torch.empty(0, 3, dtype=mean.dtype)
    assert rosenblatt_inverse(u, log_w[0].expand(*rows, 5), mean, log_std).shape == (0, 3)
