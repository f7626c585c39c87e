"""Byte-pair encoding through the `tokenizers` library, and the tokenizer that a configuration
describes.
"""

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

from tarflowlm.config import Normalization, TokenizerConfig
from tarflowlm.data.sources import check_hub_reachable
from tarflowlm.data.text import text_pieces
from tarflowlm.data.tokenizer import FORMAT, ByteTokenizer, CharTokenizer, Tokenizer
from tarflowlm.errors import UnknownCharacters, UserError, first_line

_PIECE = 1 << 15  # characters per unit of the library's work, which it distributes over threads
_BATCH = 32  # pieces passed to the library at once: its per-token bookkeeping needs much memory


class BPETokenizer(Tokenizer):
    """Byte-pair encoding, either byte-level (GPT-2 and its relatives) or over the characters of an
    alphabet. `library_json` is the JSON of an invertible `tokenizers.Tokenizer`; ValueError for any
    other. Special tokens in the text, such as `<|endoftext|>`, become one token and count all their
    characters; none are added.
    """

    kind = "bpe"

    def __init__(self, library_json: str, normalization: Normalization = "none") -> None:
        super().__init__(normalization)
        try:
            self.library: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(library_json)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a tokenizer of the `tokenizers` library ({error})") from None
        self.library.no_truncation()
        self.library.no_padding()
        self._specification: dict[str, Any] = json.loads(self.library.to_str())
        self._is_byte_level = '"ByteLevel"' in json.dumps(self._specification["pre_tokenizer"])
        self._check_invertible()

    @cached_property
    def token_bytes(self) -> Sequence[bytes]:
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values()) + 1)
        byte_of = (
            {character: byte for byte, character in _byte_characters().items()}
            if self._is_byte_level
            else {}
        )
        added = {token["id"] for token in self._specification["added_tokens"]}
        for token, index in vocabulary.items():
            # a token with other characters is a special token that the file did not declare
            is_bytes = index not in added and all(c in byte_of for c in token)
            table[index] = bytes(byte_of[c] for c in token) if is_bytes else token.encode("utf-8")
        return table

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        return self.encode_each([text])

    def encode_each(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        pieces = [piece for text in texts for piece in text_pieces(text, _PIECE)]
        parts = [np.zeros(0, dtype=np.int64)]
        for i in range(0, len(pieces), _BATCH):
            for encoding in self.library.encode_batch_fast(
                pieces[i : i + _BATCH], add_special_tokens=False
            ):
                # through `array`, which converts a list of int in less than half of numpy's time
                parts.append(
                    np.frombuffer(array("I", encoding.ids), dtype=np.uintc).astype(np.int64)
                )
        # the library drops unknown characters silently
        if self.characters_per_token[ids := np.concatenate(parts)].sum() != sum(map(len, texts)):
            alphabet = "".join(token for token in self.library.get_vocab() if len(token) == 1)
            if not self._is_byte_level and not set().union(*texts) <= set(alphabet):
                raise UnknownCharacters("".join(texts), alphabet)
            raise UserError(
                "this BPE tokenizer does not keep all of the text (do special tokens swallow spaces?)"
            )
        return ids

    def _check_invertible(self) -> None:
        model = self._specification["model"]
        probe = "The cat,\n  12 caf\u00e9s \U0001f600. "
        if not self._is_byte_level:
            probe = "".join(token for token in self.library.get_vocab() if len(token) == 1) * 2
        ids = self.library.encode(probe, add_special_tokens=False).ids
        stand_ins = not self._is_byte_level and (
            model.get("unk_token") or model.get("byte_fallback")
        )
        if (
            stand_ins
            or model.get("dropout")
            or b"".join(self.token_bytes[i] for i in ids) != probe.encode()
        ):
            without = "a normaliser, a space before the text, dropout, or stand-ins for unknown characters"
            raise ValueError(
                f"it does not restore every text: use byte-level BPE such as GPT-2's, without {without}"
            )

    def _payload(self) -> dict[str, Any]:
        return {"tokenizers": self._specification}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any], normalization: Normalization) -> "BPETokenizer":
        return cls(json.dumps(payload["tokenizers"]), normalization)


