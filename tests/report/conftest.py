"""The runs to report on."""

import importlib.util

from run_cases import runs  # noqa: F401

collect_ignore_glob = ["*"] if importlib.util.find_spec("matplotlib") is None else []
