"""Text as tokens: characters, bytes or BPE, kept as tokenizer.json.

The file is one of the `tokenizers` library, whose `Tokenizer.from_file` opens it. Characters and
bytes are BPE without merges there; here they are looked up in a table, 13 times as fast.
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import tokenizers

from tarflowlm.config import Normalization, check_alphabet
from tarflowlm.data.normalize import TEXT8_NORMALIZER, normalize_text8
from tarflowlm.data.reading import text_pieces
from tarflowlm.errors import UnknownCharacters, UserError, first_line
from tarflowlm.files import replacing
from tarflowlm.schema import check_type, checked

Document = dict[str, Any]
"""The content of a tokenizer.json."""
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


class Tokenizer:
    """Text <-> token ids `0 .. V-1`; each token stands for a fixed string of UTF-8 bytes.

    `document` is a tokenizer.json with BPE, either byte-level (GPT-2 and its relatives) or over the
    characters of an alphabet. ValueError for one that does not restore every text. The names of
    special tokens, such as `<|endoftext|>`, are plain text in a text.

    `decode(encode(text)) == text` for every text that `encode` accepts. Where documents end with
    the token `end`, it has no characters, and is decoded as an empty line. `encode` does not
    normalise: call `prepare` first on text from a file, or read a user's text with `prompts.read`.
    Immutable.
    """

    kind: ClassVar[str] = "bpe"

    def __init__(self, document: Document, normalization: Normalization = "none") -> None:
        checked(normalization, Normalization, "normalization")
        self.normalization: Normalization = normalization
        # texts are normalised before they come here
        self._document = document | {"normalizer": None, "truncation": None, "padding": None}
        try:
            self._library = tokenizers.Tokenizer.from_str(json.dumps(self._document))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a tokenizer of the `tokenizers` library ({error})") from None
        self._library.encode_special_tokens = True
        added = {token["content"]: token["id"] for token in document["added_tokens"]}
        self._added = set(added.values())
        self.end: int | None = None if normalization == "text8" else added.get(SEPARATOR)
        """The token that follows every document; None for text8, and for tokenizers without it."""
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
    def token_bytes(self) -> Sequence[bytes]:
        """The UTF-8 bytes of every token, length V; a token may hold part of a character."""
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

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids."""
        return len(self.token_bytes)

    @property
    def token_dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest little-endian unsigned type that holds V ids."""
        return np.min_scalar_type(self.vocab_size - 1).newbyteorder("<")

    def prepare(self, text: str) -> str:
        """`text` normalised as this tokenizer is configured; call it once, before `encode`."""
        return normalize_text8(text) if self.normalization == "text8" else text

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """Token ids [N] of normalised `text`. UserError for characters that it does not know."""
        check_type(text, "text", str, "give a text, a str")
        found = re.search("[\ud800-\udfff]", text)
        if found is not None and self.kind != "char":
            raise UserError(f"character {found.start()} of the text is not UTF-8: convert it")
        return self.encode_each([text])

    def encode_each(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Token ids [N] of `texts`, encoded one by one and concatenated."""
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

    def decode(self, ids: npt.ArrayLike) -> str:
        """Text of 1-d integer `ids` (list, array or tensor), each in 0 .. V-1.

        Incomplete UTF-8 shows as U+FFFD.
        """
        given = np.asarray(ids)
        table = self.token_bytes
        if given.size == 0:
            return ""
        is_integer = given.ndim == 1 and given.dtype.kind in "iu"
        if not is_integer or not 0 <= given.min() <= given.max() < len(table):
            found = f"{given.dtype} {list(given.shape)}"
            if is_integer:
                found += f", from {given.min()} to {given.max()}"
            raise UserError(f"tokens {found}: give 1-d integers from 0 to {len(table) - 1}")
        return b"".join([table[i] for i in given.tolist()]).decode("utf-8", errors="replace")

    @cached_property
    def characters_per_token(self) -> npt.NDArray[np.int64]:
        """Int64 [V]: bytes of each token that start a character; summed, the length of a text."""
        # a continuation byte is 0b10xxxxxx
        counts = [sum((b & 0xC0) != 0x80 for b in token) for token in self._texts]
        return np.array(counts, dtype=np.int64)

    @cached_property
    def bytes_per_token(self) -> npt.NDArray[np.int64]:
        """Int64 [V]: the number of UTF-8 bytes of each token."""
        return np.array(list(map(len, self._texts)), dtype=np.int64)

    @property
    def _texts(self) -> list[bytes]:
        """The bytes of every token; the end of a document has none, because it is no text."""
        return [b"" if index == self.end else text for index, text in enumerate(self.token_bytes)]

    @cached_property
    def symbols(self) -> list[str]:
        r"""[V]: every token as a printable string, with all else escaped (`\n`, `\xe2`)."""
        texts = (token.decode("utf-8", errors="backslashreplace") for token in self.token_bytes)
        return ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) for text in texts]

    @cached_property
    def word_starts(self) -> npt.NDArray[np.bool_]:
        """Bool [V]: the tokens that begin with a space; none if no token holds more than that."""
        found = np.array([token.startswith(b" ") for token in self.token_bytes])
        return found & any(len(token) > 1 and token[:1] == b" " for token in self.token_bytes)

    def with_normalization(self, normalization: Normalization | None) -> "Tokenizer":
        """This tokenizer, its end of documents too, with another normalisation; itself for None."""
        if normalization is None:
            return self
        other = copy(self)
        other.normalization = normalization
        return other

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file `path`, or `path/tokenizer.json` if `path` is a directory, atomically."""
        with replacing(_file(path)) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8", newline="")

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}(vocab_size={self.vocab_size}, normalization={self.normalization!r})"


class CharTokenizer(Tokenizer):
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


class ByteTokenizer(Tokenizer):
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
    vocabulary = document["model"]["vocab"]
    has_end = document["added_tokens"] == [end_token(len(vocabulary))]
    if not document["model"]["merges"] and (has_end or not document["added_tokens"]):
        alphabet = "".join(sorted(vocabulary, key=vocabulary.get))
        is_plain = vocabulary == {character: index for index, character in enumerate(alphabet)}
        if is_plain and document["pre_tokenizer"] is None:
            return CharTokenizer(alphabet, normalization, has_end=has_end)
        if is_plain and document["pre_tokenizer"] == BYTE_LEVEL and alphabet == BYTE_SYMBOLS:
            return ByteTokenizer(normalization, has_end=has_end)
    return Tokenizer(document, normalization)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in the file `path`, or in `path/tokenizer.json` if `path` is a directory."""
    source = _file(path)
    try:
        return _from_document(json.loads(source.read_text(encoding="utf-8")))
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = f"{source} is no tokenizer for a model ({first_line(error)})"
        raise UserError(
            f"{what}: give the tokenizer.json of a run or of a byte-level BPE"
        ) from None


def _file(path: str | os.PathLike[str]) -> Path:
    return Path(path) / "tokenizer.json" if os.path.isdir(path) else Path(path)
