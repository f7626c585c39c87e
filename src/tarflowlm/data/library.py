"""Characters, bytes or BPE as tokens, kept as tokenizer.json.

The file is one of the `tokenizers` library, whose `Tokenizer.from_file` opens it. Characters and
bytes are BPE without merges there; here they are looked up in a table, 13 times as fast.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import tokenizers

from tarflowlm.config import Normalization, check_alphabet
from tarflowlm.data.normalize import TEXT8_NORMALIZER
from tarflowlm.data.reading import text_pieces
from tarflowlm.data.tokenizer import Document, Tokenizer, file_of, is_own, own_from_document
from tarflowlm.errors import UnknownCharacters, UserError, first_line
from tarflowlm.schema import checked

SEPARATOR = "<|endoftext|>"
"""The name of the token that ends every document and begins the next, as in GPT-2."""
PIECE = 1 << 15  # characters per unit of the library's work, which it distributes over threads
_BATCH = 32  # pieces passed to the library at once; its notes on each token need much memory


_unprintable = [*range(ord("!")), *range(0x7F, 0xA1), 0xAD]
BYTE_SYMBOLS = "".join(
    chr(256 + _unprintable.index(byte)) if byte in _unprintable else chr(byte)
    for byte in range(256)
)
"""GPT-2's printable stand-in for every byte (Radford et al. 2019, `bytes_to_unicode`)."""
BYTE_OF = {character: byte for byte, character in enumerate(BYTE_SYMBOLS)}


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    `document` is a tokenizer.json with BPE, either byte-level (GPT-2 and its relatives) or over the
    characters of an alphabet. ValueError for one that does not restore every text. The names of
    special tokens, such as `<|endoftext|>`, are plain text in a text.
    """

    kind = "bpe"

    def __init__(self, document: Document, normalization: Normalization = "none") -> None:
        checked(normalization, Normalization, "normalization")
        self.normalization = normalization
        # texts are normalised before they come here
        self._document = document | {"normalizer": None, "truncation": None, "padding": None}
        try:
            self._library = tokenizers.Tokenizer.from_str(json.dumps(self._document))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a tokenizer of the `tokenizers` library ({error})") from None
        self._library.encode_special_tokens = True
        added = {token["content"]: token["id"] for token in document["added_tokens"]}
        self._added = set(added.values())
        self.end = None if normalization == "text8" else added.get(SEPARATOR)
        self._is_byte_level = '"ByteLevel"' in json.dumps(document["pre_tokenizer"])
        self.alphabet = "".join(token for token in self._library.get_vocab() if len(token) == 1)
        """The characters that the tokens are made of, unless they are bytes."""
        probe = (
            "The cat,\n  12 caf\u00e9s \U0001f600. " if self._is_byte_level else self.alphabet * 2
        )
        ids = self._library.encode(probe, add_special_tokens=False).ids
        model = self._document["model"]
        has_stand_ins = model.get("unk_token") or model.get("byte_fallback")
        is_lossy = model.get("dropout") or (has_stand_ins and not self._is_byte_level)
        if is_lossy or b"".join(self.token_bytes[i] for i in ids) != probe.encode():
            raise ValueError("it does not restore every text: use byte-level BPE such as GPT-2's")

    @cached_property
    def token_bytes(self) -> Sequence[bytes]:  # type: ignore[override]
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values()) + 1)
        for token, index in vocabulary.items():
            # a token with other characters is a special token that the file did not declare
            is_bytes = self._is_byte_level and all(c in BYTE_OF for c in token)
            if is_bytes and index not in self._added:
                table[index] = bytes(BYTE_OF[c] for c in token)
            else:
                table[index] = token.encode("utf-8")
        if self.end is not None:
            table[self.end] = b"\n\n"
        return table

    def encode_each(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        pieces = [piece for text in texts for piece in text_pieces([text], PIECE)]
        parts = [np.zeros(0, dtype=np.int64)]
        for i in range(0, len(pieces), _BATCH):
            batch = pieces[i : i + _BATCH]
            for encoding in self._library.encode_batch_fast(batch, add_special_tokens=False):
                # through `array`, which converts a list of int in less than half of numpy's time
                parts.append(np.frombuffer(array("I", encoding.ids), np.uintc).astype(np.int64))
        ids = np.concatenate(parts)
        # the library drops unknown characters silently
        if self.characters_per_token[ids].sum() != sum(map(len, texts)):
            if not self._is_byte_level and not set().union(*texts) <= set(self.alphabet):
                raise UnknownCharacters("".join(texts), self.alphabet)
            raise UserError("this BPE loses some of the text: use one without special tokens")
        return ids

    @property
    def fingerprint(self) -> str:
        """sha256 (hex): equal for tokenizers that encode, decode and normalise in the same way."""
        parts = [self._document[name] for name in ("pre_tokenizer", "added_tokens")]
        parts += [self._document["model"].get(name) for name in ("vocab", "merges")]
        if self.normalization == "text8" and self.end is not None:
            parts.append(self.end)
        content = json.dumps([self.normalization, *parts], sort_keys=True)
        return hashlib.sha256(content.encode("ascii")).hexdigest()

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        normalizer = TEXT8_NORMALIZER if self.normalization == "text8" else None
        document = self._document | {"normalizer": normalizer}
        return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


class CharTokenizer(LibraryTokenizer):
    """One token per character of a fixed alphabet; id = position in `alphabet`.

    With `has_end` one more token ends documents.
    """

    kind = "char"

    def __init__(
        self, alphabet: str, normalization: Normalization = "text8", *, has_end: bool = False
    ) -> None:
        check_alphabet(alphabet)
        super().__init__(_without_merges(alphabet, None, {"type": "Fuse"}, has_end), normalization)
        self.alphabet = alphabet
        codes = list(map(ord, alphabet))
        # the id of every code point, -1 for foreign ones; all above share the last place
        self._ids = np.full(max(codes) + 2, -1, dtype=np.int64)
        self._ids[codes] = np.arange(len(alphabet))

    def encode_each(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        text = "".join(texts)
        codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
        ids = self._ids.take(codes, mode="clip")
        if np.min(ids, initial=0) < 0:
            raise UnknownCharacters(text, self.alphabet)
        return ids


class ByteTokenizer(LibraryTokenizer):
    """One token per UTF-8 byte, V = 256; encodes any text. `has_end` as in `CharTokenizer`."""

    kind = "byte"

    def __init__(self, normalization: Normalization = "none", *, has_end: bool = False) -> None:
        super().__init__(
            _without_merges(BYTE_SYMBOLS, BYTE_LEVEL, BYTE_LEVEL, has_end), normalization
        )

    def encode_each(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        data = "".join(texts).encode("utf-8")
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)


BYTE_LEVEL: Document = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def end_token(index: int) -> Document:
    """The entry of the token that ends documents, in a tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": SEPARATOR, **flags, "special": True}


