"""Sampling from either model: free, after a prompt, or around given tokens."""

from tarflowlm.generation.generate import generate
from tarflowlm.generation.sampling import BLANK
from tarflowlm.generation.writing import Generation, Watch

__all__ = ["BLANK", "Generation", "Watch", "generate"]
