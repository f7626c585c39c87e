"""Whether a text suits a tokenizer: a text in other letters is lost, or spelled byte by byte."""

import logging
from itertools import islice

from tarflowlm.config import Normalization, TokenizerConfig
from tarflowlm.data.corpus import is_prepared
from tarflowlm.data.sources import SOURCE_NAMES, resolve_source
from tarflowlm.data.text import BLOCK
from tarflowlm.data.textfile import TextFile
from tarflowlm.data.tokenizer import Tokenizer
from tarflowlm.errors import UserError

STRANGE = 0.01
"""The share of letters that text8 normalisation may lose."""

log = logging.getLogger("tarflowlm")


def misfit(source: str, how: Normalization, tokenizer: Tokenizer | None = None) -> str | None:
    """Why the user's own text suits a normalisation or a trained `tokenizer` badly, else None.

    The beginning of the text decides.
    """
    if source in SOURCE_NAMES or is_prepared(source):
        return None
    found = resolve_source(source)
    if not isinstance(found, TextFile):
        return None
    text = "".join(islice(found.blocks(), 2))[:BLOCK]
    if how == "text8":
        letters = [character for character in text if character.isalpha()]
        lost = sum(not character.isascii() for character in letters) / max(len(letters), 1)
        if lost > STRANGE:
            return f"{lost:.1%} of the letters of {source} are not a-z, and would be lost"
    elif tokenizer is not None and tokenizer.kind == "bpe":
        per_character = len(tokenizer.encode(text)) / max(len(text), 1)
        if per_character > 1:
            what = f"{per_character:.1f} tokens of the model for a character of {source}"
            return f"{what}, since they were made for another language"
    return None


def suited(source: str, wanted: TokenizerConfig) -> TokenizerConfig:
    """The tokenizer that is `wanted`; instead of the default one, bytes for a text that it loses.

    A text that another tokenizer loses in part is only reported.
    """
    problem = misfit(source, wanted.normalize)
    if problem is None:
        return wanted
    if wanted != TokenizerConfig():
        log.warning("%s: keep them with a byte or BPE tokenizer and normalize none", problem)
        return wanted
    log.warning("%s: its tokens are bytes, which keep all", problem)
    return TokenizerConfig(kind="byte", normalize="none")


def check_fit(source: str, tokenizer: Tokenizer) -> None:
    """UserError where the text does not suit the tokenizer of a model that is to learn it."""
    problem = misfit(source, tokenizer.normalization, tokenizer)
    if problem is not None:
        remedy = f"`tarflowlm train english-small --data {source} --out DIR`"
        raise UserError(f"{problem}: train a new model on it: {remedy}")
