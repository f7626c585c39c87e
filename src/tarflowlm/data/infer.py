"""The tokenizer that suits a text of the user's own, and the reasons why a given one does not."""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from tarflowlm.config import TEXT8_ALPHABET, DataConfig, TokenizerConfig
from tarflowlm.data.corpus import is_prepared, open_corpus
from tarflowlm.data.library import CharTokenizer
from tarflowlm.data.normalize import is_wrapped
from tarflowlm.data.reading import BLOCK, FIELD
from tarflowlm.data.sources import SOURCE_NAMES, resolve_source
from tarflowlm.data.text_files import TextFiles
from tarflowlm.data.tokenizer import Tokenizer
from tarflowlm.errors import counted
from tarflowlm.schema import from_dict

STRANGE_SHARE = 0.01
"""The share of letters that text8 normalisation may lose."""
SHORT_TEXT = 500_000
"""A new model learns little from a text with fewer characters."""
MOST_SYMBOLS = 256
"""The symbols of a text are its different characters if there are at most this many."""

log = logging.getLogger("tarflowlm")


def infer_tokenizer(text: DataConfig) -> DataConfig:
    """The text with a normalisation and an alphabet for its tokenizer, where these were left open.

    A text of the user's own is not normalised. Its characters are the alphabet, or if there are
    more than MOST_SYMBOLS, bytes are its tokens; a line says so. More lines say what text8 loses,
    and else whether the text is short or its lines are wrapped by hand. A prepared directory has
    its tokenizer.
    """
    source, wanted = text.source, text.tokenizer
    is_open = wanted.normalize == "auto"
    if is_prepared(source):
        made = open_corpus(source).meta["tokenizer_config"]
        known = from_dict(TokenizerConfig, made) if is_open and made else wanted
        return replace(text, tokenizer=known)
    if is_open:
        wanted = replace(wanted, normalize="text8" if source in SOURCE_NAMES else "none")
    is_unset = wanted.kind == "char" and wanted.alphabet == TEXT8_ALPHABET
    if wanted.normalize == "none" and is_unset and source != "text8":
        found: set[str] = set()
        for block in _blocks(text):
            found.update(block)
            if len(found) > MOST_SYMBOLS:
                break
        if 1 < len(found) <= MOST_SYMBOLS:
            wanted = replace(wanted, alphabet="".join(sorted(found)))
        else:
            wanted = replace(wanted, kind="byte")
    if wanted.normalize == "none" and source not in SOURCE_NAMES:
        symbols = {
            "char": f"{len(wanted.alphabet)} different characters",
            "byte": "256 bytes",
            "bpe": f"{wanted.vocab_size or 'the'} pieces of words",
        }
        found_as = symbols.get(wanted.kind, f"those of your tokenizer {wanted.kind}")
        log.info("%s is read unchanged; its symbols are %s", source, found_as)
    _tell_if_skipped(text)
    beginning = _beginning(text)
    if wanted.normalization == "text8":
        _tell_losses(source, beginning, "data.tokenizer.normalize none")
    else:
        _tell_if_short(source, beginning)
        _tell_if_wrapped(text, beginning)
    return replace(text, tokenizer=wanted)


def misfit(text: DataConfig, tokenizer: Tokenizer, *, for_training: bool = False) -> str | None:
    """The reason why a trained `tokenizer` does not suit a text, else None.

    If it suits the text, a line says what text8 loses of it, or `for_training` whether its lines
    are wrapped by hand.
    """
    source, beginning = text.source, _beginning(text)
    if tokenizer.normalization == "text8":
        letters = [character for character in beginning if character.isalpha()]
        lost = sum(not character.isascii() for character in letters) / max(len(letters), 1)
        if lost > STRANGE_SHARE:
            return f"{lost:.1%} of the letters of {source} are not a-z, and would be lost"
        _tell_losses(source, beginning, "english-small")
        return None
    if isinstance(tokenizer, CharTokenizer):
        new = "".join(sorted(set(beginning).difference(tokenizer.alphabet)))
        if new:
            return f"{source} has characters that the model does not know, {new!r}"
    elif tokenizer.kind == "bpe":
        per_character = len(tokenizer.encode(beginning)) / max(len(beginning), 1)
        if per_character > 1:
            what = f"{per_character:.1f} tokens of the model for a character of {source}"
            return f"{what}, since they were made for another language"
    if for_training:
        _tell_if_skipped(text)
        _tell_if_wrapped(text, beginning)
    return None


def _tell_losses(source: str, beginning: str, keeping: str) -> None:
    """Which characters text8 lacks, and that `keeping` keeps them."""
    text = "".join(beginning.split())
    marks = Counter(re.sub("[a-zA-Z0-9]", "", text))
    if marks:
        most = " ".join(mark for mark, _ in marks.most_common(5))
        share = marks.total() / len(text)
        lost = f"{share:.1%} of the characters become spaces, {most} first"
        log.info("%s is read as a-z and space: %s; %s keeps them", source, lost, keeping)


def _tell_if_skipped(text: DataConfig) -> None:
    """Which files of a folder are not read, and how they would be."""
    if text.source in SOURCE_NAMES or is_prepared(text.source):
        return
    source = resolve_source(text)
    if source.suffix or not isinstance(source, TextFiles):
        return
    for kind, count in source.skipped.most_common(1):
        rest = f"not read: {counted(count, f'{kind} file')} of {source.path}"
        log.info("%s; %s%s%s reads those alone", rest, source.path, FIELD, kind)


def _tell_if_short(source: str, beginning: str) -> None:
    if 0 < len(beginning) < SHORT_TEXT:
        words = beginning.lower().split()
        known = sum(word in ("the", "and", "of", "to", "a", "in") for word in words)
        remedy = "try --train.dropout 0.1"
        # of English words these are a fifth
        if known > 0.1 * len(words):
            remedy = f"`train --from english-small` learns English faster; else {remedy}"
        log.info("%s is short for a new model: %s", source, remedy)


def _tell_if_wrapped(text: DataConfig, beginning: str) -> None:
    if not text.unwrap and is_wrapped(beginning):
        what = "are wrapped: --unwrap joins the lines of a paragraph"
        log.info("the lines of %s %s", text.source, what)


def _beginning(text: DataConfig) -> str:
    """The first megabyte of a text, not normalised; empty where `_blocks` gives nothing."""
    beginning = ""
    for block in _blocks(text):
        beginning += block[:BLOCK]
        if len(beginning) >= BLOCK:
            break
    return beginning


def _blocks(text: DataConfig) -> Iterator[str]:
    """The text of a file or folder of the user's own; nothing of parquet files or by name."""
    if text.source not in SOURCE_NAMES and not is_prepared(text.source):
        source = resolve_source(text)
        texts = source.texts() if isinstance(source, TextFiles) else ()
        yield from (block for one in texts for block in one.blocks)
