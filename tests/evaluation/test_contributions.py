"""The bound taken apart adds up to the bound, and its parts are those of the objective."""

import copy

import pytest
import torch

from tarflowlm.evaluation.contributions import contributions
from tarflowlm.evaluation.likelihood import evaluate
from tarflowlm.objective import elbo

MODELS = {
    "mixd": {"couplings": ("mixd", "mix1", "mix1")},
    "mix1": {"couplings": ("mix1", "mix1")},
    "affine": {"couplings": ("affine", "affine", "affine")},
    "patch": {"couplings": ("mixd", "mix1"), "patch": 2},
}
CHARACTERS = torch.tensor([1, 0, 2, 3, 7])


@pytest.fixture(scope="module")
def windows():
    return torch.randint(5, (6, 8), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
def test_the_terms_are_those_of_the_elbo(tiny_flow, windows, fields):
    model = tiny_flow(**fields).eval()
    parts = contributions(model, windows, CHARACTERS)
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
    assert (parts.windows, parts.tokens, parts.characters) == (6, 48, int(CHARACTERS[windows].sum()))


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
def test_bounds_of_the_first_blocks_are_those_of_the_shorter_models(tiny_flow, windows, fields):
    model = tiny_flow(**fields).eval()
    parts = contributions(model, windows, CHARACTERS)
    assert len(parts.bounds) == model.num_blocks + 1
    for blocks, bound in enumerate(parts.bounds):
        shorter = copy.deepcopy(model)
        shorter.prior.blocks = shorter.prior.blocks[:blocks]
        result = evaluate(shorter, windows, CHARACTERS)
        assert bound == pytest.approx(result.nats_per_token, rel=1e-9)
        assert parts.bpc(bound) == pytest.approx(result.bpc, rel=1e-9)
    assert sum(parts.gains) == pytest.approx(parts.bounds[0] - parts.bounds[-1])


def test_batches_and_progress(tiny_flow):
    model = tiny_flow().eval()
    windows = torch.randint(5, (1500, 8), generator=torch.Generator().manual_seed(4))
    seen = []
    parts = contributions(model, windows, CHARACTERS, seed=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1024, 1500), (1500, 1500)]
    assert parts.bounds[-1] == pytest.approx(evaluate(model, windows, CHARACTERS, seed=3).nats_per_token, rel=1e-9)
