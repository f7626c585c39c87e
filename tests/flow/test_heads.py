"""The heads: who sees whom inside a position, and the walk through the groups equals the parallel
pass.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.autograd.functional import jacobian

from helpers import normal, randomise
from tarflowlm import compiled
from tarflowlm.flow.head_steps import CompiledHeadWeights, head_weights
from tarflowlm.flow.heads import (
    LARGEST_LOG_STD,
    AutoregressiveHead,
    HeadShape,
    HeadWeights,
    bounded_log_std,
)
from tarflowlm.flow.token_heads import TokenFeatures
from tarflowlm.model import seeded

WIDTH = 6

HEADS = {
    "one-group": {"groups": 1, "channels": 1, "outputs": (3,)},
    "channels": {"groups": 4, "channels": 1, "outputs": (2, 3, 1)},
    "tokens": {"groups": 3, "channels": 2, "outputs": (2, 1)},
}
SHAPE = HeadShape(width=WIDTH, hidden=5, features=4)
PAPER = replace(SHAPE, linear_paths=False, embed_bias=True)
SHAPES = {
    "linear-paths": SHAPE,
    "paper": PAPER,
    "in-patch": replace(SHAPE, linear_paths=False),
    "independent": replace(SHAPE, autoregressive=False),
}


@pytest.fixture(params=HEADS.values(), ids=HEADS.keys())
def sizes(request) -> dict:
    return request.param


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def head(request, sizes) -> AutoregressiveHead:
    with seeded(0):
        return randomise(AutoregressiveHead(request.param, **sizes))


def test_group_g_sees_earlier_groups_of_its_own_position(head):
    T, C = 3, head.groups * head.channels
    features = normal(1, T, WIDTH, seed=1)
    by_z = jacobian(
        lambda z: torch.cat(head(features, z[None]), -1)[:, 0], normal(T, C)
    )  # [G, T, O, T, C]
    depends = by_z.abs().amax(2).unflatten(-1, (head.groups, head.channels)) > 0  # [G, T, T, G, m]
    earlier = torch.ones(head.groups, head.groups, dtype=torch.bool).tril(-1) & (head.num_known > 0)
    here = torch.eye(T, dtype=torch.bool)
    expected = (here[None, :, :, None] & earlier[:, None, None, :])[..., None].expand_as(depends)
    assert torch.equal(depends, expected)


@pytest.mark.parametrize("shape", [SHAPE, PAPER], ids=["linear-paths", "paper"])
def test_groups_see_those_of_their_own_token_where_these_are_named(shape):
    token = torch.tensor([0, 1, 0, 1, 1])
    with seeded(0):
        shape = replace(shape, tokens=token)
        head = randomise(AutoregressiveHead(shape, groups=5, channels=1, outputs=(2,)))
    features, z = normal(1, WIDTH, seed=1), normal(1, 5)
    by_z = (
        jacobian(lambda z: head(features[None], z[None])[0][:, 0, 0], z)[:, :, 0].abs().amax(1) > 0
    )
    assert torch.equal(
        by_z, torch.ones(5, 5, dtype=torch.bool).tril(-1) & (token[:, None] == token)
    )
    walk, z_g = HeadWeights(head).walk(features), None
    for g, out in enumerate(head(features[:, None], z[:, None])[0]):
        torch.testing.assert_close(walk.send(z_g)[0], out[:, 0], rtol=1e-12, atol=1e-12)
        z_g = z[:, g : g + 1]


def test_every_group_sees_the_features_of_its_own_position(head):
    T, C = 3, head.groups * head.channels
    z = normal(1, T, C)
    by_features = jacobian(
        lambda f: torch.cat(head(f[None], z), -1)[:, 0], normal(T, WIDTH, seed=1)
    )
    depends = by_features.abs().amax((2, 4)) > 0  # [G, T, T]
    assert torch.equal(depends, torch.eye(T, dtype=torch.bool).expand_as(depends))


def test_the_papers_head_is_the_masked_network_of_categorical_normalizing_flows():
    """Appendix H names its three layers; their masks are those of `AutoregFeedforward`
    (github.com/phlippe/CategoricalNF): a channel is embedded and read out on its own, and only the
    layer between is triangular.
    """
    C, A, M, K = 4, PAPER.features, PAPER.hidden, 3
    with seeded(0):
        head = randomise(AutoregressiveHead(PAPER, groups=C, channels=1, outputs=(K,)))
    own, earlier = torch.eye(C).double(), torch.ones(C, C).double().tril(-1)[:, : C - 1]
    in_to_features = torch.kron(own[1:, 1:], torch.ones(A, 3))
    features_to_hidden = torch.kron(earlier, torch.ones(M, A))
    hidden_to_out = torch.kron(own, torch.ones(K, M))
    # dense weights, from which the masks take what the head has
    dense_in = head.embed.transpose(1, 2).reshape(-1, 3).repeat(1, C - 1)
    dense_hidden = head.cross.flatten(2).flatten(0, 1)
    dense_out = head.weights[0].transpose(1, 2).reshape(C * K, M).repeat(1, C)
    features, z = normal(2, 3, WIDTH, seed=1), normal(2, 3, C)
    before = z[..., :-1, None]
    inputs = torch.cat((before, F.elu(before), F.elu(-before)), -1).flatten(2)
    embedded = F.gelu(inputs @ (dense_in * in_to_features).T + head.embed_bias.flatten())
    hidden = head.context(features) + embedded @ (dense_hidden * features_to_hidden).T
    out = F.gelu(hidden) @ (dense_out * hidden_to_out).T + head.biases[0].flatten()
    found = head(features, z)[0].permute(1, 2, 0, 3).flatten(2)
    torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)
    assert head.evidence is None
    # the graph of dependence, channel by channel
    through = hidden_to_out @ features_to_hidden @ in_to_features
    graph = through.view(C, K, C - 1, 3).sum((1, 3)) > 0
    by_z = jacobian(lambda z: head(features[:1, :1], z[None, None])[0][:, 0, 0], z[0, 0])
    assert torch.equal(by_z.abs().sum(1) > 0, F.pad(graph, (0, 1)))


def test_walking_equals_the_parallel_pass(head):
    B, C = 3, head.groups * head.channels
    features, z = normal(B, WIDTH, seed=1), normal(B, C)
    parallel = head(features[:, None], z[:, None])
    known = z.split(head.channels, dim=-1)
    walk, z_g = HeadWeights(head).walk(features), None
    for g in range(head.groups):
        for walked, out in zip(walk.send(z_g), parallel, strict=True):
            torch.testing.assert_close(walked, out[g, :, 0], rtol=1e-12, atol=1e-12)
        z_g = known[g]


def test_walking_by_compiled_functions_equals_it_alone_and_beside_others(head, request):
    pytest.importorskip("numba")
    request.getfixturevalue("compiled_steps")
    assert compiled.is_due(1)
    head = copy.deepcopy(head).float()
    B, C = 3, head.groups * head.channels
    features, z = normal(B, WIDTH, seed=1).float(), normal(B, C).float()
    with torch.no_grad():
        parallel = head(features[:, None], z[:, None])
        weights = head_weights(head)
        assert isinstance(weights, CompiledHeadWeights)
        walk, alone, z_g = weights.walk(features), weights.walk(features[1:2]), None
        for g in range(head.groups):
            outputs = walk.send(z_g)
            own = alone.send(z_g if z_g is None else z_g[1:2])
            for walked, single, out in zip(outputs, own, parallel, strict=True):
                torch.testing.assert_close(walked, out[g, :, 0], rtol=1e-5, atol=1e-5)
                assert torch.equal(single, walked[1:2])
            z_g = z[:, head.channels * g : head.channels * (g + 1)]


@pytest.mark.parametrize("in_patch", [True, False], ids=["autoregressive", "independent"])
def test_token_features_see_earlier_tokens_of_the_patch_only_if_autoregressive(in_patch):
    P, d, T = 3, 2, 2
    with seeded(0):
        layer = randomise(TokenFeatures(width=WIDTH, patch=P, latent_dim=d, in_patch=in_patch))
    features = normal(1, T, WIDTH, seed=1)
    by_z = jacobian(lambda z: layer(features, z[None])[0], normal(T, P * d))  # [T, P, D, T, P d]
    depends = by_z.abs().amax(2).unflatten(-1, (P, d)).amax(-1) > 0  # [T, P, T, P]
    expected = (
        torch.eye(T, dtype=torch.bool)[:, None, :, None]
        & torch.ones(P, P, dtype=torch.bool).tril(-1)[:, None]
    )
    assert torch.equal(depends, expected if in_patch else torch.zeros_like(expected))


def test_a_log_std_is_left_as_it_is_up_to_eight_and_bounded_beyond():
    inside = torch.linspace(-LARGEST_LOG_STD, LARGEST_LOG_STD, 101, dtype=torch.float64)
    assert torch.equal(bounded_log_std(inside), inside)
    # beside one that is beyond, too
    assert torch.equal(bounded_log_std(torch.cat((inside, inside.new_tensor([50.0]))))[:-1], inside)
    far = torch.tensor([-1e30, -100.0, 100.0, 1e30])
    assert bounded_log_std(far).tolist() == [-12.0, -12.0, 12.0, 12.0]
    assert (bounded_log_std(torch.linspace(-20, 20, 4001, dtype=torch.float64)).diff() > 0).all()
    assert bounded_log_std(torch.zeros(0, 3)).shape == (0, 3)


def test_the_bound_of_a_log_std_is_once_differentiable():
    x = torch.linspace(-14, 14, 561, dtype=torch.float64, requires_grad=True)
    assert gradcheck(bounded_log_std, x)
    (slope,) = torch.autograd.grad(bounded_log_std(x).sum(), x)
    assert (slope > 0).all()
    assert torch.equal(
        slope[x.detach().abs() <= LARGEST_LOG_STD], torch.ones(321, dtype=torch.float64)
    )
    # no jump of the slope where the bound sets in: it changes by 2 (h / 4)^2 at most
    for edge in (-LARGEST_LOG_STD, LARGEST_LOG_STD):
        at = torch.tensor([edge - 1e-4, edge + 1e-4], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(bounded_log_std(at).sum(), at)
        assert (slope[1] - slope[0]).abs() < 1e-8


def test_only_the_last_output_is_bounded_and_gradients_pass_through():
    with seeded(0):
        sizes = {"groups": 3, "channels": 1, "outputs": (2, 2)}
        shape = replace(SHAPE, linear_paths=False)
        head = AutoregressiveHead(shape, **sizes, log_std_last=True).double()
    with torch.no_grad():
        for bias in head.biases:
            bias.fill_(11.0)
    first, log_std = head(normal(2, 4, WIDTH), normal(2, 4, 3, seed=1))
    assert first.min() > 10
    assert 8 < log_std.min() <= log_std.max() < 12
    log_std.sum().backward()
    gradients = [head.biases[1].grad, head.weights[1].grad, head.context.weight.grad]
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)
