"""rosenblatt, rosenblatt_inverse."""

import math

import pytest
import torch
from numerics_cases import codebook_case

from tarflowlm.flow.numerics import mixture_cdf, mixture_log_prob, rosenblatt, rosenblatt_inverse


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


def test_log_det_and_triangle_of_the_autograd_jacobian():
    z, log_w, mean, log_std = codebook_case(3, 6, 4, 2)
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda x, row=row: rosenblatt(x[None], log_w[row : row + 1], mean, log_std)[0][0], z[row]
        )
        assert jacobian.triu(1).abs().max() == 0
        _, log_det = rosenblatt(z[row], log_w[row], mean, log_std)
        torch.testing.assert_close(log_det, jacobian.diagonal().log().sum())


@pytest.mark.parametrize("components", [3, 21])
@pytest.mark.parametrize("path", ["linear", "log"])
def test_gradients(path, components, monkeypatch):
    if path == "log":
        for module in ("forward", "inverse", "gradients", "rosenblatt_map"):
            monkeypatch.setattr(f"tarflowlm.flow.numerics.{module}.use_eager_cpu", lambda t: False)
    inputs = [t.requires_grad_() for t in codebook_case(2, components, 3, 3)]
    assert torch.autograd.gradcheck(rosenblatt, inputs)
    assert torch.autograd.gradcheck(rosenblatt_inverse, inputs)


def test_chunks_change_nothing(monkeypatch):
    inputs = [t.requires_grad_() for t in codebook_case(100, 7, 3, 4)]
    results = []
    for elements in (64, 65_536):
        monkeypatch.setattr("tarflowlm.flow.numerics.layout.CHUNK_ELEMENTS", elements)
        u, log_det = rosenblatt(*inputs)
        grads = torch.autograd.grad((u.square().sum(), log_det.sum()), inputs)
        with torch.no_grad():
            results.append((u, log_det, rosenblatt_inverse(*inputs), *grads))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_far_channels_and_tiny_scales():
    """A vector 25 sigma from everything, and one a few sigma from a component of scale 1e-3, in float32."""
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


def test_two_channels_integrate_to_one():
    _, log_w, mean, log_std = codebook_case(1, 4, 2, 6)
    axis = torch.linspace(-12, 12, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    u, log_det = rosenblatt(grid, log_w, mean, log_std)
    density = (log_det + standard_normal(u)).exp().view(401, 401)
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


def test_vmap_over_vectors():
    z, log_w, mean, log_std = codebook_case(6, 5, 3, 8)
    batched = torch.func.vmap(rosenblatt, in_dims=(0, 0, None, None))(z, log_w, mean, log_std)
    torch.testing.assert_close(batched, rosenblatt(z, log_w, mean, log_std))
    back = torch.func.vmap(rosenblatt_inverse, in_dims=(0, 0, None, None))(z, log_w, mean, log_std)
    torch.testing.assert_close(back, rosenblatt_inverse(z, log_w, mean, log_std))


def test_errors_name_the_shapes():
    z, log_w, mean, log_std = codebook_case(2, 5, 3, 9)
    with pytest.raises(ValueError, match=r"\(5, 3\)"):
        rosenblatt(z[:, :2], log_w, mean, log_std)
    with pytest.raises(ValueError, match="4 components"):
        rosenblatt_inverse(z, log_w[:, :4], mean, log_std)
