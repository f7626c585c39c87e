"""The tokenizer of a run: its configuration, and how it is built from it."""

from collections.abc import Iterable

from tarflowlm.config import TokenizerConfig as TokenizerConfig
from tarflowlm.data.bpe import bpe_from, train_bpe
from tarflowlm.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from tarflowlm.errors import UserError


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
