"""The compiled inverses of mixtures, against `reference` in float64: sharp, overlapping and hard
codebooks.
"""

import math

import pytest
import torch
from numerics_cases import codebook_case
from torch import Tensor

from tarflowlm.flow.numerics import cpu, reference, rosenblatt, rosenblatt_inverse

pytest.importorskip("numba")
pytestmark = pytest.mark.usefixtures("compiled_steps")

BOUND = 2e-4


def compiled_inverse(u: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
    """z, and which rows were left out; these are inverted by the general path."""
    from tarflowlm.compiled.invert import invert_vectors

    z = torch.from_numpy(invert_vectors(*(x.contiguous().numpy() for x in (u, *params))))
    left = z.isnan().any(1)
    z[left] = cpu.by_channels(u, *params)[left]
    return z, left


def case(components, d, seed):
    """u, log_w, mean, log_std: scales from 1e-4 to 3 where the seed is odd, all sharp where it is a
    multiple of four.

    Weights down to e^-12, some of them zero as top-k leaves them, and ordinary noise with three
    rows far out.
    """
    u, log_w, mean, log_std = codebook_case(24, components, d, seed, torch.float64)
    g = torch.Generator().manual_seed(seed + 100)
    if seed % 2:
        log_std = torch.rand(components, generator=g, dtype=torch.float64) * 10 - 9
    elif seed % 4 == 0:
        log_std = log_std - 3.0
    log_w = log_w * 4
    log_w[::3, components // 2 + 1 :] = torch.finfo(torch.float32).min
    u[0] = torch.linspace(-8, 8, d, dtype=torch.float64)
    u[1] = torch.linspace(-900, 45, d, dtype=torch.float64)
    u[2] = torch.linspace(30, -45, d, dtype=torch.float64)
    return [t.float() for t in (u, log_w, mean, log_std)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(1, 3), (2, 4), (27, 1), (27, 8), (90, 16)])
def test_maps_back_to_the_noise(shape, seed):
    """As well as the general path does it: what an ulp of z is worth depends on the scales."""
    u, *params = case(*shape, seed)
    general = cpu.by_channels(u, *params)
    z, _ = compiled_inverse(u, *params)
    error, usual = (
        ((rosenblatt(found, *params)[0] - u).abs() / (1 + u.abs())) for found in (z, general)
    )
    for rows in (slice(3), slice(3, None)):
        assert error[rows].max() <= 1.1 * usual[rows].max() + 8 * torch.finfo().eps
    assert error[3:].max() <= 2 * BOUND


@pytest.mark.parametrize("where", range(4))
def test_not_a_number_and_infinity(where):
    """As the general path has them, and the other rows as if they were not there."""
    expected = cpu.by_channels(*case(5, 3, 2))
    for value in (math.nan, math.inf):
        inputs = case(5, 3, 2)
        inputs[where].view(-1)[3] = value
        z = rosenblatt_inverse(*inputs)
        torch.testing.assert_close(
            z, cpu.by_channels(*inputs), rtol=1e-5, atol=1e-5, equal_nan=True
        )
        if where < 2:
            torch.testing.assert_close(z[2:], expected[2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sharper", [0.0, 2.0, 4.0])
@pytest.mark.parametrize("shape", [(1, 3), (5, 3), (27, 8), (90, 16)])
def test_equals_the_reference_in_latents(shape, sharper):
    u, log_w, mean, log_std = codebook_case(24, *shape, seed=4, dtype=torch.float32)
    u[0] = torch.linspace(-6, 6, shape[1])
    book = log_w, mean, log_std - sharper
    exact = reference.rosenblatt_inverse(*(t.double() for t in (u, *book)))
    z, left = compiled_inverse(u, *book)
    assert not left[1:].any()
    assert (z - exact).abs().max() <= BOUND


def test_a_row_does_not_depend_on_the_others():
    """To the last bit, as long as all of them are solved here."""
    u, log_w, *book = case(27, 8, 4)
    together = rosenblatt_inverse(u, log_w, *book)[3:]
    alone = torch.cat(
        [rosenblatt_inverse(u[i : i + 1], log_w[i : i + 1], *book) for i in range(3, len(u))]
    )
    torch.testing.assert_close(alone, together, rtol=0, atol=0)
