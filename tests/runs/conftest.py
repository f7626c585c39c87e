"""Classes and functions of a user's own, which tests register and forget."""

import sys

import pytest

from tarflowlm.config import OPTIMIZERS, SCHEDULES, TOKENIZERS
from tarflowlm.model_config import COUPLINGS, FAMILIES, LAYERS

REGISTRIES = (COUPLINGS, FAMILIES, LAYERS, TOKENIZERS, OPTIMIZERS, SCHEDULES)


@pytest.fixture
def forget():
    """forget(): nothing of a user's own is registered, as in a new process."""
    before = [dict(known) for known in REGISTRIES]

    def restore() -> None:
        for module in ("my_parts", "my_training"):
            sys.modules.pop(module, None)
        for known, kinds in zip(REGISTRIES, before, strict=True):
            known.clear()
            known.update(kinds)

    yield restore
    restore()
