"""The tokenizer of a run: its configuration, and how it is built from it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from tarflowlm.data.bpe import bpe_from, train_bpe
from tarflowlm.data.text import NORMALIZATIONS, TEXT8_ALPHABET, Normalization
from tarflowlm.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, check_alphabet
from tarflowlm.errors import UserError

Kind = Literal["char", "byte", "bpe"]
LARGEST_BPE = 1 << 22
"""Tokens of a BPE at most: the library reserves memory for all of them, and aborts the process where it fails."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer of a run. Contradictions raise UserError and name the field."""

    kind: Kind = "char"
    """Units of text: characters of `alphabet`, UTF-8 bytes, or byte-pair encoding."""
    alphabet: str = TEXT8_ALPHABET
    """The characters of kind char, or those that BPE starts from if it is trained here on text8-normalised text."""
    vocab_size: int = 0
    """Number of tokens of a BPE trained here; 0 for every other tokenizer."""
    source: str = ""
    """BPE only: a tokenizer.json or a hub name such as gpt2. Empty: train one on the training split."""
    normalize: Normalization = "text8"
    """Normalisation of the text: none, or text8 (a-z and single spaces; digits are spelled out)."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("kind", self.kind, get_args(Kind)),
            ("normalize", self.normalize, NORMALIZATIONS),
        ):
            if value not in allowed:
                raise UserError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        if self.kind != "bpe" or self.source:
            self._check_unused_bpe_fields()
        else:
            minimum = len(self.alphabet) + 1 if self.uses_alphabet else 257
            if self.vocab_size < minimum:
                raise UserError(
                    f"vocab_size={self.vocab_size} is too small for a BPE trained here: it needs {minimum} or "
                    "more (or set source to a tokenizer.json or hub name)"
                )
            if self.vocab_size > LARGEST_BPE:
                raise UserError(f"vocab_size={self.vocab_size} is too large for a BPE: at most {LARGEST_BPE:,}")
        if self.uses_alphabet:
            check_alphabet(self.alphabet)
            missing = sorted(set(TEXT8_ALPHABET) - set(self.alphabet))
            if self.normalize == "text8" and missing:
                raise UserError(
                    f"alphabet lacks {''.join(missing)!r}, which normalize='text8' can produce: "
                    "add them or set normalize to none"
                )
        elif self.alphabet != TEXT8_ALPHABET:
            raise UserError(
                f"alphabet={self.alphabet!r} has no effect here (kind={self.kind!r}, source={self.source!r}, "
                f"normalize={self.normalize!r}): leave it out"
            )

    def _check_unused_bpe_fields(self) -> None:
        if self.kind != "bpe" and self.source:
            raise UserError(f"source={self.source!r} has no effect with kind={self.kind!r}: set kind to bpe")
        if self.vocab_size != 0:
            why = f"source={self.source!r}" if self.source else f"kind={self.kind!r}"
            raise UserError(f"vocab_size={self.vocab_size} has no effect with {why}, which fixes it: leave it out")

    @property
    def uses_alphabet(self) -> bool:
        """Whether tokens are, or start from, the characters of `alphabet`."""
        if self.kind == "char":
            return True
        return self.kind == "bpe" and not self.source and self.normalize == "text8"

    @property
    def needs_training(self) -> bool:
        """Whether `build_tokenizer` must be given training text."""
        return self.kind == "bpe" and not self.source


def build_tokenizer(config: TokenizerConfig, training_text_iter: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer that `config` describes.

    `training_text_iter` yields pieces of the training split, already normalised. It is required, and read, only if
    BPE is trained here. UserError for a source that cannot be loaded, or a text too small to train on.
    """
    if config.kind == "char":
        return CharTokenizer(config.alphabet, config.normalize)
    if config.kind == "byte":
        return ByteTokenizer(config.normalize)
    if config.source:
        return bpe_from(config.source, config.normalize)
    if training_text_iter is None:
        raise UserError(
            "kind='bpe' without source is trained here and needs training text: give a corpus or a source"
        )
    return train_bpe(
        training_text_iter,
        config.vocab_size,
        alphabet=config.alphabet if config.uses_alphabet else None,
        normalization=config.normalize,
    )
