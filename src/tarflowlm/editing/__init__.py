"""Editing a text: draw some of its words anew given all others, or change its states."""

from tarflowlm.editing.edits import EDITS, Pick, WordSource, common_length, options_of
from tarflowlm.editing.rewriting import (
    Candidates,
    blend,
    informative_level,
    redraw,
    rewrite,
    token_costs,
)
from tarflowlm.editing.states import (
    Edit,
    Encoded,
    Source,
    encode,
    interpolate,
    renoise,
    substitute,
)

__all__ = [
    "EDITS",
    "Candidates",
    "Edit",
    "Encoded",
    "Pick",
    "Source",
    "WordSource",
    "blend",
    "common_length",
    "encode",
    "informative_level",
    "interpolate",
    "options_of",
    "redraw",
    "renoise",
    "rewrite",
    "substitute",
    "token_costs",
]
