"""The bound: what it is made of, its gradients, its limits, and that it never beats the truth."""

import itertools
import math
from functools import cached_property

import pytest
import torch
from torch import Tensor

from helpers import mostly_nightly, normal, stack, tiny_ar, tiny_flow
from tarflowlm import chunks
from tarflowlm.baseline import IN_PATCH_CHANNELS, TokenLM
from tarflowlm.flow.numerics import log_component_densities
from tarflowlm.model import TarFlowLM, seeded
from tarflowlm.model_config import BaselineConfig, FlowConfig, TransformerConfig
from tarflowlm.objective import (
    conditional_bound,
    elbo,
    importance_weighted_bound,
    log_importance_weights,
)

MODELS = {
    "affine": {"couplings": ("affine", "affine")},
    "mix1": {"couplings": ("mix1", "mix1")},
    "mixd": {"couplings": ("mixd",)},
    "mixd-own": {"couplings": ("mixd", "mixd"), "components": (4, 3)},
    "mixd-mix1": {"couplings": ("mixd", "mix1", "mix1")},
    "mix1-P2": {"couplings": ("mix1", "affine"), "patch": 2},
    "mixd-mix1-P2": {"couplings": ("mixd", "mix1"), "patch": 2},
    "mixd-mix1-P2-independent": {
        "couplings": ("mixd", "mix1"),
        "patch": 2,
        "in_patch": "independent",
    },
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request) -> TarFlowLM:
    return tiny_flow(**request.param)


@pytest.fixture
def tokens() -> Tensor:
    """Every token type occurs."""
    return torch.arange(24).view(3, 8).remainder(5)


@pytest.fixture
def noise() -> Tensor:
    return normal(3, 8, 2, seed=1)


def test_terms_follow_their_definitions_and_sum_to_the_bound(model, tokens, noise):
    terms = elbo(model, tokens, noise=noise)
    total = terms.reconstruction - terms.log_q + terms.base + sum(terms.log_dets)
    torch.testing.assert_close(terms.nelbo, -total)
    torch.testing.assert_close(terms.log_prior, terms.base + sum(terms.log_dets))
    torch.testing.assert_close(model.bound(tokens, noise), terms.nelbo, rtol=1e-10, atol=1e-9)
    assert terms.nelbo.shape == (3,)
    assert len(terms.log_dets) == model.num_blocks
    book = model.codebook
    z = book.encode(tokens, noise)
    posterior = book.log_posterior(z).gather(-1, tokens[..., None])
    torch.testing.assert_close(terms.reconstruction, posterior.sum((1, 2)))
    torch.testing.assert_close(terms.log_q, book.log_q(tokens, noise).sum(1))
    torch.testing.assert_close(terms.log_prior, model.prior.log_prob(z))


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_sweep_over_the_codebook_is_as_good_as_two(dtype, patch, tokens, noise):
    model, noise = tiny_flow(couplings=("mixd",), patch=patch).to(dtype), noise.to(dtype)
    assert model.prior.block(0).coupling.uses_encoder_codebook
    z = model.codebook.encode(tokens, noise)
    two = model.codebook.log_normaliser(z).sum(-1) - model.prior.log_prob(z)
    one = model.bound(tokens, noise)
    torch.testing.assert_close(one, two)
    parameters = [p for p in model.parameters() if p.numel()]
    for found, expected in zip(
        *(torch.autograd.grad(b.mean(), parameters) for b in (one, two)), strict=True
    ):
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 1e-10
        )


def test_rows_do_not_influence_each_other(model, tokens, noise):
    alone = model.bound(tokens[1:2], noise[1:2])
    torch.testing.assert_close(model.bound(tokens, noise)[1:2], alone, rtol=1e-10, atol=1e-10)


