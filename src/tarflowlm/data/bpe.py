"""Byte-pair encoding through the `tokenizers` library: from a file, from a hub name, or trained here."""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from tarflowlm.config import Normalization
from tarflowlm.data.download import check_hub_reachable, quiet_hub
from tarflowlm.data.text import text_pieces
from tarflowlm.data.tokenizer import (
    FORMAT,
    Tokenizer,
    concatenated,
    encode_utf8,
    load_tokenizer,
)
from tarflowlm.errors import UnknownCharacters, UserError, first_line

_PIECE = 1 << 15  # characters per unit of the library's work, which it distributes over threads
_BATCH = 1 << 20  # characters passed to the library at once: its per-token bookkeeping needs much memory


class BPETokenizer(Tokenizer):
    """Byte-pair encoding, either byte-level (GPT-2 and its relatives) or over the characters of an alphabet.

    `library_json` is the JSON of a `tokenizers.Tokenizer` with a BPE model. It must be invertible: no normaliser, and
    either a ByteLevel pre-tokenizer or plain characters. UserError for anything else.

    Special tokens found in the text, such as `<|endoftext|>`, become one token and count all their characters; none
    are added. Truncation and padding that a file asks for are switched off.
    """

    kind = "bpe"

    def __init__(self, library_json: str, normalization: Normalization = "none") -> None:
        super().__init__(normalization)
        try:
            self.library: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(library_json)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"not a tokenizer of the `tokenizers` library ({error})") from None
        self.library.no_truncation()
        self.library.no_padding()
        self._specification: dict[str, Any] = json.loads(self.library.to_str())
        _check_invertible(self._specification)
        self.is_byte_level = _has_byte_level(self._specification)

    @cached_property
    def token_bytes(self) -> Sequence[bytes]:
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        added = {token["id"] for token in self._specification["added_tokens"]}
        table = [b""] * (max(vocabulary.values()) + 1)
        from_unicode = {character: byte for byte, character in _byte_characters().items()}
        for token, index in vocabulary.items():
            if self.is_byte_level and index not in added:
                # a token with other characters is a special token that the file did not declare
                known = all(c in from_unicode for c in token)
                table[index] = bytes(from_unicode[c] for c in token) if known else token.encode("utf-8")
            else:
                table[index] = token.encode("utf-8")
        return table

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        return self.encode_each([text])

    def encode_open(self, text: str) -> npt.NDArray[np.int64]:
        return self.encode(text.removesuffix(" ") if self._holds_spaces else text)

    @cached_property
    def _holds_spaces(self) -> bool:
        return any(token[:1] == b" " and len(token) > 1 for token in self.token_bytes)

    def encode_each(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        for text in texts:
            encode_utf8(text)  # for its message: the library would raise TypeError
        parts: list[npt.NDArray[np.int64]] = []
        for batch in _batches(piece for text in texts for piece in text_pieces(text, _PIECE)):
            for encoding in self.library.encode_batch_fast(batch, add_special_tokens=False):
                # through `array`, which converts a list of int in less than half of numpy's time
                parts.append(np.frombuffer(array("I", encoding.ids), dtype=np.uintc).astype(np.int64))
        ids = concatenated(parts)
        # the library drops unknown characters silently
        if int(self.characters_per_token[ids].sum()) != sum(map(len, texts)):
            raise self._loss("".join(texts))
        return ids

    def _loss(self, text: str) -> UserError:
        if not self.is_byte_level:
            alphabet = "".join(t for t in (token.decode() for token in self.token_bytes) if len(t) == 1)
            if not set(text) <= set(alphabet):
                return UnknownCharacters(text, alphabet)
        return UserError("this BPE tokenizer does not keep all of the text (do special tokens swallow spaces?)")

    def _payload(self) -> dict[str, Any]:
        return {"tokenizers": self._specification}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any], normalization: Normalization) -> "BPETokenizer":
        return cls(json.dumps(payload["tokenizers"]), normalization)


def train_bpe(
    pieces: Iterable[str], vocab_size: int, *, alphabet: str | None, normalization: Normalization
) -> BPETokenizer:
    """BPE trained on `pieces` of already normalised text; deterministic.

    `alphabet=None` gives byte-level BPE with GPT-2's word pattern (`vocab_size >= 257`); otherwise the tokens start
    from the characters of `alphabet`. A merge may include the one space before a word and never crosses words.
    UserError if the text is too small for `vocab_size` tokens, or has characters outside `alphabet`.
    """
    start = 256 if alphabet is None else len(alphabet)
    if vocab_size <= start:
        raise UserError(f"vocab_size={vocab_size} leaves no room for merges: it must exceed {start}")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    if alphabet is None:
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        library.decoder = tokenizers.decoders.ByteLevel()
        initial = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        words = tokenizers.Regex(r" ?[^ ]+| ")
        library.pre_tokenizer = tokenizers.pre_tokenizers.Split(words, behavior="isolated")
        library.decoder = tokenizers.decoders.Fuse()
        initial = list(alphabet)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=initial, special_tokens=[], show_progress=False
    )
    library.train_from_iterator(_validated_pieces(pieces, alphabet), trainer)
    reached = library.get_vocab_size()
    if reached != vocab_size:
        raise UserError(
            f"vocab_size={vocab_size} cannot be reached, the training text gives {reached} tokens at most: "
            f"set vocab_size to {reached} or less, or use more text"
        )
    return BPETokenizer(library.to_str(), normalization)


