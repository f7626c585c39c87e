"""The browser of the tests that open a page.

Needs Chromium. Where TARFLOWLM_BROWSER is set to its path the tests insist on it; elsewhere they
skip without one.
"""

import importlib.util
import os
import shutil

import pytest

INSISTED = os.environ.get("TARFLOWLM_BROWSER")
BROWSER = INSISTED or shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
]


def need_browser(*packages: str) -> None:
    """Skip the module that calls this where it lacks a package or Chromium."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not INSISTED and (missing or BROWSER is None):
        what = " and ".join(missing) or "chromium"
        pytest.skip(f"no {what} to test the page with", allow_module_level=True)
