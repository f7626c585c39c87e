"""Fixtures of the tests of generation."""

import pytest

from helpers import FILLS, mostly_nightly, tiny_ar, tiny_flow
from tarflowlm.model import LanguageModel

LEFT = {"alternate": False, "log_std": -4.0}
MODELS = {
    "ar": {},
    "ar-P2": {"patch": 2, "in_patch": "autoregressive"},
    "mixd": {"couplings": ("mixd",)},
    "mixd-mix1": {"couplings": ("mixd", "mix1", "mix1")},
    "affine-P2": {"couplings": ("affine", "affine"), "patch": 2},
    "mixd-mix1-P4": {"couplings": ("mixd", "mix1"), "patch": 4},
    "fills": FILLS | LEFT,
    "fills-P2": FILLS | LEFT | {"patch": 2},
}


@pytest.fixture(params=mostly_nightly(MODELS, "ar", "mixd-mix1", "mixd-mix1-P4", "fills"))
def model(request) -> LanguageModel:
    """Both families, with and without patches, all with a context of 8 tokens."""
    name = request.param
    fields = MODELS[name]
    return tiny_ar(**fields) if name.startswith("ar") else tiny_flow(**fields)
