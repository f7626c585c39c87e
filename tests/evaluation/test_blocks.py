"""Geometry of states against known answers; terms of the bound against the objective and against
truncated models.
"""

import itertools
import math

import pytest
import torch

from helpers import normal, tiny_flow
from tarflowlm.evaluation.blocks import (
    bound_parts,
    latent_report,
    mean_cosine,
    mean_norm,
    participation_ratio,
)
from tarflowlm.evaluation.likelihood import evaluate
from tarflowlm.model import TarFlowLM
from tarflowlm.objective import elbo
from tarflowlm.progress import Silent

FLOWS = {
    "affine": {"couplings": ("affine", "affine")},
    "mixd-mix1-mix1": {"couplings": ("mixd", "mix1", "mix1")},
    "mix1": {"couplings": ("mix1", "mix1")},
    "mixd-mix1-P2": {"couplings": ("mixd", "mix1"), "patch": 2},
}
CHARACTERS = torch.tensor([1, 0, 2, 3, 7])


def test_norm_is_the_mean_over_vectors():
    states = torch.tensor([[[3.0, 4.0], [-3.0, -4.0]], [[0.0, 2.0], [0.0, 0.0]]])
    assert mean_norm(states).tolist() == [5.0, 1.0]


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


def test_bound_parts_equal_the_elbo_terms(model, windows):
    parts = bound_parts(model, windows, CHARACTERS)
    noise = model.draw_noise(windows, torch.Generator().manual_seed(0))
    terms = elbo(model, windows, noise=noise)

    def per_token(value):
        return pytest.approx(value.detach().mean().item() / 8, rel=1e-9, abs=1e-12)

    assert parts.reconstruction == per_token(terms.reconstruction)
    assert parts.log_q == per_token(terms.log_q)
    assert parts.bases[-1] == per_token(terms.base)
    assert list(parts.log_dets) == [per_token(value) for value in terms.log_dets]
    assert parts.kl == per_token(terms.log_q - terms.log_prior)
    assert parts.bounds[-1] == per_token(terms.nelbo)
    assert (parts.windows, parts.tokens, parts.characters) == (
        6,
        48,
        int(CHARACTERS[windows].sum()),
    )


def test_batches_draw_the_noise_of_evaluate():
    model = tiny_flow().eval()
    windows = torch.randint(5, (1500, 8), generator=torch.Generator().manual_seed(4))
    seen, progress = [], Silent()
    progress.advance = seen.append
    parts = bound_parts(model, windows, CHARACTERS, seed=3, progress=progress)
    assert seen == [1024, 476]
    assert parts.bounds[-1] == pytest.approx(
        evaluate(model, windows, CHARACTERS, seed=3).nats_per_token, rel=1e-9
    )


def test_bound_parts_agree_with_latent_report(model, windows):
    parts, report = (
        bound_parts(model, windows, CHARACTERS, seed=5),
        latent_report(model, windows, seed=5),
    )
    assert parts.bounds == pytest.approx([state.nelbo.mean for state in report])
    assert parts.gains == pytest.approx([state.kl_gain.mean for state in report[1:]])
    assert sum(parts.gains) == pytest.approx(report[0].kl.mean - report[-1].kl.mean)
    assert (report[0].centroid_shift, report[0].log_det, report[0].kl_gain) == (None, None, None)
