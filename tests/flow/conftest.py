"""Fixtures of the tests of flows."""

import pytest


@pytest.fixture(params=["cpu", "reference"])
def path(request):
    """The fast path, and the one of accelerators."""
    if request.param == "reference":
        request.getfixturevalue("accelerator")