def _without_merges(
    alphabet: str, pre_tokenizer: Document | None, decoder: Document, has_end: bool
) -> Document:
    """A tokenizer.json with one token for each character of `alphabet`."""
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    return {
        "version": "1.0",
        "added_tokens": [end_token(len(alphabet))] if has_end else [],
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def _from_document(document: Document) -> Tokenizer:
    normalizer = document["normalizer"]
    if normalizer not in (None, TEXT8_NORMALIZER):
        raise ValueError("it has a normaliser, so it does not restore every text")
    normalization: Normalization = "text8" if normalizer else "none"
    model = document["model"]
    if "merges" not in model:
        raise ValueError(f"its model is {model.get('type')}, not BPE")
    vocabulary = model["vocab"]
    has_end = document["added_tokens"] == [end_token(len(vocabulary))]
    if not model["merges"] and (has_end or not document["added_tokens"]):
        alphabet = "".join(sorted(vocabulary, key=vocabulary.get))
        is_plain = vocabulary == {character: index for index, character in enumerate(alphabet)}
        if is_plain and document["pre_tokenizer"] is None:
            return CharTokenizer(alphabet, normalization, has_end=has_end)
        if is_plain and document["pre_tokenizer"] == BYTE_LEVEL and alphabet == BYTE_SYMBOLS:
            return ByteTokenizer(normalization, has_end=has_end)
    return LibraryTokenizer(document, normalization)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in the file `path`, or in `path/tokenizer.json` if `path` is a directory."""
    source = file_of(path)
    try:
        document = json.loads(source.read_text(encoding="utf-8"))
        found = None if is_own(document) else _from_document(document)
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = f"{source} is no tokenizer for a model ({first_line(error)})"
        remedy = "give that of a run or of a byte-level BPE, or write your own (docs/data.md)"
        raise UserError(f"{what}: {remedy}") from None
    return own_from_document(document, str(source)) if found is None else found
