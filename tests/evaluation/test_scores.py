"""Bits of every token: exact, or shares of a bound; of one text or of many."""

import itertools
from copy import deepcopy

import pytest
import torch

import tarflowlm
from helpers import tiny_ar, tiny_flow
from tarflowlm.data import sliding_windows
from tarflowlm.errors import Progress, UserError
from tarflowlm.evaluation.likelihood import bits, evaluate
from tarflowlm.evaluation.scores import score, scores
from tarflowlm.objective import elbo

ONE_EACH = torch.ones(5, dtype=torch.int64)


def text(num_tokens: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(5, (num_tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize(
    "couplings", [("mixd",), ("mixd", "mix1"), ("mix1", "affine", "token-affine")]
)
@pytest.mark.parametrize("num_tokens", [1, 3, 8])
def test_the_bits_of_a_flow_sum_to_its_bound_and_the_blocks_to_its_log_determinants(
    couplings, num_tokens
):
    model, tokens = tiny_flow(couplings=couplings).eval(), text(num_tokens)
    found = score(model, tokens, samples=1, seed=3)
    terms = elbo(model, tokens[None], generator=torch.Generator().manual_seed(3))
    assert found.bits.shape == (num_tokens,)
    assert not found.exact
    assert f"<= {found.total:.1f} bits" in repr(found)
    assert found.total == pytest.approx(bits(terms.nelbo.item()), rel=1e-5)
    assert found.per_token == pytest.approx(found.total / num_tokens)
    log_dets = torch.stack(terms.log_dets).detach()[:, 0]
    torch.testing.assert_close(found.blocks.sum(1), bits(log_dets))


@pytest.mark.parametrize("patch", [2, 4])
def test_patches(patch):
    model, tokens = tiny_flow(patch=patch, context=16).eval(), text(8)
    terms = elbo(model, tokens[None], generator=torch.Generator().manual_seed(0))
    assert score(model, tokens, samples=1).total == pytest.approx(
        bits(terms.nelbo.item()), rel=1e-5
    )


@pytest.mark.parametrize(("couplings", "stride"), [(("mixd", "mix1"), 8), (("mixd",), 4)])
def test_long_texts_are_scored_as_evaluate_scores_their_windows(couplings, stride):
    model, tokens = tiny_flow(couplings=couplings).eval(), text(32)
    windows, given = sliding_windows(tokens.numpy(), 8, stride)
    result, seen = evaluate(model, windows, ONE_EACH, given=given, samples=3, seed=5), []
    progress = Progress()
    progress.advance = seen.append
    found = score(model, tokens, samples=3, seed=5, progress=progress)
    assert result.tokens == 32
    assert found.per_token == pytest.approx(bits(result.elbo), rel=1e-5)
    assert sum(seen) == 3 * len(windows)


@pytest.mark.parametrize("num_tokens", [9, 13, 21])
def test_the_baseline_is_exact_whatever_the_length(num_tokens):
    model, tokens = tiny_ar().eval(), text(num_tokens)
    found = score(model, tokens)
    assert found.exact
    assert found.blocks is None
    for t in range(num_tokens):
        start = max(0, -(-(t - 7) // 4)) * 4  # of the first window that holds token t
        logits = model.logits(tokens[None, start : t + 1])[0, -1]
        assert found.bits[t].item() == pytest.approx(
            bits(-logits.log_softmax(-1)[tokens[t]].item())
        )


@pytest.mark.parametrize("fields", [{}, {"patch": 4}, {"patch": 4, "in_patch": "autoregressive"}])
def test_the_probabilities_of_all_texts_sum_to_one(fields):
    """Also with an incomplete last patch."""
    model = tiny_ar(vocab_size=3, **fields).eval()
    total = sum(
        2 ** -score(model, torch.tensor(x)).total for x in itertools.product(range(3), repeat=3)
    )
    assert total == pytest.approx(1)


@pytest.mark.parametrize("num_tokens", [2, 5, 7])
def test_filler_of_an_incomplete_patch_counts_with_the_last_token(num_tokens):
    """So that the sum is a bound on the text: no text becomes more probable by a token more."""
    model, tokens = tiny_flow(patch=4).eval(), text(num_tokens)
    found = score(model, tokens, samples=2)
    whole = score(model, tokens.repeat(2)[: num_tokens + -num_tokens % 4], samples=2)
    assert found.bits.shape == (num_tokens,)
    assert found.blocks.shape == (2, num_tokens)
    assert found.total == pytest.approx(whole.total)
    torch.testing.assert_close(found.bits[:-1], whole.bits[: num_tokens - 1])


MODELS = {
    "baseline": tiny_ar(),
    "patches of the baseline": tiny_ar(patch=2),
    "one block": tiny_flow(couplings=("mixd",)),
    "several blocks": tiny_flow(couplings=("mixd", "mix1")),
    "patches": tiny_flow(couplings=("mixd", "mix1"), patch=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_many_texts_have_the_bits_of_one_after_the_other(name):
    """With one window or several, of equal lengths or not, in any order."""
    model = MODELS[name].eval()
    texts = [text(length, seed=seed) for seed, length in enumerate((3, 21, 8, 1, 8, 33, 21, 3))]
    progress, seen = Progress(), []
    progress.advance = seen.append
    alone = [score(model, tokens, samples=2, seed=4, progress=progress) for tokens in texts]
    windows, batches = sum(seen), len(seen)
    seen.clear()
    found = scores(model, texts, samples=2, seed=4, progress=progress)
    for one, other in zip(found, alone, strict=True):
        assert one.exact == other.exact
        torch.testing.assert_close(one.bits, other.bits)
        if other.blocks is not None:
            torch.testing.assert_close(one.blocks, other.blocks)
    assert sum(seen) == windows
    assert len(seen) < batches
    assert scores(model, []) == []


@pytest.mark.parametrize("name", MODELS)
def test_a_score_that_is_not_finite_is_an_error(name):
    model = deepcopy(MODELS[name]).float()
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 1e30)
    for call in (score, lambda model, x: evaluate(model, x[None], ONE_EACH)):
        with pytest.raises(UserError, match="the likelihood is not finite"):
            call(model, text(8))


def test_a_number_of_samples_that_would_never_end_is_refused():
    model, tokens = MODELS["one block"], text(3)
    for call in (score, tarflowlm.importance_weighted_bound):
        with pytest.raises(UserError, match=r"samples 1000000000000: must be .* at most 1,000,000"):
            call(model, tokens if call is score else tokens[None], samples=10**12)
