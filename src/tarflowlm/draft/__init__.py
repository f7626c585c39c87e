"""The draft network of block 1: it guesses coming tokens from their noise (docs/math.md, section 7)."""

from tarflowlm.draft.network import Draft, DraftConfig

__all__ = ["Draft", "DraftConfig"]
