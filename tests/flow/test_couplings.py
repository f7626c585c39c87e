"""A table of couplings times the properties that make them couplings."""

import math
from dataclasses import replace

import pytest
import torch
from torch.autograd.functional import jacobian

from docs_cases import ROOT, blocks
from helpers import normal, randomise
from tarflowlm import chunks
from tarflowlm.errors import UserError
from tarflowlm.flow import numerics
from tarflowlm.flow.channelwise import AffineCoupling, ChannelCoupling, Mix1Coupling
from tarflowlm.flow.codebook import Codebook, NoisyCodebook
from tarflowlm.flow.couplings import Coupling
from tarflowlm.flow.fills import FillsIn, complete
from tarflowlm.flow.heads import HeadShape
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.numerics import log_standard_normal, standard_normal_log_prob
from tarflowlm.model import seeded
from tarflowlm.model_config import BlockConfig
from tarflowlm.model_config import coupling as registering

WIDTH, P, d, T = 6, 2, 2, 2
C = P * d


HEAD = HeadShape(width=WIDTH, hidden=4, features=3)


def mix1(components: int, *, hidden: int = 4, spread: float = 0.9) -> Mix1Coupling:
    head = replace(HEAD, hidden=hidden)
    return Mix1Coupling(channels=C, components=components, head=head, spread=spread)


def affine(group: int = 1) -> AffineCoupling:
    return AffineCoupling(channels=C, head=replace(HEAD, hidden=4 * group), group=group)


