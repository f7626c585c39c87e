"""TarFlowLM: language modelling in continuous space with Transformer autoregressive flows (arXiv 2507.00425)."""

from tarflowlm.baseline import BaselineConfig, TokenLM
from tarflowlm.checkpoint import load
from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import evaluate
from tarflowlm.generation import generate
from tarflowlm.model import FlowConfig, TarFlowLM
from tarflowlm.objective import elbo, importance_weighted_bound
from tarflowlm.training.progressive import resume, train

__all__ = [
    "BaselineConfig",
    "FlowConfig",
    "TarFlowLM",
    "TokenLM",
    "UserError",
    "elbo",
    "evaluate",
    "generate",
    "importance_weighted_bound",
    "load",
    "resume",
    "train",
]
