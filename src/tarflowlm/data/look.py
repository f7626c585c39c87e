"""A look at a text of the user's own: a tokenizer that keeps it, and the losses of a given one."""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tarflowlm.config import TEXT8_ALPHABET, DataConfig, Normalization, TokenizerConfig
from tarflowlm.data.corpus import is_prepared, open_corpus
from tarflowlm.data.normalize import is_wrapped
from tarflowlm.data.reading import BLOCK
from tarflowlm.data.sources import SOURCE_NAMES, resolve_source
from tarflowlm.data.text_files import TextFiles
from tarflowlm.data.tokenizer import CharTokenizer, Tokenizer
from tarflowlm.schema import from_dict

STRANGE = 0.01
"""The share of letters that text8 normalisation may lose."""
SHORT = 500_000
"""A new model learns little from a text with fewer characters."""
MOST_CHARACTERS = 256
"""The symbols of a text are its different characters if there are at most this many."""

log = logging.getLogger("tarflowlm")


@dataclass(frozen=True)
class Look:
    """The first megabyte of a text, not normalised; empty for corpora by name and parquet files."""

    text: DataConfig
    beginning: str

    def misfit(self, tokenizer: Tokenizer) -> str | None:
        """The reason why a trained `tokenizer` does not suit the text, else None."""
        source, beginning = self.text.source, self.beginning
        if tokenizer.normalization == "text8":
            letters = [character for character in beginning if character.isalpha()]
            lost = sum(not character.isascii() for character in letters) / max(len(letters), 1)
            if lost > STRANGE:
                return f"{lost:.1%} of the letters of {source} are not a-z, and would be lost"
        elif isinstance(tokenizer, CharTokenizer):
            new = "".join(sorted(set(beginning).difference(tokenizer.alphabet)))
            if new:
                return f"{source} has characters that the model does not know, {new!r}"
        elif tokenizer.kind == "bpe":
            per_character = len(tokenizer.encode(beginning)) / max(len(beginning), 1)
            if per_character > 1:
                what = f"{per_character:.1f} tokens of the model for a character of {source}"
                return f"{what}, since they were made for another language"
        return None

    def tell(self, normalization: Normalization, keeping: str, *, is_new: bool = False) -> None:
        """Tell the user which characters the TEXT8 alphabet lacks, and that `keeping` keeps them.

        For a text that is not normalised: whether it is short for a new model, and whether its
        lines were wrapped by hand.
        """
        source, beginning = self.text.source, self.beginning
        if normalization == "text8":
            text = "".join(beginning.split())
            marks = Counter(re.sub("[a-zA-Z0-9]", "", text))
            if marks:
                most = " ".join(mark for mark, _ in marks.most_common(5))
                share = marks.total() / len(text)
                lost = f"{share:.1%} of the characters become spaces, {most} first"
                log.info("%s is read as a-z and space: %s; %s keeps them", source, lost, keeping)
            return
        if is_new and 0 < len(beginning) < SHORT:
            words = beginning.lower().split()
            known = sum(word in ("the", "and", "of", "to", "a", "in") for word in words)
            remedy = "try --train.dropout 0.1"
            # of English words these are a fifth
            if known > 0.1 * len(words):
                remedy = f"`train --from english-small` learns English faster; else {remedy}"
            log.info("%s is short for a new model: %s", source, remedy)
        if not self.text.unwrap and is_wrapped(beginning):
            log.info("the lines of %s are wrapped: --unwrap joins the lines of a paragraph", source)


def look(text: DataConfig) -> Look:
    """Read the beginning of a text."""
    beginning = ""
    for block in _blocks(text):
        beginning += block[:BLOCK]
        if len(beginning) >= BLOCK:
            break
    return Look(text, beginning)


def suited(text: DataConfig) -> DataConfig:
    """The text with a normalisation and an alphabet for its tokenizer, where these were left open.

    A text of the user's own is not normalised. Its characters are the alphabet, or if there are
    more than MOST_CHARACTERS, bytes are its tokens; a line says so. A prepared directory has its
    tokenizer.
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
            if len(found) > MOST_CHARACTERS:
                break
        if 1 < len(found) <= MOST_CHARACTERS:
            wanted = replace(wanted, alphabet="".join(sorted(found)))
        else:
            wanted = replace(wanted, kind="byte")
    if wanted.normalize == "none" and source not in SOURCE_NAMES:
        symbols = {
            "char": f"{len(wanted.alphabet)} different characters",
            "byte": "256 bytes",
            "bpe": f"{wanted.vocab_size or 'the'} pieces of words",
        }
        log.info("%s is read unchanged; its symbols are %s", source, symbols[wanted.kind])
    look(text).tell(wanted.normalization, "data.tokenizer.normalize none", is_new=True)
    return replace(text, tokenizer=wanted)


def _blocks(text: DataConfig) -> Iterator[str]:
    """The text of a file or folder of the user's own; nothing for any other source."""
    if text.source not in SOURCE_NAMES and not is_prepared(text.source):
        source = resolve_source(text)
        texts = source.texts() if isinstance(source, TextFiles) else ()
        yield from (block for text in texts for block in text.blocks)