def bpe_from(source: str, normalization: Normalization) -> BPETokenizer:
    """BPE from `source`: a tokenizer.json (ours or the library's), a directory that holds one, or a hub name.

    Only a hub name may use the network. UserError for a source that is missing, foreign or out of reach.
    """
    path = Path(source)
    if os.path.isdir(path):  # os.path: False, not OSError, for impossible names
        path = path / "tokenizer.json"
    if os.path.isfile(path):
        return _bpe_from_file(path, normalization)
    if source.endswith(".json") or source.startswith((".", "/", "~")) or os.path.isdir(source):
        raise UserError(f"the tokenizer file {path} does not exist: check source, or leave it empty to train one")
    library_json = _hub_tokenizer(source)
    try:
        return BPETokenizer(library_json, normalization)
    except UserError as error:
        raise UserError(f"the hub tokenizer {source!r} cannot be used: {error}") from None


def _bpe_from_file(path: Path, normalization: Normalization) -> BPETokenizer:
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from None
    if isinstance(document, dict) and document.get("format") == FORMAT:
        ours = load_tokenizer(path)
        if not isinstance(ours, BPETokenizer):
            raise UserError(f"{path} holds a {ours.kind} tokenizer, not BPE: set kind to {ours.kind}")
        return BPETokenizer(json.dumps(ours._payload()["tokenizers"]), normalization)
    try:
        return BPETokenizer(text, normalization)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from None


def _hub_tokenizer(name: str) -> str:
    """JSON of the hub's tokenizer `name`, from the local hub cache if it is there."""
    import huggingface_hub

    try:
        with quiet_hub():
            cached = huggingface_hub.try_to_load_from_cache(name, "tokenizer.json")
            if isinstance(cached, str):
                return Path(cached).read_text(encoding="utf-8")
            check_hub_reachable()
            return tokenizers.Tokenizer.from_pretrained(name).to_str()
    except Exception as error:  # hub, network and library errors share no base class
        raise UserError(
            f"cannot get the tokenizer {name!r} from the hub ({first_line(error)}): check the name and the "
            "connection, or download its tokenizer.json and give that file"
        ) from None


def _validated_pieces(pieces: Iterable[str], alphabet: str | None) -> Iterator[str]:
    for piece in pieces:
        encode_utf8(piece)
        if alphabet is not None and not set(piece) <= set(alphabet):
            raise UnknownCharacters(piece, alphabet)
        # smaller pieces let the library count words in parallel
        yield from text_pieces(piece, _PIECE)


def _batches(pieces: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _parts(component: Any, kind: str) -> list[dict[str, Any]]:
    """A component of the library's JSON and, if it is a Sequence, its members."""
    if not isinstance(component, dict):
        return []
    members = component.get(kind) or []
    return [component, *members]


def _has_byte_level(specification: dict[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for part in _parts(specification["pre_tokenizer"], "pretokenizers"))


def _check_invertible(specification: dict[str, Any]) -> None:
    model = specification["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"its model is {model['type']}, only BPE is supported")
    if specification["normalizer"] is not None:
        raise UserError("it normalises text by itself, so the text cannot be restored from tokens")
    for part in _parts(specification["pre_tokenizer"], "pretokenizers"):
        if part["type"] not in ("ByteLevel", "Split", "Digits", "Sequence"):
            raise UserError(f"its pre-tokenizer {part['type']} is not byte-level")
        if part.get("add_prefix_space"):
            raise UserError("it adds a space before the text, so the text cannot be restored from tokens")
        if part["type"] == "Split" and part["behavior"] == "Removed":
            raise UserError("its pre-tokenizer removes characters, so the text cannot be restored from tokens")
    if model.get("dropout"):
        raise UserError(f"it drops merges at random (dropout={model['dropout']}): set dropout to null")
    if not _has_byte_level(specification) and (model.get("unk_token") or model.get("byte_fallback")):
        raise UserError("it is not byte-level and has stand-ins for unknown characters, which cannot be restored")
    affixes = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
    if any(affixes):
        raise UserError(f"its tokens carry marks of word parts {affixes}, so they are not pieces of text")


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte (Radford et al. 2019, `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
