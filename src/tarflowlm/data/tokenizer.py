"""Text as tokens: what every tokenizer is, whatever makes its tokens.

Those of a user's own are subclasses of `Tokenizer` under a name (`config.tokenizer`).
"""

import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterable, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from tarflowlm.config import TOKENIZERS, Normalization, TokenizerConfig
from tarflowlm.data.normalize import normalize_text8
from tarflowlm.errors import UserError, first_line
from tarflowlm.files import replacing
from tarflowlm.registry import own_module
from tarflowlm.schema import check_type

Document = dict[str, Any]
"""The content of a tokenizer.json."""


class Tokenizer:
    """Text <-> token ids `0 .. V-1`; each token stands for a fixed string of UTF-8 bytes.

    `decode(encode(text)) == text` for every text that `encode` accepts, if it `is_lossless`. Where
    documents end with the token `end`, it has no characters, and is decoded as an empty line.
    `encode` does not normalise: call `prepare` first on text from a file, or read a user's text
    with `prompts.read`. Immutable.

    To make one, set `token_bytes` in `__init__`, and write `encode_each`, `settings` and `train`
    (docs/data.md).
    """

    kind: ClassVar[str]
    """Its name, as in `TokenizerConfig.kind`."""
    is_lossless: ClassVar[bool] = True
    """False: a text has no number of characters under it, so there are no bits per character."""
    token_bytes: Sequence[bytes]
    """The UTF-8 bytes of every token, length V; a token may hold part of a character."""
    normalization: Normalization = "none"
    """How texts are normalised before they come here."""
    end: int | None = None
    """The token that follows every document; None without it."""

    def encode_each(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Token ids [N] of `texts`, encoded one by one and concatenated."""
        raise NotImplementedError

    def settings(self) -> Document:
        """JSON values with which the class, called with them by name, makes this tokenizer."""
        raise NotImplementedError

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> Self:
        """The tokenizer of pieces of normalised text."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids."""
        return len(self.token_bytes)

    @property
    def token_dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest little-endian unsigned type that holds V ids."""
        return np.min_scalar_type(self.vocab_size - 1).newbyteorder("<")

    @cached_property
    def alphabet(self) -> str:
        """The characters that the tokens are made of."""
        return "".join(sorted(set(b"".join(self.token_bytes).decode("utf-8", errors="ignore"))))

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
        """Int64 [V]: bytes of each token that start a character; summed, the length of a text. 0 if
        it loses some of a text.
        """
        # a continuation byte is 0b10xxxxxx
        counts = [sum((b & 0xC0) != 0x80 for b in token) for token in self._texts]
        return np.array(counts, dtype=np.int64)

    @cached_property
    def bytes_per_token(self) -> npt.NDArray[np.int64]:
        """Int64 [V]: the number of UTF-8 bytes of each token; 0 if it loses some of a text."""
        return np.array(list(map(len, self._texts)), dtype=np.int64)

    @property
    def _texts(self) -> list[bytes]:
        """The bytes of text of every token: none of the end of a document, which is no text."""
        if not self.is_lossless:
            return [b""] * self.vocab_size
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

    def with_normalization(self, normalization: Normalization | None) -> Self:
        """This tokenizer, its end of documents too, with another normalisation; itself for None."""
        if normalization is None:
            return self
        other = copy(self)
        other.normalization = normalization
        return other

    @property
    def fingerprint(self) -> str:
        """sha256 (hex): equal for tokenizers that encode, decode and normalise in the same way."""
        content = f"{self.to_json()}{code_of(type(self))}"
        return hashlib.sha256(content.encode("utf-8", errors="surrogatepass")).hexdigest()

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        document = {
            "kind": self.kind,
            "module": type(self).__module__,
            "normalization": self.normalization,
            "settings": self.settings(),
        }
        return json.dumps(document, ensure_ascii=False, indent=1) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file `path`, or `path/tokenizer.json` if `path` is a directory, atomically."""
        with replacing(file_of(path)) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8", newline="")

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}(vocab_size={self.vocab_size}, normalization={self.normalization!r})"


def file_of(path: str | os.PathLike[str]) -> Path:
    """The file `path`, or the tokenizer.json in a directory."""
    return Path(path) / "tokenizer.json" if os.path.isdir(path) else Path(path)


def code_of(kind: type) -> str:
    """The source of a class, by which a changed one is told from what it was; "" if it has none."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def is_own(document: object) -> bool:
    """Whether this is the content of a tokenizer.json of a user's own."""
    keys = {"kind", "module", "normalization", "settings"}
    return isinstance(document, dict) and document.keys() == keys


def own_from_document(document: Document, where: str) -> Tokenizer:
    """The tokenizer of a user's own that is in a tokenizer.json.

    UserError if its module is not imported, or its class does not take the settings.
    """
    name, module = document["kind"], document["module"]
    kind = TOKENIZERS.get(name)
    if kind is None:
        what = f"{where} has the tokenizer {name!r} of your module {module}"
        raise UserError(f"{what}: import that first, or pass --import {module}")
    try:
        found: Tokenizer = kind(**document["settings"])
    except Exception as error:  # whatever a class of a user's own raises
        what = f"{where}: tokenizer {name!r} is not made of its settings ({first_line(error)})"
        raise UserError(f"{what}: mend its class") from error
    return found.with_normalization(document["normalization"])


def check_own(tokenizer: Tokenizer) -> None:
    """UserError for a tokenizer of a user's own that could not be read back from its file."""
    kind = type(tokenizer)
    if own_module(kind) is None:
        return
    name = getattr(kind, "kind", "")
    if TOKENIZERS.get(name) is not kind:
        remedy = "write @tarflowlm.tokenizer('my_words') above its class (docs/data.md)"
        raise UserError(f"tokenizer {kind.__name__} has no name by which it is loaded: {remedy}")
    try:
        document = json.loads(tokenizer.to_json())
    except (NotImplementedError, TypeError, ValueError) as error:
        what = f"the settings of tokenizer {name!r} are no JSON ({first_line(error)})"
        raise UserError(f"{what}: let `settings` return a dict of values") from None
    if own_from_document(document, kind.__name__).token_bytes != tokenizer.token_bytes:
        what = f"tokenizer {name!r} has other tokens when it is made of its settings"
        raise UserError(f"{what}: mend its class")
