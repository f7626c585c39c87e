"""Fixtures of the tests of generation."""

import math

import pytest


@pytest.fixture
def any_stack(monkeypatch):
    """Tokens are chosen in block 1 however much the blocks above it know: random ones know a lot."""
    monkeypatch.setattr("tarflowlm.generation.sampling.MOST_LOST", math.inf)
