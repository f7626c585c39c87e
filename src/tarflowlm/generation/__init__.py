"""Sampling from either model: free, after a prompt, or around given tokens."""

from tarflowlm.generation.generate import Generation, generate

__all__ = ["Generation", "generate"]
