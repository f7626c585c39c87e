"""The interface of all tokenizers, and the tokenizers over characters and bytes (BPE is in
`bpe.py`).
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from tarflowlm.config import NORMALIZATIONS, Normalization, check_alphabet
from tarflowlm.data.text import normalize
from tarflowlm.errors import UnknownCharacters, UserError, first_line
from tarflowlm.files import replacing

FORMAT, VERSION = "tarflowlm-tokenizer", 1


class Tokenizer(ABC):
    """Text <-> token ids `0 .. V-1`; each token stands for a fixed string of UTF-8 bytes.
    `decode(encode(text)) == text` for every text that `encode` accepts. `encode` does not
    normalise: call `prepare` first on text from a file, or read a user's text with `prompts.read`.
    Immutable.
    """

    kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type["Tokenizer"]]] = {}

    def __init__(self, normalization: Normalization = "none") -> None:
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalize={normalization!r} is not one of {', '.join(NORMALIZATIONS)}"
            )
        self.normalization: Normalization = normalization

    def __init_subclass__(cls) -> None:
        Tokenizer._kinds[cls.kind] = cls

    @property
    @abstractmethod
    def token_bytes(self) -> Sequence[bytes]:
        """The UTF-8 bytes of every token, length V; a token may hold part of a character."""

    @abstractmethod
    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """Token ids [N] of `text`, which is not normalised. UserError for characters outside the
        vocabulary.
        """

    @cached_property
    def holds_spaces(self) -> bool:
        """Whether tokens hold the space before a word."""
        return any(len(token) > 1 and token.startswith(b" ") for token in self.token_bytes)

    def encode_each(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Token ids [N] of `texts`, encoded one by one and concatenated."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *map(self.encode, texts)])

    def _payload(self) -> dict[str, Any]:
        """The content of the tokenizer's JSON besides kind and normalisation."""
        return {}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any], normalization: Normalization) -> "Tokenizer":
        """Inverse of `_payload`; may raise LookupError, TypeError or ValueError for foreign
        content.
        """
        return cls(normalization)

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids."""
        return len(self.token_bytes)

    def prepare(self, text: str) -> str:
        """`text` normalised as this tokenizer is configured; call it once, before `encode`."""
        return normalize(text, self.normalization)

    @property
    def is_lower_case(self) -> bool:
        """Whether its tokens or its normalisation leave no upper-case letters."""
        return self.normalization == "text8"

    def with_normalization(self, normalization: Normalization | None) -> "Tokenizer":
        """This tokenizer with another normalisation of texts; itself for None."""
        return self if normalization is None else self._from_payload(self._payload(), normalization)

    def decode(self, ids: Any) -> str:
        """Text of 1-d integer `ids` (list, array or tensor), each in 0 .. V-1; incomplete UTF-8
        shows as U+FFFD.
        """
        array, table = np.asarray(ids), self.token_bytes
        if array.size == 0:
            return ""
        if (
            array.ndim != 1
            or array.dtype.kind not in "iu"
            or not 0 <= array.min() <= array.max() < len(table)
        ):
            found = f"{array.dtype}, shape {list(array.shape)}, from {array.min()} to {array.max()}"
            raise UserError(
                f"token ids must be 1-d integers from 0 to {len(table) - 1}, not an array of {found}"
            )
        return b"".join([table[i] for i in array.tolist()]).decode("utf-8", errors="replace")

    @cached_property
    def characters_per_token(self) -> npt.NDArray[np.int64]:
        """Int64 [V]: the UTF-8 bytes of each token that start a character: over a text, its
        characters.
        """
        # a continuation byte is 0b10xxxxxx
        return np.array(
            [sum((b & 0xC0) != 0x80 for b in token) for token in self.token_bytes], dtype=np.int64
        )

    @cached_property
    def bytes_per_token(self) -> npt.NDArray[np.int64]:
        """Int64 [V]: the number of UTF-8 bytes of each token."""
        return np.array(list(map(len, self.token_bytes)), dtype=np.int64)

    @cached_property
    def symbols(self) -> list[str]:
        """[V]: every token as a printable string; unprintable parts are escaped (`\\n`,
        `\\xe2`).
        """
        return [_printable(token) for token in self.token_bytes]

    def to_json(self) -> str:
        """Everything that defines this tokenizer, as readable JSON; `Tokenizer.from_json` reads it
        back.
        """
        return json.dumps(self._document(), ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "tokenizer JSON") -> "Tokenizer":
        """Inverse of `to_json`. UserError, calling the input `name`, for foreign or damaged
        text.
        """
        try:
            document = json.loads(text)
            if document["format"] != FORMAT or document["version"] != VERSION:
                raise ValueError(f"format {document['format']!r}, version {document['version']!r}")
            return Tokenizer._kinds[document["kind"]]._from_payload(document, document["normalize"])
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
            raise UserError(
                f"{name} is damaged, or no tokenizer of this version of tarflowlm: {reason}"
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json()` atomically to the file `path`, or to `path/tokenizer.json` if `path` is
        a directory.
        """
        with replacing(_file(path)) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8", newline="")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the content: equal for tokenizers that encode, decode and normalise
        alike.
        """
        canonical = json.dumps(self._document(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def _document(self) -> dict[str, Any]:
        head = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "normalize": self.normalization,
        }
        return head | self._payload()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, normalization={self.normalization!r})"


class CharTokenizer(Tokenizer):
    """One token per character of a fixed alphabet; id = position in `alphabet`."""

    kind = "char"

    def __init__(self, alphabet: str, normalization: Normalization = "text8") -> None:
        super().__init__(normalization)
        check_alphabet(alphabet)
        self.alphabet, codes = alphabet, list(map(ord, alphabet))
        # the id of every code point, -1 for foreign ones; all above the alphabet share the last
        # place
        self._ids = np.full(max(codes) + 2, -1, dtype=np.int64)
        self._ids[codes] = np.arange(len(alphabet))

    @cached_property
    def token_bytes(self) -> Sequence[bytes]:
        return [c.encode("utf-8") for c in self.alphabet]

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        if ids.size and ids.min() < 0:
            raise UnknownCharacters(text, self.alphabet)
        return ids

    @property
    def is_lower_case(self) -> bool:
        return self.alphabet == self.alphabet.lower()

    def _payload(self) -> dict[str, Any]:
        return {"alphabet": self.alphabet}

    @classmethod
    def _from_payload(
        cls, payload: dict[str, Any], normalization: Normalization
    ) -> "CharTokenizer":
        return cls(payload["alphabet"], normalization)


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte, V = 256; encodes any text."""

    kind = "byte"

    @cached_property
    def token_bytes(self) -> Sequence[bytes]:
        return [bytes([b]) for b in range(256)]

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer saved in the file `path`, or in `path/tokenizer.json` if `path` is a
    directory.
    """
    source = _file(path)
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = (
            "does not exist"
            if isinstance(error, FileNotFoundError)
            else f"cannot be read ({first_line(error)})"
        )
        raise UserError(
            f"{source} {reason}: give a tokenizer.json or the directory that holds one"
        ) from None
    return Tokenizer.from_json(text, name=str(source))


def _file(path: str | os.PathLike[str]) -> Path:
    return Path(path) / "tokenizer.json" if os.path.isdir(path) else Path(path)


def _printable(token: bytes) -> str:
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(chr(b) if 32 <= b < 127 else f"\\x{b:02x}" for b in token)
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
