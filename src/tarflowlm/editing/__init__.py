"""Editing a text: draw some of its words anew given all others, or change its states."""

from tarflowlm.editing.edits import EDITS, WordSource, options_of
from tarflowlm.editing.states import Edit, encode

__all__ = ["EDITS", "Edit", "WordSource", "encode", "options_of"]
