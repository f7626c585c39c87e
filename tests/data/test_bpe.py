"""Byte-pair encoding: trained here, from files, and by hub names without a network."""

import json

import huggingface_hub
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflowlm.data import (
    CharTokenizer,
    TokenizerConfig,
    build_tokenizer,
    load_tokenizer,
)
from tarflowlm.data.bpe import train_bpe
from tarflowlm.data.library import LibraryTokenizer
from tarflowlm.data.reading import text_pieces
from tarflowlm.errors import UnknownCharacters, UserError

CASED = (
    "It's the Cat, the cats' 12 hats \u2014 caf\u00e9 na\u00efve \U0001f600!\n\n  And so;\tmore. "
    * 20
)
BYTE_LEVEL = train_bpe([CASED], 300, alphabet=None, normalization="none")
CONFIG = TokenizerConfig(kind="bpe", vocab_size=64)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    st.text(
        st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("the cat\n ")),
        max_size=80,
    )
)
def test_byte_level_round_trips_and_counts_characters(text):
    ids = BYTE_LEVEL.encode(text)
    assert ids.dtype == np.int64
    assert BYTE_LEVEL.decode(ids) == text
    assert BYTE_LEVEL.characters_per_token[ids].sum() == len(text)


def test_small_vocabulary_over_the_27_characters(words):
    tokenizer = build_tokenizer(CONFIG, [words])
    assert tokenizer.vocab_size == 64
    assert tokenizer.symbols[:27] == list(CONFIG.alphabet)
    # one leading space may be part of a merge, and no token crosses words
    assert any(symbol.startswith(" ") and len(symbol) > 1 for symbol in tokenizer.symbols)
    assert all(" " not in symbol[1:] for symbol in tokenizer.symbols)
    for text in (words, "", " ", "   ", "zzz", "  a  the  ", "qxj the"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.characters_per_token[ids].sum() == len(text)
    with pytest.raises(
        UnknownCharacters, match=r"2 of 7 characters \(2 kinds: 'T' x1, 'é' x1\).*alphabet of 27"
    ):
        tokenizer.encode("The \u00e9 a")


def test_training_is_deterministic_and_ignores_how_text_is_cut(words):
    whole = build_tokenizer(CONFIG, [words])
    assert whole.fingerprint == build_tokenizer(CONFIG, text_pieces([words], 1000)).fingerprint


def test_training_refuses_too_little_text_and_foreign_characters():
    with pytest.raises(UserError, match=r"vocab_size 64: .* 29 tokens"):
        build_tokenizer(CONFIG, [" aa aa aa"])
    with pytest.raises(UserError, match=r"1 kinds: 'A' x1"):
        build_tokenizer(CONFIG, ["a A"])


def test_saved_bpe_loads_as_it_was(tmp_path, words):
    for tokenizer in (BYTE_LEVEL, build_tokenizer(CONFIG, [words])):
        tokenizer.save(tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.encode(words) == tokenizer.encode(words)).all()


def test_long_texts_encode_as_if_whole(monkeypatch):
    whole = BYTE_LEVEL.encode(CASED)
    monkeypatch.setattr("tarflowlm.data.library.PIECE", 16)
    monkeypatch.setattr("tarflowlm.data.library._BATCH", 3)
    assert (BYTE_LEVEL.encode(CASED) == whole).all()


def test_the_names_of_special_tokens_are_text_in_a_text():
    library = tokenizers.Tokenizer.from_str(BYTE_LEVEL.to_json())
    library.add_special_tokens(["<|endoftext|>"])
    library.enable_truncation(3)
    library.enable_padding(length=50)
    tokenizer = LibraryTokenizer(json.loads(library.to_str()))
    text = "the cat<|endoftext|>the cats"
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size == 301
    assert tokenizer.end == 300
    assert 300 not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.characters_per_token[ids].sum() == len(text)


def test_source_may_be_a_file_or_a_directory(tmp_path, no_network):
    library = tokenizers.Tokenizer.from_str(BYTE_LEVEL.to_json())
    library.save(str(tmp_path / "theirs.json"))
    BYTE_LEVEL.save(tmp_path)
    for source in (tmp_path / "theirs.json", tmp_path / "tokenizer.json", tmp_path):
        tokenizer = build_tokenizer(
            TokenizerConfig(kind="bpe", source=str(source), normalize="none")
        )
        assert tokenizer.fingerprint == BYTE_LEVEL.fingerprint
    # the normalisation is the run's choice, not the file's
    config = TokenizerConfig(kind="bpe", source=str(tmp_path), normalize="text8")
    assert build_tokenizer(config).prepare("A 1") == " a one"
    for missing in (tmp_path / "none.json", "none.json", tmp_path / "none"):
        with pytest.raises(UserError, match="neither a file"):
            build_tokenizer(TokenizerConfig(kind="bpe", source=str(missing)))


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
    ],
)
def test_tokenizers_that_do_not_restore_the_text_are_refused(changes, tmp_path):
    document = json.loads(BYTE_LEVEL.to_json()) | changes
    (tmp_path / "theirs.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"theirs\.json"):
        build_tokenizer(TokenizerConfig(kind="bpe", source=str(tmp_path / "theirs.json")))


def test_characters_are_not_taken_for_bpe(tmp_path):
    CharTokenizer("ab", "none").save(tmp_path)
    with pytest.raises(UserError, match="set kind to"):
        build_tokenizer(TokenizerConfig(kind="bpe", source=str(tmp_path)))


def test_hub_names_are_taken_from_the_hub_cache_and_fail_in_one_line_offline(
    monkeypatch, no_network, tmp_path
):
    BYTE_LEVEL.save(tmp_path / "cached.json")
    config = TokenizerConfig(kind="bpe", source="some/name", normalize="none")
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "cached.json")
    )
    assert build_tokenizer(config).fingerprint == BYTE_LEVEL.fingerprint
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(UserError, match=r"some/name is .*not known.*check its name") as caught:
        build_tokenizer(config)
    assert "\n" not in str(caught.value)
