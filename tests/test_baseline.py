"""The discrete baseline: a normalised, causal distribution over texts, the same with and without a
cache.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from helpers import tiny_ar
from tarflowlm.baseline import TokenLM
from tarflowlm.model import seeded
from tarflowlm.model_config import BaselineConfig

FORMS = {
    "P1": {"patch": 1},
    "P1-in-patch": {"patch": 1, "in_patch": "autoregressive"},
    "P2-independent": {"patch": 2},
    "P2-in-patch": {"patch": 2, "in_patch": "autoregressive"},
    "P4-in-patch": {"patch": 4, "in_patch": "autoregressive"},
}
T, V = 8, 5


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def lm(request) -> TokenLM:
    return tiny_ar(layers=2, **request.param)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(V, (3, T), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_logits_see_earlier_patches_and_earlier_tokens_of_their_own_if_autoregressive(lm, tokens):
    logits, P = lm.logits(tokens), lm.config.patch
    for changed in range(T):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % V
        differs = (lm.logits(other) - logits).abs().amax((0, 2)) > 1e-9
        first = changed + 1 if lm.config.in_patch == "autoregressive" else (changed // P + 1) * P
        assert differs.tolist() == [t >= first for t in range(T)]


@torch.no_grad()
@pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS.keys())
def test_probabilities_of_all_texts_sum_to_one(fields):
    lm = tiny_ar(vocab_size=3, context=4, **fields)
    texts = torch.tensor(list(itertools.product(range(3), repeat=4)))
    assert lm.log_prob(texts).exp().sum().item() == pytest.approx(1.0, abs=1e-10)


@torch.no_grad()
def test_cached_features_equal_the_parallel_pass(lm, tokens):
    P = lm.config.patch
    expected = lm.logits(tokens).view(3, T // P, P, V)
    cache, previous = lm.allocate_cache(3, T // P), None
    for n, patch in enumerate(tokens.split(P, dim=1)):
        walk, token = lm.log_weights(lm.features_at(cache, previous)), None
        for place in range(P):
            logits = walk.send(token)
            torch.testing.assert_close(logits, expected[:, n, place], rtol=1e-10, atol=1e-10)
            token = patch[:, place : place + 1]
        previous = patch


def test_every_parameter_gets_a_gradient(lm):
    tokens = torch.arange(3 * T).view(3, T).remainder(V)
    lm.log_prob(tokens).sum().backward()
    assert not [
        n for n, p in lm.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())
    ]


def test_a_new_baseline_is_the_uniform_distribution(tokens):
    with seeded(0):
        lm = TokenLM(BaselineConfig(vocab_size=V, context=T))
    for given in (tokens, tokens.int()):
        torch.testing.assert_close(lm.log_prob(given), torch.full((3,), -T * math.log(V)))


def test_half_precision_products_leave_logits_in_float32(tokens):
    lm = tiny_ar(patch=2, in_patch="autoregressive").float()
    exact = lm.log_prob(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        log_prob = lm.log_prob(tokens)
        assert lm.logits(tokens).dtype == log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, exact, rtol=0.05, atol=0.5)
