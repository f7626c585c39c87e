"""Generation of text by either model."""

from tarflowlm.generation.generate import Generation, generate

__all__ = ["Generation", "generate"]
