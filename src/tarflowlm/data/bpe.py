"""The tokenizer that a configuration describes; it is trained here, or read from a file."""

import json
import os
from collections.abc import Iterable, Iterator

import tokenizers

from tarflowlm.config import TOKENIZERS, Normalization, TokenizerConfig
from tarflowlm.data.library import (
    PIECE,
    ByteTokenizer,
    CharTokenizer,
    LibraryTokenizer,
    end_token,
    load_tokenizer,
)
from tarflowlm.data.reading import text_pieces
from tarflowlm.data.tokenizer import Tokenizer, check_own
from tarflowlm.errors import UnknownCharacters, UserError, first_line


def build_tokenizer(
    config: TokenizerConfig, training_text: Iterable[str] = (), *, has_documents: bool = False
) -> Tokenizer:
    """The tokenizer that `config` describes. BPE, or one of a user's own, is trained on pieces of
    normalised text.

    If the text `has_documents` and is not normalised, one token of a new tokenizer ends them.
    """
    how = config.normalization
    if config.source:
        # a tokenizer.json, a directory that holds one, or a name on the hub
        path = config.source
        found = load_tokenizer(path if os.path.exists(path) else _from_hub(path))
        if found.kind != config.kind:
            raise UserError(f"{path} has tokens of kind {found.kind}: set kind to that")
        found = found.with_normalization(how)
        if how == "text8":
            found.end = None  # a tokenizer.json with text8 has none
        return found
    if (own := TOKENIZERS[config.kind]) is not None:
        made: Tokenizer = own.train(training_text, config).with_normalization(how)
        check_own(made)
        return made
    has_end = has_documents and how == "none"
    if config.kind == "char":
        return CharTokenizer(config.alphabet, how, has_end=has_end)
    if config.kind == "byte":
        return ByteTokenizer(how, has_end=has_end)
    return train_bpe(
        training_text,
        config.vocab_size,
        alphabet=config.alphabet if config.uses_alphabet else None,
        normalization=how,
        has_end=has_end,
    )


def train_bpe(
    pieces: Iterable[str],
    vocab_size: int,
    *,
    alphabet: str | None,
    normalization: Normalization,
    has_end: bool = False,
) -> Tokenizer:
    """BPE trained on `pieces` of already normalised text; deterministic.

    `alphabet=None` gives byte-level BPE with GPT-2's word pattern (`vocab_size >= 257`); otherwise
    the tokens start from the characters of `alphabet`. A merge may include the one space before a
    word and never crosses words. With `has_end` the last token ends documents.
    """
    vocab_size -= has_end
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
    reached = library.get_vocab_size()
    if reached != vocab_size:
        what = f"the text gives at most {reached + has_end} tokens; ask for no more"
        raise UserError(f"data.tokenizer.vocab_size {vocab_size + has_end}: {what}")
    added = [end_token(reached)] if has_end else []
    return LibraryTokenizer(json.loads(library.to_str()) | {"added_tokens": added}, normalization)


def _checked(pieces: Iterable[str], alphabet: str | None) -> Iterator[str]:
    for piece in pieces:
        if alphabet is not None and not set(piece) <= set(alphabet):
            raise UnknownCharacters(piece, alphabet)
        yield from text_pieces([piece], PIECE)


def _from_hub(name: str) -> str:
    """The path of the tokenizer.json of a model of the hub, downloaded if needed."""
    import huggingface_hub

    try:
        path = huggingface_hub.try_to_load_from_cache(name, "tokenizer.json")
        if isinstance(path, str):
            return path
        # offline this fails at once, but `hf_hub_download` tries again for half a minute
        folder = huggingface_hub.snapshot_download(name, allow_patterns="tokenizer.json")
        return os.path.join(folder, "tokenizer.json")
    except Exception as error:  # hub, network and library errors share no base class
        what = f"the tokenizer {name} is neither a file nor on the hub ({first_line(error)})"
        raise UserError(f"{what}: check its name and the connection") from None
