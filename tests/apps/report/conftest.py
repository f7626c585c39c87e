"""Reports need matplotlib."""

import importlib.util

collect_ignore_glob = ["*"] if importlib.util.find_spec("matplotlib") is None else []
