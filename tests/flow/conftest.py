"""Fixtures of the tests of flows."""

import pytest

from tarflowlm import flow


@pytest.fixture(params=["cpu", "reference"])
def path(request, monkeypatch):
    """The fast path, and the one of accelerators."""
    if request.param == "reference":
        monkeypatch.setattr(flow, "is_eager_cpu", lambda t: False)
