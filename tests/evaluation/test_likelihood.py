"""Units, spread and repeatability of the likelihood."""

import math
from dataclasses import replace

import pytest
import torch

from helpers import tiny_ar, tiny_flow
from tarflowlm.data import sliding_windows
from tarflowlm.evaluation.likelihood import evaluate, sign_of

ONE_EACH = torch.ones(5, dtype=torch.int64)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(5, (7, 8), generator=torch.Generator().manual_seed(2))


def text(num_tokens: int) -> torch.Tensor:
    return torch.randint(5, (num_tokens,), generator=torch.Generator().manual_seed(5))


def test_units_of_an_exact_likelihood(windows):
    model = tiny_ar().eval()
    result = evaluate(model, windows, ONE_EACH)
    nats = -model.log_prob(windows).detach()
    assert (result.bound, sign_of(result.bound)) == ("exact", "=")
    assert result.nats_per_token == pytest.approx(nats.sum().item() / windows.numel())
    assert result.ppl == pytest.approx(math.exp(result.nats_per_token))
    assert result.bpc == pytest.approx(result.nats_per_token / math.log(2))
    assert result.stderr == pytest.approx((nats / 8).std().item() / math.sqrt(7))
    assert (result.windows, result.tokens, result.characters, result.samples) == (7, 56, 56, 1)
    assert result.bits_per_byte is None
    result = evaluate(model, windows, ONE_EACH, bytes_per_token=2 * ONE_EACH)
    assert (result.characters, result.bytes) == (56, 112)
    assert result.bits_per_byte == pytest.approx(result.bpc / 2)
    assert replace(result, nats_per_token=1000.0).to_json()["ppl"] == math.inf
    # ends of documents alone
    nothing = evaluate(model, windows, 0 * ONE_EACH, bytes_per_token=0 * ONE_EACH).to_json()
    assert nothing["bpc"] == nothing["bits_per_byte"] == math.inf


def test_several_samples_give_elbo_and_gap(windows):
    model = tiny_flow(log_std=0.2).eval()
    result = evaluate(model, windows, ONE_EACH, samples=6, seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        draws = (
            torch.stack(
                [model.bound(windows, model.draw_noise(windows, generator)) for _ in range(6)]
            )
            / 8
        )
    assert result.elbo == pytest.approx(draws.mean().item())
    assert result.elbo_stderr == pytest.approx(draws.mean(0).std().item() / math.sqrt(7))
    assert result.elbo_sampling_stderr == pytest.approx(
        draws.var(0).mean().sqrt().item() / math.sqrt(7 * 6)
    )
    assert result.gap == pytest.approx(result.elbo - result.nats_per_token)
    assert result.gap > 0
    assert (result.bound, sign_of(result.bound)) == ("iw-6", "<=")
    assert evaluate(model, windows, ONE_EACH, samples=6, seed=3) == result
    one = evaluate(model, windows, ONE_EACH, seed=3)
    assert one.nats_per_token == pytest.approx(draws[0].mean().item())
    assert (one.bound, one.elbo, one.gap, one.elbo_sampling_stderr) == (
        "elbo",
        one.nats_per_token,
        None,
        None,
    )


@pytest.mark.slow
def test_sampling_error_equals_the_spread_over_seeds(windows):
    model = tiny_flow(log_std=0.2).eval()
    results = [evaluate(model, windows, ONE_EACH, samples=2, seed=seed) for seed in range(60)]
    spread = torch.tensor([r.elbo for r in results]).std().item()
    stated = torch.tensor([r.elbo_sampling_stderr for r in results]).square().mean().sqrt().item()
    assert stated == pytest.approx(spread, rel=0.3)


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_sliding_windows_score_every_token_once(stride):
    model, tokens, T = tiny_ar().eval(), text(33), 8
    windows, given = sliding_windows(tokens.numpy(), T, stride)
    result = evaluate(model, windows, ONE_EACH, given=given)
    scored = T + (33 - T) // stride * stride
    nats = 0.0
    for t in range(scored):
        start = max(0, -(-(t + 1 - T) // stride)) * stride  # of the first window that holds token t
        context = tokens[start : t + 1]
        logits = model.logits(torch.nn.functional.pad(context, (0, 1))[None])[0, t - start]
        nats -= logits.log_softmax(-1)[tokens[t]].item()
    assert (result.tokens, result.characters) == (scored, scored)
    assert result.nats_per_token == pytest.approx(nats / scored)


@pytest.mark.slow
def test_stderr_of_unequal_windows_equals_the_jackknife():
    model = tiny_ar().eval()
    windows, given = sliding_windows(text(330).numpy(), 8, 3)
    whole = evaluate(model, windows, ONE_EACH, given=given)
    keeps = [torch.arange(len(windows)) != i for i in range(len(windows))]
    left_out = [
        evaluate(model, windows[keep], ONE_EACH, given=given[keep]).nats_per_token for keep in keeps
    ]
    jackknife = (
        torch.tensor(left_out, dtype=torch.float64)
        .var(unbiased=False)
        .mul(len(windows) - 1)
        .sqrt()
        .item()
    )
    assert whole.stderr == pytest.approx(jackknife, rel=0.02)