def build_tokenizer(config: TokenizerConfig, training_text: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer that `config` describes; BPE may be trained on `training_text`, normalised
    pieces.
    """
    if config.kind == "char":
        return CharTokenizer(config.alphabet, config.normalize)
    if config.kind == "byte":
        return ByteTokenizer(config.normalize)
    if config.source:
        return _bpe_from(config.source, config.normalize)
    alphabet = config.alphabet if config.uses_alphabet else None
    return train_bpe(
        training_text, config.vocab_size, alphabet=alphabet, normalization=config.normalize
    )


def train_bpe(
    pieces: Iterable[str], vocab_size: int, *, alphabet: str | None, normalization: Normalization
) -> BPETokenizer:
    """BPE trained on `pieces` of already normalised text; deterministic. `alphabet=None` gives
    byte-level BPE with GPT-2's word pattern (`vocab_size >= 257`); otherwise the tokens start from
    the characters of `alphabet`. A merge may include the one space before a word and never crosses
    words.
    """
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    if alphabet is None:
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=True
        )
        library.decoder = tokenizers.decoders.ByteLevel()
        initial = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        library.pre_tokenizer = tokenizers.pre_tokenizers.Split(
            tokenizers.Regex(r" ?[^ ]+| "), behavior="isolated"
        )
        library.decoder = tokenizers.decoders.Fuse()
        initial = list(alphabet)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=initial, show_progress=False
    )
    library.train_from_iterator(_checked(pieces, alphabet), trainer)
    if (reached := library.get_vocab_size()) != vocab_size:
        what = f"vocab_size={vocab_size} cannot be reached, the training text gives {reached} tokens at most"
        raise UserError(f"{what}: set vocab_size to {reached} or less, or use more text")
    return BPETokenizer(library.to_str(), normalization)


def _checked(pieces: Iterable[str], alphabet: str | None) -> Iterator[str]:
    for piece in pieces:
        if alphabet is not None and not set(piece) <= set(alphabet):
            raise UnknownCharacters(piece, alphabet)
        yield from text_pieces(
            piece, _PIECE
        )  # smaller pieces let the library count words in parallel


def _bpe_from(source: str, normalization: Normalization) -> BPETokenizer:
    """BPE from a tokenizer.json (ours or the library's), a directory that holds one, or a name on
    the hub.
    """
    path = Path(source) / "tokenizer.json" if os.path.isdir(source) else Path(source)
    try:
        if os.path.isfile(path):
            text = path.read_text(encoding="utf-8")
        elif (
            source.endswith(".json") or source.startswith((".", "/", "~")) or os.path.isdir(source)
        ):
            raise ValueError(f"{path} does not exist: check source, or leave it empty to train one")
        else:
            text = _from_hub(source)
        document = json.loads(text)
        if isinstance(document, dict) and document.get("format") == FORMAT:
            if document["kind"] != "bpe":
                raise ValueError(
                    f"it is a {document['kind']} tokenizer, not BPE: set kind to {document['kind']}"
                )
            text = json.dumps(document["tokenizers"])
        return BPETokenizer(text, normalization)
    except (OSError, LookupError, ValueError) as error:
        raise UserError(f"cannot use the tokenizer {source}: {first_line(error)}") from None


def _from_hub(name: str) -> str:
    import huggingface_hub

    try:
        if isinstance(
            cached := huggingface_hub.try_to_load_from_cache(name, "tokenizer.json"), str
        ):
            return Path(cached).read_text(encoding="utf-8")
        check_hub_reachable()
        return tokenizers.Tokenizer.from_pretrained(name).to_str()
    except Exception as error:  # hub, network and library errors share no base class
        raise ValueError(
            f"{first_line(error)}; check the name and connection, or give its tokenizer.json"
        ) from None


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte (Radford et al. 2019, `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }
