"""Fixtures of the tests of generation."""

import math

import pytest

from tarflowlm.language_model import LanguageModel

MODELS = {
    "ar": {}, "ar-P2": {"patch": 2, "in_patch": "autoregressive"},
    "mixd": {"couplings": ("mixd",)}, "mixd-mix1": {"couplings": ("mixd", "mix1", "mix1")},
    "affine-P2": {"couplings": ("affine", "affine"), "patch": 2},
    "mixd-mix1-P4": {"couplings": ("mixd", "mix1"), "patch": 4},
}  # fmt: skip


@pytest.fixture(params=MODELS.items(), ids=MODELS.keys())
def model(request, tiny_flow, tiny_ar) -> LanguageModel:
    """Both families, with and without patches, all with a context of 8 tokens."""
    name, fields = request.param
    return tiny_ar(**fields) if name.startswith("ar") else tiny_flow(**fields)


@pytest.fixture
def any_stack(monkeypatch):
    """Tokens are chosen in block 1 however much the blocks above it know: random ones know a lot."""
    monkeypatch.setattr("tarflowlm.generation.sampling.MOST_LOST", math.inf)
