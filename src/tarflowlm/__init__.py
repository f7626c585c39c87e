"""TarFlowLM: language modelling in continuous space with Transformer autoregressive flows.

The paper is arXiv 2507.00425.

import tarflowlm

lm = tarflowlm.load("stories")    # a shipped model, a run directory, or hf:OWNER/NAME
lm.write("The old king", length=60, temperature=0.8)    # also lm.stream, piece by piece
lm.fill("The _ ran into the _")                             # blanks anywhere
lm.edit("The fox ran into the wood", words=1)               # words resampled given all others
lm.score("The fox ran into the wood").total                 # bits, an upper bound
mine = tarflowlm.train("mini-mixd", "runs/mine", data="my_text.txt", minutes=5)
mine = lm.tune("my_text.txt", "runs/tuned", minutes=10)

model, tokenizer = lm                   # modules of PyTorch
tarflowlm.elbo, tarflowlm.importance_weighted_bound, tarflowlm.generate, tarflowlm.evaluate
tarflowlm.preset, tarflowlm.RunConfig, tarflowlm.FlowConfig, tarflowlm.BaselineConfig,
tarflowlm.coupling, tarflowlm.layer, tarflowlm.tokenizer, tarflowlm.optimizer, tarflowlm.schedule
"""

import importlib as _importlib
import importlib.util as _util
import pathlib as _pathlib
import re as _re

_STUB = _pathlib.Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_MODULES = {name: module for module, name in _re.findall(r"from (\S+) import (\w+)", _STUB)}
"""The module of every public name, imported on first use.

PyTorch reads some environment variables at import, and the command line has to set them first.
There is no `__all__`, with which `help` would print all of their classes.
"""


def __getattr__(name: str) -> object:
    if name == "__version__":
        # it takes longer to import than all the rest
        _metadata = _importlib.import_module("importlib.metadata")
        try:
            return _metadata.version("tarflowlm")
        except _metadata.PackageNotFoundError:
            return "unknown"
    if name in _MODULES:
        value: object = getattr(_importlib.import_module(_MODULES[name]), name)
        globals()[name] = value  # so that later uses skip this function
        return value
    if not name.startswith("_") and _util.find_spec(f"{__name__}.{name}") is not None:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_nearest(name)}")


_PLACES = ("model_config", "config", "requests", "data", "flow")
"""The modules that have what is used beside the public names."""


def _nearest(name: str) -> str:
    """Where an attribute is that this module does not have, or the public name most like it."""
    if name.startswith("_"):
        return ""
    for place in _PLACES:
        found = _importlib.import_module(f"{__name__}.{place}")
        if hasattr(found, name):
            return f": it is in {found.__name__}"
    guess = _importlib.import_module(f"{__name__}.errors").guess(name, _MODULES)
    return f"; {guess}".rstrip("; ")


def __dir__() -> list[str]:
    return sorted(_MODULES)
