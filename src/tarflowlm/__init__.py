"""TarFlowLM: language modelling in continuous space with Transformer autoregressive flows (arXiv 2507.00425)."""

from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tarflowlm.baseline import BaselineConfig, TokenLM
    from tarflowlm.errors import UserError
    from tarflowlm.evaluation.likelihood import Scores, evaluate, score
    from tarflowlm.generation import generate
    from tarflowlm.model import FlowConfig, TarFlowLM
    from tarflowlm.objective import elbo, importance_weighted_bound
    from tarflowlm.pretrained import Pretrained, from_pretrained, load
    from tarflowlm.training.train import resume, train

__all__ = [
    "BaselineConfig", "FlowConfig", "Pretrained", "Scores", "TarFlowLM", "TokenLM", "UserError", "elbo", "evaluate",
    "from_pretrained", "generate", "importance_weighted_bound", "load", "resume", "score", "train",
]  # fmt: skip

_MODULES = {
    "BaselineConfig": "baseline", "FlowConfig": "model", "Pretrained": "pretrained",
    "Scores": "evaluation.likelihood", "TarFlowLM": "model", "TokenLM": "baseline", "UserError": "errors",
    "elbo": "objective", "evaluate": "evaluation.likelihood", "from_pretrained": "pretrained",
    "generate": "generation", "importance_weighted_bound": "objective", "load": "pretrained",
    "resume": "training.train", "score": "evaluation.likelihood", "train": "training.train",
}  # fmt: skip
"""The module of every public name, imported on first use: PyTorch reads some environment variables at import, and the
command line has to set them first."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return metadata.version("tarflowlm")
        except metadata.PackageNotFoundError:
            return "unknown"
    if name not in _MODULES:
        if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # so that later uses skip this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