def mixd(patch: int, in_patch: bool, components: int = 4, tied: bool = False) -> MixDCoupling:
    book = Codebook(5, C // patch, separation=1.0) if tied else None
    coupling = MixDCoupling(
        width=WIDTH,
        patch=patch,
        latent_dim=C // patch,
        components=components,
        tied=book,
        in_patch=in_patch,
    )
    if book is not None:
        coupling.encoder = (
            book  # the model's part; here the coupling holds it, to be randomised with the rest
        )
    return coupling


def fills(patch: int) -> FillsIn:
    book = Codebook(5, C // patch, separation=1.0)
    coupling = MixDCoupling(
        width=WIDTH,
        patch=patch,
        latent_dim=C // patch,
        components=0,
        tied=NoisyCodebook(book),
        in_patch=False,
    )
    coupling.encoder = book
    return FillsIn(coupling, 0.3)


def documented():
    """The coupling of docs/flow.md, which registers itself."""
    exec(blocks(ROOT / "docs" / "flow.md", "python")[OWN], {"__name__": "my_couplings"})
    return BlockConfig.KINDS["sinh-arcsinh"].implementation(channels=C, head=HEAD)


OWN = next(
    i
    for i, text in enumerate(blocks(ROOT / "docs" / "flow.md", "python"))
    if "@tarflowlm.coupling" in text
)
COUPLINGS = {
    "own": documented,
    "affine": affine,
    "affine-token": lambda: affine(group=C),
    "affine-P2": lambda: affine(group=C // 2),
    "mix1-K1": lambda: mix1(1),
    "mix1-K3": lambda: mix1(3),
    "mixd-K1": lambda: mixd(1, False, components=1),
    "mixd": lambda: mixd(1, False),
    "mixd-tied": lambda: mixd(1, False, tied=True),
    "mixd-P2-independent": lambda: mixd(2, False),
    "mixd-P2-in-patch": lambda: mixd(2, True),
    "mixd-P2-tied": lambda: mixd(2, True, tied=True),
    "mixd-P4-independent": lambda: mixd(4, False),
    "mixd-P4-in-patch": lambda: mixd(4, True),
    "fills": lambda: fills(1),
    "fills-P2-independent": lambda: fills(2),
}
WITHOUT_EFFECT = {
    "mix1-K1": {"head.weights.0", "head.biases.0", "head.shared.weight", "head.evidence"},
    "mixd-K1": {"weight_head.weight", "weight_head.bias"},
}
"""The weight of a single component is one whatever the network says."""


@pytest.fixture(params=COUPLINGS.values(), ids=COUPLINGS.keys())
def coupling(request) -> Coupling:
    with seeded(1):
        return randomise(request.param(), seed=1)


@pytest.fixture
def features():
    return normal(1, T, WIDTH, seed=2)


def test_log_det_is_the_autograd_one(coupling, features):
    z = normal(1, T, C)
    by_z = jacobian(lambda v: coupling(v.view(1, T, C), features)[0].flatten(), z.flatten())
    _, log_det = coupling(z, features)
    torch.testing.assert_close(
        log_det.sum(), torch.linalg.slogdet(by_z).logabsdet, rtol=1e-9, atol=1e-9
    )


def test_the_inverse_has_the_opposite_log_det(coupling):
    u, features = normal(1, C), normal(1, WIDTH, seed=2)
    by_u = jacobian(lambda v: coupling.invert(v[None], features)[0], u[0])
    z = coupling.invert(u, features)
    _, log_det = coupling(z[:, None], features[:, None])
    torch.testing.assert_close(
        torch.linalg.slogdet(by_u).logabsdet, -log_det[0, 0], rtol=1e-7, atol=1e-7
    )


def test_round_trips(coupling):
    u, features = normal(16, C), normal(16, WIDTH, seed=2)
    z = coupling.invert(u, features)
    again, _ = coupling(z[:, None], features[:, None])
    torch.testing.assert_close(again[:, 0], u, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(coupling.invert(again[:, 0], features), z, rtol=1e-7, atol=1e-7)


def test_log_prob_is_log_det_plus_the_base(coupling):
    z, features = normal(4, T, C), normal(4, T, WIDTH, seed=2)
    u, log_det = coupling(z, features)
    expected = log_det + log_standard_normal(u).sum(-1)
    torch.testing.assert_close(coupling.log_prob(z, features), expected, rtol=1e-9, atol=1e-9)


def test_filling_in_acts_on_tokens_that_are_likely_and_leaves_the_others():
    with seeded(1):
        coupling = randomise(fills(P), seed=1)
    z, features = normal(4, T, C), normal(4, T, WIDTH, seed=2)
    weights = coupling.weight_head(coupling.token_features(features, z)).softmax(-1)
    sure = (weights[..., :5].amax(-1) > coupling.certainty)[..., None]
    assert 0.1 < sure.double().mean() < 0.9
    coupling.certainty = 0.0
    everywhere, _ = coupling(z, features)
    coupling.certainty = 0.3
    by_token = (4, T, P, d)
    expected = torch.where(sure, everywhere.view(by_token), z.view(by_token)).view(z.shape)
    torch.testing.assert_close(coupling(z, features)[0], expected)
    assert not coupling.uses_encoder_codebook
    first, known = features[:, 0], z[:, 0]
    log_p = complete(coupling, known, first, known, torch.ones(4, P, dtype=torch.bool))[2]
    torch.testing.assert_close(log_p.sum(-1), coupling.log_prob(z, features)[:, 0])


def test_jacobian_is_block_diagonal_over_positions_and_triangular_inside(
    request, coupling, features
):
    """Given the features, a position stands alone; independent tokens of a patch do not see each
    other.
    """
    by_z = jacobian(lambda v: coupling(v, features)[0][0], normal(1, T, C))[:, :, 0]  # [T, C, T, C]
    allowed = torch.ones(C, C, dtype=torch.bool).tril()
    if "independent" in request.node.callspec.id:
        token = torch.arange(C) // coupling.latent_dim
        allowed = allowed & (token[:, None] == token)
    expected = torch.eye(T, dtype=torch.bool)[:, None, :, None] & allowed[:, None]
    name = request.node.callspec.id
    if "affine" in name or ("K1" in name and isinstance(coupling, MixDCoupling)):
        # one Gaussian: channels that are drawn together do not meet
        group = torch.arange(C) // coupling.group
        expected = expected & ((group[:, None] != group) | torch.eye(C, dtype=torch.bool))[:, None]
    assert not by_z[~expected].any()
    # where a token is not filled in, the map is the identity
    fills_in = isinstance(coupling, FillsIn)
    assert fills_in or (by_z[expected].abs() > 1e-12).all()


def test_completing_keeps_what_is_given_and_draws_the_rest(coupling):
    """Rows that give nothing, the first token, all: noise, latents and densities belong
    together.
    """
    P = getattr(coupling, "patch", min(2, C // coupling.group))
    u, features = normal(4, C), normal(4, WIDTH, seed=2)
    known = coupling.invert(normal(4, C, seed=9), features)
    is_known = torch.zeros(4, P, dtype=torch.bool)
    is_known[1, 0] = is_known[2, -1] = is_known[3] = True
    z, noise, log_p = complete(coupling, u, features, known, is_known)
    given = is_known.repeat_interleave(C // P, dim=1)
    assert torch.equal(z[given], known[given])
    assert torch.equal(noise[~given], u[~given])
    assert not log_p[~is_known].any()
    again, log_det = coupling(z[:, None], features[:, None])
    torch.testing.assert_close(again[:, 0], noise, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(log_p[3].sum(), log_det[3, 0] + standard_normal_log_prob(noise)[3])
    # the first token alone: its density is that of the sequence of one token, whatever follows
    other, _, again_log_p = complete(coupling, normal(4, C, seed=3), features, known, is_known)
    assert P == 1 or not torch.equal(other[1], z[1])
    torch.testing.assert_close(again_log_p[1], log_p[1])


def test_many_positions_share_one_layout_of_the_weights(coupling):
    weights = coupling.present_weights()
    for seed in range(2):
        u, features = normal(16, C, seed=seed), normal(16, WIDTH, seed=2)
        torch.testing.assert_close(
            coupling.invert(u, features, weights=weights),
            coupling.invert(u, features),
            rtol=1e-9,
            atol=1e-9,
        )


def test_rows_do_not_influence_each_other(coupling):
    u, features = normal(3, C), normal(3, WIDTH, seed=2)
    alone = coupling.invert(u[1:2], features[1:2])
    torch.testing.assert_close(coupling.invert(u, features)[1:2], alone, rtol=1e-10, atol=1e-10)


def test_every_parameter_gets_a_gradient(request, coupling):
    z, features = normal(4, T, C), normal(4, T, WIDTH, seed=2)
    for value in (coupling.log_prob(z, features), coupling(z, features)[0].square()):
        coupling.zero_grad(set_to_none=True)
        value.sum().backward()
        without = {
            n
            for n, p in coupling.named_parameters()
            if p.numel() and (p.grad is None or not p.grad.any())
        }
        assert without == WITHOUT_EFFECT.get(request.node.callspec.id, set())


def test_mix1_with_one_component_is_affine():
    with seeded(3):
        mixture = randomise(mix1(1))
        single = affine().double()
    # outputs: log-weight, mean, log-width of the one; mean, log-width of the other, whose skips
    # start at zero
    state = single.head.state_dict()
    state |= {
        name: mixture.head.state_dict()[name]
        for name in ("context.weight", "context.bias", "embed", "cross")
    }
    for kind in ("weights", "biases"):
        state |= {f"{kind}.{i}": getattr(mixture.head, kind)[i + 1] for i in range(2)}
    single.head.load_state_dict(state)
    z, features = normal(4, T, C), normal(4, T, WIDTH, seed=2)
    torch.testing.assert_close(mixture(z, features), single(z, features), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("patch", [1, 2])
def test_the_weights_of_a_mixd_block_come_a_few_rows_at_a_time(patch, monkeypatch):
    """Forward, with its gradients, and inverse: as many rows as are held, and the same numbers."""
    with seeded(0):
        coupling = randomise(mixd(patch, True, components=60))
    z, features, u = normal(4, 6, C), normal(4, 6, WIDTH, seed=1), normal(24, C, seed=2)
    sizes, tokens = [], 24 * patch
    coupling.weight_head.register_forward_hook(lambda m, x, y: sizes.append(y.numel()))

    def results():
        sizes.clear()
        noise, log_det = coupling(z, features)
        grads = torch.autograd.grad(
            noise.square().sum() + log_det.sum(), list(coupling.parameters())
        )
        with torch.no_grad():
            drawn = coupling.invert(u, features.flatten(0, 1))
        return noise, log_det, drawn, *grads

    expected = results()
    assert max(sizes) == tokens * 60
    monkeypatch.setattr(chunks, "HELD_CPU", 5 * 60)
    torch.testing.assert_close(results(), expected, rtol=1e-9, atol=1e-9)
    assert max(sizes) == 5 * 60


def test_mixd_of_one_channel_is_mix1():
    """d = 1: the Rosenblatt transform is the mixture CDF with the codebook's means and widths."""
    with seeded(3):
        coupling = randomise(mixd(4, False))
    z, features = normal(4, T, C), normal(4, T, WIDTH, seed=2)
    log_w = coupling.weight_head(coupling.token_features(features, z))
    book = coupling.components
    u, log_det = numerics.mixture_cdf(
        z,
        log_w,
        book.mean[:, 0].expand_as(log_w).contiguous(),
        book.log_std.expand_as(log_w).contiguous(),
    )
    ours, our_log_det = coupling(z, features)
    torch.testing.assert_close(ours, u, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(our_log_det, log_det.sum(-1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("components", [1, 2, 3, 27])
@pytest.mark.parametrize("spread", [0.5, 0.95])
def test_mix1_starts_with_zero_mean_and_unit_variance(components, spread):
    biases = [b.detach().double() for b in mix1(components, spread=spread).head.biases]
    weight = biases[0].softmax(-1)
    mean = (weight * biases[1]).sum(-1)
    variance = (weight * (biases[1] ** 2 + (2 * biases[2]).exp())).sum(-1) - mean**2
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), atol=2e-3, rtol=0)


def test_mixd_starts_with_equal_weights_and_the_tied_codebook_is_not_registered_twice():
    book = Codebook(5, 2)
    coupling = MixDCoupling(
        width=WIDTH, patch=1, latent_dim=2, components=0, tied=book, in_patch=True
    )
    assert coupling.components is book
    assert not any(name.startswith(("own", "_book")) for name, _ in coupling.named_parameters())
    features = torch.randn(1, 1, WIDTH)
    z = torch.randn(1, 1, 2)
    expected = numerics.log_component_densities(z, book.mean, book.log_std).logsumexp(
        -1
    ).sum() - math.log(5)
    torch.testing.assert_close(coupling.log_prob(z, features)[0, 0], expected)


def test_adjusting_to_the_largest_weight_leaves_one_gaussian():
    with seeded(0):
        coupling = randomise(mixd(1, False))
    u, features = normal(4, C), normal(4, WIDTH, seed=2)

    def largest(log_w):
        return log_w.masked_fill(log_w < log_w.amax(-1, keepdim=True), torch.finfo(log_w.dtype).min)

    z = coupling.invert(u, features, adjust=largest)
    best = coupling.weight_head(features).argmax(-1)
    expected = coupling.own.mean[best] + coupling.own.log_std[best].exp()[:, None] * u
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)


def test_a_newton_step_divides_the_residual_by_the_slope_of_each_channel(coupling):
    if not isinstance(coupling, ChannelCoupling):
        return
    z, u, features = normal(1, 1, C), normal(1, 1, C, seed=4), normal(1, 1, WIDTH, seed=2)
    slope = jacobian(
        lambda v: coupling(v[None, None], features)[0].flatten(), z.flatten()
    ).diagonal()
    with torch.no_grad():
        new, residual = coupling.newton_step(z, u, features)
        torch.testing.assert_close(residual, u - coupling(z, features)[0])
        torch.testing.assert_close(new, z + residual / slope)
        solution = coupling.invert(u[:, 0], features[:, 0])[:, None]
        torch.testing.assert_close(
            coupling.newton_step(solution, u, features)[0], solution, rtol=1e-9, atol=1e-9
        )


def test_a_name_is_taken_once():
    documented()  # again: a notebook runs its cells more than once
    for name in ("mixd", "sinh-arcsinh"):
        with pytest.raises(UserError, match=f"coupling '{name}' exists already"):
            registering(name)(AffineCoupling)


def test_impossible_sizes_are_refused_by_name():
    for group in (-1, 0, 3):
        with pytest.raises(UserError, match=f"group {group}: must divide the {C} channels"):
            affine(group)
    for components in (-1, 0):
        with pytest.raises(UserError, match=f"components {components}: must be at least 1"):
            mix1(components)
    with pytest.raises(UserError, match="vocab_size 0, dim 4"):
        mixd(1, False, components=0)
