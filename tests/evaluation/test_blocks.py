"""Geometry of states against known answers; terms of the bound against the objective and against
truncated models.
"""

import itertools
import math

import pytest
import torch

from helpers import normal, tiny_flow
from tarflowlm.errors import Progress
from tarflowlm.evaluation.blocks import (
    latent_report,
    mean_cosine,
    participation_ratio,
    state_metrics,
)
from tarflowlm.evaluation.likelihood import evaluate
from tarflowlm.model import TarFlowLM
from tarflowlm.objective import elbo

FLOWS = {
    "affine": {"couplings": ("affine", "affine")},
    "mixd-mix1-mix1": {"couplings": ("mixd", "mix1", "mix1")},
    "mix1": {"couplings": ("mix1", "mix1")},
    "mixd-mix1-P2": {"couplings": ("mixd", "mix1"), "patch": 2},
}


def test_norm_is_the_mean_over_vectors():
    states = torch.tensor([[[3.0, 4.0], [-3.0, -4.0]], [[0.0, 2.0], [0.0, 0.0]]])
    assert state_metrics([states])[0]["norm"].tolist() == [5.0, 1.0]


def test_cosine_equals_the_mean_over_pairs():
    states = normal(2, 9, 4) + 0.5
    for row, value in zip(states, mean_cosine(states), strict=True):
        pairs = [torch.cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(row, 2)]
        assert value.item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-12)


def test_participation_ratio_equals_the_eigenvalue_formula():
    states = normal(3, 20, 6) @ torch.diag(
        torch.tensor([1.0, 2.0, 0.1, 4.0, 1.0, 0.5], dtype=torch.float64)
    )
    for row, value in zip(states, participation_ratio(states), strict=True):
        eigenvalues = torch.linalg.eigvalsh(torch.cov(row.T))
        assert value.item() == pytest.approx(
            (eigenvalues.sum() ** 2 / eigenvalues.square().sum()).item()
        )


@pytest.fixture(params=FLOWS.values(), ids=FLOWS.keys())
def model(request) -> TarFlowLM:
    return tiny_flow(**request.param).eval()


@pytest.fixture
def windows():
    return torch.randint(5, (6, 8), generator=torch.Generator().manual_seed(2))


def test_bound_after_a_block_equals_the_truncated_model(model, windows):
    report = latent_report(model, windows, seed=3)
    assert [state.block for state in report] == list(range(model.num_blocks + 1))
    for state in report[1:]:
        cut = TarFlowLM(model.config.first_blocks(state.block)).double()
        cut.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad():
            terms = elbo(cut, windows, generator=torch.Generator().manual_seed(3))
        nelbo, log_det = terms.nelbo / 8, terms.log_dets[-1] / 8
        kl = (terms.log_q - terms.log_prior) / 8
        for spread, values in ((state.nelbo, nelbo), (state.log_det, log_det), (state.kl, kl)):
            assert (spread.mean, spread.std) == pytest.approx(
                (values.mean().item(), values.std().item())
            )


def test_divergence_without_blocks_has_the_closed_form(windows):
    """KL( N(mu, sigma^2) || N(0, 1) ) per channel, from many draws of the posterior."""
    model = tiny_flow(couplings=("affine",), log_std=-0.7)
    report = latent_report(model, windows.repeat(500, 1))
    expected = (
        0.5
        * (model.codebook.mean[windows].square() + math.exp(-1.4) - 1 + 1.4).sum(-1).mean().item()
    )
    assert report[0].kl.mean == pytest.approx(expected, abs=0.02)


def test_terms_of_the_last_state_are_those_of_the_elbo(model, windows):
    report = latent_report(model, windows)
    noise = model.draw_noise(windows, torch.Generator().manual_seed(0))
    terms = elbo(model, windows, noise=noise)

    def per_token(value):
        return pytest.approx(value.detach().mean().item() / 8, rel=1e-9, abs=1e-12)

    last = report[-1]
    assert last.base.mean == per_token(terms.base)
    assert last.kl.mean == per_token(terms.log_q - terms.log_prior)
    assert last.nelbo.mean == per_token(terms.nelbo)
    for state, log_det in zip(report[1:], terms.log_dets, strict=True):
        assert state.log_det.mean == per_token(log_det)


def test_gains_add_up_to_what_the_blocks_lower(model, windows):
    first, *rest = latent_report(model, windows, seed=5)
    gains = sum(state.kl_gain.mean for state in rest)
    assert gains == pytest.approx(first.kl.mean - rest[-1].kl.mean)
    assert gains == pytest.approx(first.nelbo.mean - rest[-1].nelbo.mean)
    assert (first.centroid_shift, first.log_det, first.kl_gain) == (None, None, None)


def test_batches_draw_the_noise_of_evaluate():
    model = tiny_flow().eval()
    windows = torch.randint(5, (1500, 8), generator=torch.Generator().manual_seed(4))
    seen, progress = [], Progress()
    progress.advance = seen.append
    report = latent_report(model, windows, seed=3, progress=progress)
    assert seen == [1024, 476]
    found = evaluate(model, windows, torch.ones(5), seed=3)
    assert report[-1].nelbo.mean == pytest.approx(found.nats_per_token, rel=1e-9)
