"""Editing a text: redraw some of its words given all others, or change its states in latent space."""

from tarflowlm.editing.proposals import telling_level
from tarflowlm.editing.rewriting import blend, redraw, rewrite, token_costs
from tarflowlm.editing.states import Edit, Encoded, bound, encode, interpolate, renoise, substitute

__all__ = [
    "Edit",
    "Encoded",
    "blend",
    "bound",
    "encode",
    "interpolate",
    "redraw",
    "renoise",
    "rewrite",
    "substitute",
    "telling_level",
    "token_costs",
]
