"""Editing a text: resample some of its words given all others, or change its states in latent
space.
"""

from tarflowlm.editing.edits import (
    EDITS,
    EditKind,
    Redraw,
    Renoise,
    Replace,
    Rewrite,
    Source,
    Toward,
    common_length,
)
from tarflowlm.editing.rewriting import blend, informative_level, redraw, rewrite, token_costs
from tarflowlm.editing.states import Edit, Encoded, bound, encode, interpolate, renoise, substitute

__all__ = [
    "EDITS",
    "Edit",
    "EditKind",
    "Encoded",
    "Redraw",
    "Renoise",
    "Replace",
    "Rewrite",
    "Source",
    "Toward",
    "blend",
    "bound",
    "common_length",
    "encode",
    "informative_level",
    "interpolate",
    "redraw",
    "renoise",
    "rewrite",
    "substitute",
    "token_costs",
]
