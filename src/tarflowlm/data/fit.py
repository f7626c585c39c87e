"""The tokenizer that suits a text: one that keeps it as it is. Does a given one read it well?"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from tarflowlm.config import TEXT8_ALPHABET, TokenizerConfig
from tarflowlm.data.corpus import is_prepared, open_corpus
from tarflowlm.data.sources import SOURCE_NAMES, resolve_source
from tarflowlm.data.text import BLOCK, is_wrapped
from tarflowlm.data.textfile import TextFile
from tarflowlm.data.tokenizer import CharTokenizer, Tokenizer
from tarflowlm.errors import UserError
from tarflowlm.schema import from_dict

STRANGE = 0.01
"""The share of letters that text8 normalisation may lose."""
SHORT = 500_000
"""Characters below which a model of its own learns little from a text."""
MOST_CHARACTERS = 256
"""Different characters of a text up to which they are its symbols."""

log = logging.getLogger("tarflowlm")


def misfit(source: str, tokenizer: Tokenizer) -> str | None:
    """Why the user's own text suits a trained `tokenizer` badly, else None.

    The beginning of the text decides.
    """
    text = _beginning(source)
    if tokenizer.normalization == "text8":
        letters = [character for character in text if character.isalpha()]
        lost = sum(not character.isascii() for character in letters) / max(len(letters), 1)
        if lost > STRANGE:
            return f"{lost:.1%} of the letters of {source} are not a-z, and would be lost"
    elif tokenizer.kind == "bpe":
        per_character = len(tokenizer.encode(text)) / max(len(text), 1)
        if per_character > 1:
            what = f"{per_character:.1f} tokens of the model for a character of {source}"
            return f"{what}, since they were made for another language"
    return None


def check_fit(source: str, tokenizer: Tokenizer, *, unwrap: bool = False) -> None:
    """UserError where the text does not suit the tokenizer of a model that is to learn it."""
    problem = misfit(source, tokenizer)
    if isinstance(tokenizer, CharTokenizer) and tokenizer.normalization == "none":
        new = set(_beginning(source)).difference(tokenizer.alphabet)
        if new:
            problem = (
                f"{source} has characters that the model does not know, {''.join(sorted(new))!r}"
            )
    if problem is not None:
        remedy = f"`tarflowlm train english-small --data {source} --out DIR`"
        raise UserError(f"{problem}: train a new model on it: {remedy}")
    if tokenizer.normalization == "text8":
        tell_losses(source, "english-small")
    if tokenizer.normalization == "none":
        _advise(source, unwrap=unwrap)


def suited(source: str, wanted: TokenizerConfig, *, unwrap: bool = False) -> TokenizerConfig:
    """The tokenizer that is `wanted`, with the normalisation and the alphabet that are left open.

    A text of the user's own stays as it is. Its characters are the alphabet, or its tokens bytes if
    there are more than MOST_CHARACTERS; a line says so. A prepared directory has its tokenizer.
    """
    is_open = wanted.normalize == "auto"
    if is_prepared(source):
        made = open_corpus(source).meta["tokenizer_config"]
        return from_dict(TokenizerConfig, made) if is_open and made else wanted
    if is_open:
        wanted = replace(wanted, normalize="text8" if source in SOURCE_NAMES else "none")
    if wanted.normalize == "text8":
        tell_losses(source, "normalize none")
    if wanted.normalize != "none" or source == "text8":
        return wanted
    what = f"{wanted.vocab_size or 'the'} pieces of words"
    if wanted.kind == "char" and wanted.alphabet == TEXT8_ALPHABET:
        found = _characters(source)
        few = len(found) > 1
        wanted = replace(wanted, alphabet=found) if few else replace(wanted, kind="byte")
    if wanted.kind == "char":
        what = f"{len(wanted.alphabet)} different characters"
    elif wanted.kind == "byte":
        what = "256 bytes"
    if source not in SOURCE_NAMES:
        log.info("%s is read as it is; its symbols are %s", source, what)
    _advise(source, unwrap=unwrap, is_new=True)
    return wanted


def _advise(source: str, *, unwrap: bool, is_new: bool = False) -> None:
    """Tell the user of a text that is short for a new model, and of lines wrapped by hand."""
    beginning = _beginning(source)
    if is_new and 0 < len(beginning) < SHORT:
        remedy = "`train --from english-small` learns English faster; else try --train.dropout 0.1"
        log.info("%s is short for a new model: %s", source, remedy)
    if not unwrap and is_wrapped(beginning):
        log.info("the lines of %s are wrapped: --unwrap joins those of a paragraph", source)


def tell_losses(source: str, remedy: str) -> None:
    """Tell the user what the TEXT8 alphabet lacks of a text, and what keeps it."""
    marks = Counter("".join(_beginning(source).split()))
    total = marks.total()
    for letter in filter(str.isascii, list(marks)):
        if letter.isalnum():
            del marks[letter]
    if marks:
        most = " ".join(mark for mark, _ in marks.most_common(5))
        what = f"{marks.total() / total:.1%} of the characters become spaces, {most} first"
        log.info("%s is read as a-z and space: %s; %s keeps them", source, what, remedy)


def _blocks(source: str) -> Iterator[str]:
    """A text file or folder of the user's own; nothing of any other source."""
    if source not in SOURCE_NAMES and not is_prepared(source):
        found = resolve_source(source)
        yield from found.blocks() if isinstance(found, TextFile) else ()


def _beginning(source: str) -> str:
    text = ""
    for block in _blocks(source):
        text += block[:BLOCK]
        if len(text) >= BLOCK:
            break
    return text


def _characters(source: str) -> str:
    """The different characters of a text, in order; none of one that has too many."""
    seen: set[str] = set()
    for block in _blocks(source):
        seen.update(block)
        if len(seen) > MOST_CHARACTERS:
            return ""
    return "".join(sorted(seen))
