"""Sampling from either model: free, after a prompt, or around given tokens."""

from tarflowlm.generation.generate import generate, generate_steps
from tarflowlm.generation.particles import Evidence
from tarflowlm.generation.sampling import BLANK
from tarflowlm.generation.writing import Generation

__all__ = ["BLANK", "Evidence", "Generation", "generate", "generate_steps"]
