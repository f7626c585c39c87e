"""Blocks and stacks: a table of constructors times the properties of a normalising flow."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from helpers import FILLS, TRUNK, mostly_nightly, normal, tiny_flow
from tarflowlm.flow.fills import FillsIn
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.flow.stack import FlowBlock, Prior

T, d = 4, 2

STACKS = {
    "no-blocks": {"couplings": ("affine",)},  # cut below
    "affine": {"couplings": ("affine",)},
    "token-affine": {"couplings": ("token-affine", "token-affine"), "patch": 2},
    "affine-both-ways": {"couplings": ("affine", "affine", "affine")},
    "mix1-K1": {"couplings": ("mix1",), "components": (1,)},
    "mix1": {"couplings": ("mix1", "mix1")},
    "mix1-no-mixing": {"couplings": ("mix1", "mix1"), "channel_mix": False},
    "tied-in-block-2": {"couplings": ("affine", "mixd"), "components": (1, 0), "channel_mix": None},
    "plain-head": {"couplings": ("mix1", "affine"), "sees_channels": False},
    "paper-head": {"couplings": ("mix1", "affine"), "head": "paper"},
    "tokens-apart-P2": {"couplings": ("mix1", "mix1"), "sees_tokens": False, "patch": 2},
    "token-affine-apart-P2": {
        "couplings": ("token-affine", "mix1"),
        "sees_tokens": False,
        "patch": 2,
    },
    "own-from-codebook": {"couplings": ("mix1", "mixd"), "components": (3, 5), "separation": 4.0},
    "fills": {"reads_tokens": True, **FILLS},
    "fills-P2": {"patch": 2, **FILLS},
    "mix1-P2": {"couplings": ("mix1", "mix1", "mix1"), "patch": 2},
    "mix1-P4": {"couplings": ("mix1", "mix1"), "patch": 4},
    "mixd-tied": {"couplings": ("mixd",)},
    "mixd-own": {"couplings": ("mixd",), "components": (4,), "input_map": "linear"},
    "mixd-both-ways": {"couplings": ("mixd", "mixd", "mixd")},
    "mixd-P2-independent": {"couplings": ("mixd", "mix1"), "patch": 2, "in_patch": "independent"},
    "mixd-P2-in-patch": {"couplings": ("mixd", "mixd"), "patch": 2},
    "mixd-P4-independent": {"couplings": ("mixd",), "patch": 4, "in_patch": "independent"},
    "mixd-P4-in-patch": {"couplings": ("mixd", "mix1"), "patch": 4},
    "reads-tokens": {
        "couplings": ("mixd", "mix1"),
        "reads_tokens": True,
        "trunk": replace(TRUNK, input_taps=3),
    },
    "reads-tokens-P2": {"couplings": ("mix1", "mix1"), "reads_tokens": True, "patch": 2},
    "mixd-affine-mix1": {"couplings": ("mixd", "affine", "mix1")},
}


WITHIN = {"affine", "mix1-K1", "mixd-tied", "mix1-P4", "mixd-P4-independent", "mixd-P4-in-patch"}
"""Single blocks and whole windows as one position: in other stacks, or in test_couplings.py."""


@pytest.fixture(params=mostly_nightly(STACKS, *(STACKS.keys() - WITHIN)), scope="module")
def model(request):
    model = tiny_flow(seed=4, **STACKS[request.param])
    if request.param == "no-blocks":
        model.prior.blocks = model.prior.blocks[:0]
    return model


@pytest.fixture(scope="module")
def latents(model):
    """Samples [B, T, d] of the model. (Between well separated modes of a mixture an inverse is
    ill-conditioned.)
    """
    with torch.no_grad():
        return model.prior.inverse(normal(3, T, d))


@pytest.mark.slow
def test_log_det_is_the_autograd_one(model, latents):
    z = latents[:1]
    by_z = jacobian(lambda v: model.prior(v.view(1, T, d))[0].flatten(), z.flatten())
    _, log_det = model.prior(z)
    torch.testing.assert_close(
        log_det[0], torch.linalg.slogdet(by_z).logabsdet, rtol=1e-9, atol=1e-9
    )


def test_no_sequences_give_no_noise(model):
    u, log_det = model.prior(normal(0, T, d))
    assert (u.shape, log_det.shape) == ((0, T, d), (0,))
    assert model.prior.log_prob(normal(0, T, d)).shape == (0,)


@pytest.mark.slow
def test_round_trips(model, latents):
    u = normal(8, T, d, seed=5)
    with torch.no_grad():
        back, (again, _) = (
            model.prior.inverse(model.prior(latents)[0]),
            model.prior(model.prior.inverse(u)),
        )
    torch.testing.assert_close(back, latents, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(again, u, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("coupling", ["affine", "token-affine", "mix1", "mixd"])
def test_inverses_keep_their_precision_under_autocast(coupling):
    prior = tiny_flow(couplings=(coupling, "affine"), patch=2).float().prior
    u = normal(8, T, 2, seed=5).float()
    with torch.autocast("cpu", torch.bfloat16):
        z = prior.inverse(u)
    torch.testing.assert_close(z, prior.inverse(u))


def test_states_lead_from_latents_to_noise_and_log_prob_is_log_det_plus_the_base(model, latents):
    with torch.no_grad():
        states, log_dets = model.prior.states(latents)
        u, log_det = model.prior(latents)
        log_prob = model.prior.log_prob(latents)
    assert log_prob.shape == (3,)
    torch.testing.assert_close(
        log_prob, log_det + standard_normal_log_prob(u), rtol=1e-9, atol=1e-9
    )
    assert len(states) == len(log_dets) + 1 == model.num_blocks + 1
    assert torch.equal(states[0], latents)
    assert torch.equal(states[-1], u)
    assert all(state.shape == latents.shape for state in states)
    torch.testing.assert_close(
        sum((part.sum(-1) for part in log_dets), start=torch.zeros_like(log_det)), log_det
    )


def in_block_order(block: FlowBlock, matrix: Tensor) -> Tensor:
    """A Jacobian [N, C, N, C] with rows and columns in the order in which the block works."""
    N, C = matrix.shape[:2]
    index = torch.arange(N * C).view(1, N, C).double()
    order = block.order(index).flatten().long()
    return matrix.reshape(N * C, N * C)[order][:, order].view(N, C, N, C)


def earlier_channels(model, index: int, num_channels: int) -> Tensor:
    """[C, C]: what a channel of a block sees in its own position, itself included."""
    lower = torch.ones(num_channels, num_channels, dtype=torch.bool).tril()
    token = torch.arange(num_channels) // d
    same = token[:, None] == token
    options = model.config.blocks[index]
    if getattr(options, "in_patch", "") == "independent":
        lower &= same
    if options.coupling == "token-affine":
        lower &= ~same | torch.eye(num_channels, dtype=torch.bool)
    if not getattr(options, "sees_tokens", True):
        # groups of d channels in the block's own order
        lower &= same
    if not getattr(options, "sees_channels", True):
        lower = torch.eye(num_channels, dtype=torch.bool)
    return lower


@pytest.mark.slow
def test_the_jacobian_of_every_block_shows_its_direction_and_its_order(model, latents):
    """Position t sees t' < t in the block's own direction, and in its own position earlier channels
    alone.
    """
    z = model.prior.patch(latents[:1])
    for index, block in enumerate(model.prior.blocks):
        assert block.order.reverse == (index % 2 == 1)
        by_z = in_block_order(block, jacobian(lambda v, f=block: f(v[None])[0][0], z[0]))
        N, C = by_z.shape[:2]
        before = torch.ones(N, N, dtype=torch.bool).tril(-1)[:, None, :, None]
        here = torch.eye(N, dtype=torch.bool)[:, None, :, None]
        allowed = before | (here & earlier_channels(model, index, C)[:, None])
        assert not by_z[~allowed].any()
        # where a block that fills in is not sure, its map is the identity
        fills_in = isinstance(block.coupling, FillsIn)
        assert fills_in or (by_z[allowed].abs() > 1e-12).all()
        z = block(z)[0].detach()


@pytest.mark.slow
def test_the_cached_inverse_equals_a_plain_loop(model):
    """Without a cache: parameters of position t from a full pass over the latents found so far."""
    with torch.no_grad():
        u = model.prior.patch(normal(2, T, d, seed=6))
        for block in model.prior.blocks:
            noise = block.order(u)
            h = torch.zeros_like(noise)
            for t in range(noise.shape[1]):
                features = block.features(h)[:, t]
                h[:, t] = block.coupling.invert(noise[:, t], features)
            torch.testing.assert_close(
                block.inverse(u), block.order.inverse(h), rtol=1e-9, atol=1e-9
            )


def integral(log_density, low: float, high: float, points: int) -> float:
    """Of exp(log_density(z)) over the square [low, high]^2; z [N, 2]."""
    grid = torch.linspace(low, high, points, dtype=torch.float64)
    z = torch.cartesian_prod(grid, grid)
    step = (high - low) / (points - 1)
    with torch.no_grad():
        return sum(log_density(part).exp().sum().item() for part in z.split(40_000)) * step**2


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"couplings": ("mix1", "mix1"), "latent_dim": 1},
        {"couplings": ("affine", "mix1"), "latent_dim": 1},
        {"couplings": ("mixd", "mix1"), "latent_dim": 1},
        {"couplings": ("mixd",), "latent_dim": 1, "patch": 2},
        {"couplings": ("mixd", "mix1"), "latent_dim": 1, "patch": 2, "in_patch": "independent"},
        {"couplings": ("mixd",), "latent_dim": 2},
        {"couplings": ("mixd", "mixd"), "latent_dim": 2},
        {"couplings": ("mixd", "mix1"), "latent_dim": 1, "reads_tokens": True},
    ],
    ids=lambda f: (
        "-".join(map(str, f["couplings"])) + f"-d{f['latent_dim']}-P{f.get('patch', 1)}-{len(f)}"
    ),
)
def test_the_density_integrates_to_one(fields):
    """Two dimensions: two tokens of one channel, or one token of two."""
    prior: Prior = tiny_flow(seed=1, scale=0.2, log_std=-0.7, **fields).prior

    def log_density(z: Tensor) -> Tensor:
        return prior.log_prob(z.view(len(z), -1, fields["latent_dim"]))

    assert integral(log_density, -12.0, 12.0, 251) == pytest.approx(1.0, abs=3e-4)


def test_the_density_of_a_position_depends_on_its_own_past(model):
    z = normal(2, 8 // model.config.patch, 2 * model.config.patch)
    for block in model.prior.blocks:
        with torch.no_grad():
            log_p = block.log_prob(z)
            changed = z.clone()
            changed[:, -1] += 1.0
            # a block from right to left has the last position in every other's past, one from left
            # to right in none
            moved = (block.log_prob(changed) - log_p).abs()[:, :-1] > 1e-12
        assert moved.any() == block.order.reverse


def test_the_density_of_a_state_is_that_of_the_blocks_above_it(model):
    z = normal(2, 8, 2)
    with torch.no_grad():
        states, log_dets = model.prior.states(z)
        for above, state in enumerate(states):
            below = sum((part.sum(-1) for part in log_dets[:above]), start=z.new_zeros(2))
            torch.testing.assert_close(
                model.prior.log_prob(state, above=above), model.prior.log_prob(z) - below
            )
            parts = model.prior.log_prob_by_position(state, above=above)
            torch.testing.assert_close(parts.sum(-1), model.prior.log_prob(state, above=above))


@pytest.mark.parametrize("coupling", ["affine", "mix1", "mixd"])
def test_entropy_and_divergence_after_a_block(coupling):
    """docs/math.md, eq. 10b (the paper's appendix C), for one channel, by quadrature and
    differences of outputs.
    """
    block = tiny_flow(couplings=(coupling,), latent_dim=1).prior.block(0)
    h = torch.linspace(-7.0, 7.0, 40_001, dtype=torch.float64)
    log_q = torch.distributions.Normal(0.3, 0.8).log_prob(h)
    with torch.no_grad():
        u, log_det = (out.flatten() for out in block(h[:, None, None]))
        log_p = block.log_prob(h[:, None, None]).flatten()
    # the density of u without the block's own determinant
    log_of_u = log_q - torch.gradient(u, spacing=(h,))[0].log()

    def mean(x: Tensor, of: Tensor, at: Tensor) -> float:
        return torch.trapezoid(of.exp() * x, at).item()

    before, after = mean(-log_q, log_q, h), mean(-log_of_u, log_of_u, u)
    assert mean(log_det, log_q, h) == pytest.approx(after - before, abs=1e-5)
    above = mean(log_of_u - torch.distributions.Normal(0.0, 1.0).log_prob(u), log_of_u, u)
    assert mean(log_q - log_p, log_q, h) == pytest.approx(above, abs=1e-5)
