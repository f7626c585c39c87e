"""Two runs that a page may show, and the catalogue with them."""

import shutil
from pathlib import Path

import pytest

from tarflowlm_apps.studio.catalogue import Catalogue


@pytest.fixture(scope="session")
def folder(runs, tmp_path_factory) -> Path:
    """Finished runs `flow` and `baseline`; do not change them."""
    root = tmp_path_factory.mktemp("studio")
    for name, kind in (("flow", "progressive"), ("baseline", "baseline")):
        shutil.copytree(runs[kind], root / name)
    return root


@pytest.fixture(scope="session")
def catalogue(folder) -> Catalogue:
    return Catalogue([str(folder)])
