"""Flows of plain vectors: exact log-determinants, inverses, a context, and channels that are
coupled.
"""

from functools import partial

import pytest
import torch

from helpers import normal, randomise
from tarflowlm import flow
from tarflowlm.errors import UserError
from tarflowlm.flow import AffineCoupling, Mix1Coupling, VectorFlow

MAKERS = {
    "default": partial(VectorFlow, 3, hidden=6, width=8),
    "affine": partial(VectorFlow, 3, coupling=AffineCoupling, hidden=6, width=8),
    "one-channel": partial(VectorFlow, 1, coupling=Mix1Coupling, components=3, hidden=6),
    "context": partial(VectorFlow, 3, context=2, components=3, hidden=6, width=8, blocks=2),
}
everyone = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def made(make):
    torch.manual_seed(0)
    model = randomise(make())
    z = normal(5, model.dim)
    return model, z, None if model.reader is None else normal(5, 2, seed=1)


@everyone
def test_the_log_determinant_is_the_one_of_autograd(make):
    model, z, context = made(make)
    u, log_det = model(z, context)
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v, context)[0].sum(0), z)
    expected = torch.linalg.slogdet(jacobian.transpose(0, 1)).logabsdet
    torch.testing.assert_close(log_det, expected)
    log_p = log_det + flow.numerics.standard_normal_log_prob(u[:, None])
    torch.testing.assert_close(model.log_prob(z, context), log_p)


@everyone
def test_noise_goes_back_to_its_vectors(make):
    model, z, context = made(make)
    torch.testing.assert_close(model.inverse(model(z, context)[0], context), z)
    some = z.view(5, 1, -1)
    given = None if context is None else context.view(5, 1, -1)
    assert model.log_prob(some, given).shape == (5, 1)


def test_every_channel_depends_on_every_other_one():
    """Two blocks couple all channels, though each sees them in one order."""
    model, z, _ = made(partial(VectorFlow, 4, blocks=2, hidden=6, width=8))
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v)[0], z[0])
    assert (jacobian.abs() > 1e-9).all()


def test_a_context_changes_the_density_row_by_row():
    model, z, context = made(MAKERS["context"])
    log_p = model.log_prob(z, context)
    other = torch.cat((context[:1] + 1, context[1:]))
    is_same = model.log_prob(z, other) == log_p
    assert is_same.tolist() == [False, True, True, True, True]


def test_samples_have_the_density_and_their_seed():
    torch.manual_seed(0)
    model = VectorFlow(1, blocks=1, components=3)
    grid = torch.linspace(-12, 12, 4001)[:, None]
    assert (model.log_prob(grid).exp().sum() * 24 / 4000).item() == pytest.approx(1, abs=1e-3)
    draws = [model.sample(50, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_it_learns_two_channels_that_depend_on_each_other():
    """A circle, which no channel shows alone: the best independent channels give about -2.6."""
    torch.manual_seed(0)
    angle = 6.2832 * torch.rand(4000)
    rows = torch.stack((angle.cos(), angle.sin()), -1) + 0.1 * torch.randn(4000, 2)
    model = VectorFlow(2, blocks=2, hidden=16, width=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(120):
        optimizer.zero_grad()
        (-model.log_prob(rows[128 * (step % 30) :][:128]).mean()).backward()
        optimizer.step()
    assert model.log_prob(rows[:1000]).mean() > -1.3


def test_wrong_sizes_are_one_line():
    model = VectorFlow(2)
    for wrong, message in (
        (lambda: VectorFlow(0), "dim 0"),
        (lambda: model.log_prob(torch.zeros(3, 4)), r"shape \[3, 4\]: give \[..., 2\]"),
        (lambda: model.log_prob(torch.zeros(3, 2), torch.zeros(3, 1)), "context given: give none"),
        (lambda: VectorFlow(2, context=1).sample(3), "context None: give one"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()