def test_every_parameter_gets_a_gradient_equal_to_finite_differences(model, tokens, noise):
    """Of the whole bound, along random directions in the space of all parameters."""
    model.bound(tokens, noise).sum().backward()
    assert not [
        n for n, p in model.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())
    ]
    parameters = [p for p in model.parameters() if p.numel()]
    start = [p.detach().clone() for p in parameters]
    step = 1e-6
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        along = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        values = []
        for side in (step, -step):
            with torch.no_grad():
                for p, p_0, v in zip(parameters, start, along, strict=True):
                    p.copy_(p_0 + side * v)
                values.append(model.bound(tokens, noise).sum().item())
        difference = (values[0] - values[1]) / (2 * step)
        slope = sum((p.grad * v).sum().item() for p, v in zip(parameters, along, strict=True))
        assert difference == pytest.approx(slope, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("patch", [1, 2])
def test_frozen_blocks_get_no_gradient_and_keep_no_graph(patch, tokens, noise):
    model = tiny_flow(couplings=("mixd", "mix1", "mix1"), patch=patch)
    expected = model.bound(tokens, noise)

    def saved(evaluate) -> tuple[Tensor, int]:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            value = evaluate()
        return value, sum(sizes)

    bound, kept = saved(lambda: model.bound(tokens, noise, frozen=2))
    torch.testing.assert_close(bound, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        h = model.prior.patch(model.prior.states(model.codebook.encode(tokens, noise))[0][2])
    _, kept_by_the_last = saved(lambda: model.prior.blocks[2].log_prob(h))
    assert kept == kept_by_the_last
    bound.sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {
        name for name, _ in model.named_parameters() if name.startswith("prior.blocks.2.")
    }


def test_a_frozen_block_leaves_the_gradient_of_the_others_as_it_is(tokens, noise):
    model = tiny_flow(couplings=("mixd", "mix1", "mix1"))
    gradients = []
    for frozen in (0, 1):
        model.zero_grad(set_to_none=True)
        model.bound(tokens, noise, frozen=frozen).sum().backward()
        gradients.append([p.grad for p in model.prior.blocks[1:].parameters()])
    for free, beside_frozen in zip(*gradients, strict=True):
        torch.testing.assert_close(beside_frozen, free)


# --- the discrete limit (docs/math.md; paper, proposition 4)


def token_lm_of(model: TarFlowLM) -> TokenLM:
    """The discrete model with the weights of a tied Mix-d block: it embeds a token as the block
    does its mean.
    """
    config, block = model.config, model.prior.blocks[0]
    shared = {name: getattr(config, name) for name in ("vocab_size", "context", "patch", "trunk")}
    first = config.blocks[0]
    lm = TokenLM(BaselineConfig(**shared, in_patch=first.in_patch, layers=first.layers)).double()
    with torch.no_grad():
        if config.patch == 1:
            lm.embedding.weight.copy_(block.input(model.codebook.mean))
        else:  # the map of a whole patch must be linear to be a sum over its tokens
            block.input.out.weight.zero_()
            assert config.trunk.width == config.latent_dim
            lm.embedding.weight.copy_(model.codebook.mean)
            lm.join.load_state_dict(block.input.linear.state_dict())
            lm.token_features.load_state_dict(block.coupling.token_features.state_dict())
            if lm.in_patch_embedding is not None:
                lm.in_patch_embedding.weight.copy_(model.codebook.mean)
        lm.start.copy_(block.start)
    lm.transformer.load_state_dict(block.transformer.state_dict())
    lm.head.load_state_dict(block.coupling.weight_head.state_dict())
    return lm


WIDE = TransformerConfig(width=IN_PATCH_CHANNELS, num_heads=2)
TWO_AT_ONCE = {"patch": 2, "latent_dim": IN_PATCH_CHANNELS, "trunk": WIDE}
LIMITS = {
    "P1": {"latent_dim": 3},
    "P2": TWO_AT_ONCE,
    "P2-independent": TWO_AT_ONCE | {"in_patch": "independent"},
}


@pytest.mark.parametrize("fields", LIMITS.values(), ids=LIMITS.keys())
def test_a_well_separated_tied_mixd_block_is_the_discrete_model(fields, tokens):
    model = tiny_flow(couplings=("mixd",), **fields)
    lm = token_lm_of(model)
    expected = lm.bound(tokens, lm.draw_noise(tokens))
    assert expected.std() > 0.1  # it says something
    noise, errors = normal(3, 8, model.config.latent_dim), []
    for log_std in (-4.0, -7.0, -10.0):
        with torch.no_grad():
            model.codebook.log_std.fill_(log_std)
            at_the_means = model.bound(tokens, torch.zeros_like(noise))
            errors.append((model.bound(tokens, noise) - expected).abs().max().item())
        torch.testing.assert_close(at_the_means, expected, rtol=1e-6, atol=1e-6)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 2e-3


# --- the importance-weighted bound, where the exact likelihood can be had by integration


class Enumerated:
    """A model of two tokens of one channel, and by integration log p(x) of all its V^2
    sequences.
    """

    def __init__(self, model: TarFlowLM, reach: float, points: int) -> None:
        self.model = model
        self.V = model.config.vocab_size
        self.sequences = torch.tensor(list(itertools.product(range(self.V), repeat=2)))
        self.grid = torch.linspace(-reach, reach, points, dtype=torch.float64)
        self.log_cell = math.log(self.grid[1] - self.grid[0])

    @cached_property
    def density(self) -> Tensor:
        """log p(z_1, z_2) on the grid [G, G]."""
        z = torch.cartesian_prod(self.grid, self.grid)[..., None]
        with torch.no_grad():
            parts = [self.model.prior.log_prob(part) for part in z.split(40_000)]
        return torch.cat(parts).view(len(self.grid), len(self.grid))

    @cached_property
    def posterior(self) -> Tensor:
        """log p(x | z) [G, V]."""
        with torch.no_grad():
            return self.model.codebook.log_posterior(self.grid[:, None])

    @cached_property
    def log_prob(self) -> Tensor:
        joint = torch.einsum(
            "ab,av,bw->vw", self.density.exp(), self.posterior.exp(), self.posterior.exp()
        )
        return joint.flatten().log() + 2 * self.log_cell

    @cached_property
    def log_conditional(self) -> Tensor:
        """log of E_q(z_1|x_1) int p(z_2 | z_1) p(x_2 | z_2) dz_2, with p(z_2 | z_1) normalised on
        the grid.
        """
        with torch.no_grad():
            book = self.model.codebook
            log_q = log_component_densities(self.grid[:, None], book.mean, book.log_std)
            q = (log_q + self.log_cell).exp()  # [G, V]
        conditional = torch.einsum("av,ab,bw->vw", q, self.density.softmax(1), self.posterior.exp())
        return conditional.flatten().log()


CASES = dict.fromkeys(("mixd", "affine", "mixd-mix1"), (-0.6, 9)) | {
    "mix1": (0.2, 12),
    "affine-affine": (0.4, 16),
}
"""log sigma of the codebook (wide where the prior is one bump, lest importance weights have too
heavy a tail to test) and the reach of the grid.
"""


def enumerate_texts(name: str, points: int) -> Enumerated:
    couplings = tuple(name.split("-"))
    log_std, reach = CASES[name]
    fields = {"vocab_size": 3, "latent_dim": 1, "context": 2, "log_std": log_std, "scale": 0.2}
    return Enumerated(tiny_flow(couplings=couplings, **fields), reach, points)


@pytest.fixture(scope="module", params=mostly_nightly(CASES, "mixd", "mix1", "mixd-mix1"))
def enumerated(request) -> Enumerated:
    return enumerate_texts(request.param, points=361)


@pytest.mark.slow
def test_probabilities_of_all_texts_sum_to_one(enumerated):
    assert enumerated.log_prob.exp().sum().item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("given", [0, 1])
def test_the_importance_weighted_bound_falls_to_the_exact_likelihood(enumerated, given):
    """Of whole texts, and of second tokens given the first where there is one block."""
    if given and enumerated.model.num_blocks > 1:
        pytest.skip("no bound is known")
    repeats, generator = 400, torch.Generator().manual_seed(0)
    tokens = enumerated.sequences.repeat(repeats, 1)
    exact = -(enumerated.log_conditional if given else enumerated.log_prob).mean().item()
    with torch.no_grad():
        weights = log_importance_weights(
            enumerated.model, tokens, samples=32, generator=generator, given=given
        )
    means, errors = [], []
    for samples in (1, 4, 32):
        groups = weights.view(-1, samples, len(tokens))
        per_repeat = (math.log(samples) - groups.logsumexp(1)).mean(0).view(repeats, -1).mean(1)
        means.append(per_repeat.mean().item())
        errors.append(per_repeat.std().item() / math.sqrt(repeats))
    assert means[0] > means[1] > means[2]
    assert means[0] > means[2] + 4 * errors[2]
    assert all(mean > exact - 4 * error for mean, error in zip(means, errors, strict=True))
    assert means[2] - exact < 0.2 * (means[0] - exact) + 4 * errors[2]


@pytest.mark.slow
@pytest.mark.parametrize("given", [0, 1])
def test_importance_weights_are_unbiased(enumerated, given):
    """E[exp(-bound)] = p(x), whatever the number of samples: nothing is counted twice or left
    out.
    """
    if given and enumerated.model.num_blocks > 1:
        pytest.skip("no bound is known")
    repeats, generator = 2000, torch.Generator().manual_seed(1)
    tokens = enumerated.sequences.repeat(repeats, 1)
    with torch.no_grad():
        drawn = log_importance_weights(
            enumerated.model, tokens, samples=4, generator=generator, given=given
        )
    weights = drawn.exp().mean(0).view(repeats, -1)
    exact = (enumerated.log_conditional if given else enumerated.log_prob).exp()
    error = weights.std(0) / math.sqrt(repeats)
    assert ((weights.mean(0) - exact).abs() < 5 * error + 1e-6).all()


@pytest.mark.parametrize("name", CASES)
def test_predictions_after_a_context_sum_to_one(name):
    enumerated = enumerate_texts(name, points=121)
    by_context = enumerated.log_conditional.exp().view(enumerated.V, enumerated.V)
    torch.testing.assert_close(
        by_context.sum(1), torch.ones(enumerated.V, dtype=torch.float64), rtol=0, atol=1e-5
    )


def test_conditional_bounds_add_up_to_the_bound(tokens, noise):
    for model in (
        tiny_flow(couplings=("mixd",)),
        tiny_flow(couplings=("mix1",), patch=2),
        tiny_ar(),
    ):
        whole, rest = (conditional_bound(model, tokens, given, noise) for given in (0, 6))
        torch.testing.assert_close(whole, model.bound(tokens, noise))
        torch.testing.assert_close(
            rest, whole - conditional_bound(model, tokens[:, :6], 0, noise[:, :6])
        )


def test_one_importance_sample_is_the_elbo(tokens):
    model = tiny_flow()
    g, same = (torch.Generator().manual_seed(3) for _ in range(2))
    one = importance_weighted_bound(model, tokens, samples=1, generator=g)
    torch.testing.assert_close(one, elbo(model, tokens, generator=same).nelbo, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("given", [0, 4])
def test_rows_computed_together_do_not_show_in_the_weights(given, tokens, monkeypatch):
    for model in (tiny_flow(couplings=("mixd",)), tiny_ar()):
        found = []
        for together in (2048, 2 * tokens.shape[1], 1):
            monkeypatch.setattr(chunks, "BOUND_TOKENS_CPU", together)
            generator = torch.Generator().manual_seed(4)
            found.append(
                log_importance_weights(model, tokens, samples=3, generator=generator, given=given)
            )
        torch.testing.assert_close(found[1:], [found[0]] * 2)


# --- no fit beats the truth


class MarkovSource:
    """Second-order Markov chain over V symbols, the first two uniform: the exact probability of
    every text.
    """

    V = 4

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.next = (2.0 * torch.randn(self.V, self.V, self.V, generator=generator)).softmax(
            -1
        )  # [a, b, c]

    def sample(self, num: int, length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(self.V, (num, length), generator=generator)
        for t in range(2, length):
            x[:, t] = torch.multinomial(
                self.next[x[:, t - 2], x[:, t - 1]], 1, generator=generator
            )[:, 0]
        return x

    def log_prob(self, x: Tensor) -> Tensor:
        return self.next[x[:, :-2], x[:, 1:-1], x[:, 2:]].log().sum(-1) - 2 * math.log(self.V)

    def entropy(self, length: int) -> float:
        """Nats per token."""
        pair, nats = torch.full((self.V, self.V), self.V**-2.0), 2 * math.log(self.V)
        conditional = -(self.next * self.next.log()).sum(-1)
        for _ in range(length - 2):
            nats += (pair * conditional).sum().item()
            pair = torch.einsum("ab,abc->bc", pair, self.next)
        return nats / length


TRUNK = TransformerConfig(width=32, num_heads=2, mlp_ratio=2)
SMALL_FLOW = {"vocab_size": 4, "context": 16, "latent_dim": 4, "trunk": TRUNK, "head_hidden": 16}
FITS = {
    "ar": (BaselineConfig(vocab_size=4, context=16, trunk=TRUNK, layers=2), 0.05),
    "mixd-mix1": (FlowConfig(blocks=stack(("mixd", "mix1"), (2, 1), (0, 2)), **SMALL_FLOW), 0.05),
    "mixd-P2": (FlowConfig(blocks=stack(("mixd",), (2,), (0,)), patch=2, **SMALL_FLOW), 0.05),
    "mix1": (FlowConfig(blocks=stack(("mix1", "mix1"), (2, 1), (4, 2)), **SMALL_FLOW), 0.4),
}
"""Configuration, and how near the entropy the bound must come, in nats per token."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "gap"),
    [
        pytest.param(*fit, id=name, marks=[pytest.mark.nightly] * (name != "ar"))
        for name, fit in FITS.items()
    ],
)
def test_no_fit_beats_the_entropy_of_the_source_and_a_short_one_comes_near(config, gap):
    source, T, steps = MarkovSource(), 16, 200
    train, test = source.sample(32 * steps, T, seed=1), source.sample(2000, T, seed=2)
    with seeded(0):
        model = TokenLM(config) if isinstance(config, BaselineConfig) else TarFlowLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0)
    generator = torch.Generator().manual_seed(3)
    for step, batch in enumerate(train.split(32)):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, (step + 1) / 10, (steps - step) / 80)
        loss = model.bound(batch, model.draw_noise(batch, generator)).mean() / T
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        weights = log_importance_weights(model, test, samples=4, generator=generator)
    means = []
    for samples in sorted({1, len(weights)}):
        bound = (math.log(samples) - weights[:samples].logsumexp(0)) / T
        entropy, error = source.entropy(T), bound.std().item() / math.sqrt(len(test))
        assert bound.mean().item() >= entropy - 4 * error
        # against the true probabilities of the same texts most of the noise cancels
        excess = bound + source.log_prob(test) / T
        assert excess.mean().item() >= -4 * excess.std().item() / math.sqrt(len(test))
        means.append(excess.mean().item())
    assert means[0] <= gap
    assert means == sorted(means, reverse=True)
