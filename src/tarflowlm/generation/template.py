"""Templates: text with blanks, as tokens."""

import re

import torch
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.errors import UserError

BLANK = -1
"""Stands in a template for a token that is to be drawn."""


def encode_template(tokenizer: Tokenizer, text: str, blank: str = "_") -> Tensor:
    """Token ids [n] of a text in which every `blank` stands for one token to be drawn (BLANK).

    What stands between blanks is encoded piece by piece. Raises UserError for an empty template, a blank that is not
    a single character or that the tokenizer's alphabet has as a symbol of its own, and unknown characters.
    """
    if len(blank) != 1:
        raise UserError(f"blank {blank!r}: must be a single character")
    if not text:
        raise UserError("the template is empty: give text with at least one token or blank")
    if tokenizer.kind == "char" and blank in tokenizer.symbols:
        raise UserError(f"blank {blank!r} is a character of the model's alphabet: choose another with --blank")
    pieces: list[int] = []
    for piece in re.split(f"({re.escape(blank)})", text):
        pieces += [BLANK] if piece == blank else tokenizer.encode(piece).tolist() if piece else []
    return torch.tensor(pieces)
