"""Character and byte tokenizers, the tokenizer file, and the configuration of a tokenizer."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflowlm.data import (
    TEXT8_ALPHABET,
    ByteTokenizer,
    CharTokenizer,
    TokenizerConfig,
    load_tokenizer,
)
from tarflowlm.errors import UnknownCharacters, UserError
from tarflowlm.runs.hub import FOLDER

# from the alphabet of the property test below, whose characters need one to four bytes each
WIDE = "aé€\U0001f600\x00\n"
UNICODE = CharTokenizer(WIDE, "none")
IN_BYTES = ByteTokenizer()
quick = settings(derandomize=True, max_examples=100, deadline=None)


@quick
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_bytes_round_trip_and_count_characters(text):
    ids = IN_BYTES.encode(text)
    assert ids.dtype == np.int64
    assert IN_BYTES.decode(ids) == text
    assert IN_BYTES.characters_per_token[ids].sum() == len(text)


@quick
@given(st.text(st.sampled_from(WIDE), max_size=80))
def test_characters_round_trip_and_count_characters(text):
    ids = UNICODE.encode(text)
    assert ids.dtype == np.int64
    assert [WIDE[i] for i in ids] == list(text)
    assert UNICODE.decode(ids) == text
    assert UNICODE.characters_per_token[ids].sum() == len(text)
    assert UNICODE.bytes_per_token[ids].sum() == len(text.encode())


def test_unknown_characters_are_counted_and_shown():
    with pytest.raises(UnknownCharacters) as caught:
        CharTokenizer(TEXT8_ALPHABET).encode("Caf\u00e9 \x00\x00\x00 A\ud800 C")
    message = str(caught.value)
    assert message.startswith(
        "8 of 13 characters (5 kinds: '\\x00' x3, 'C' x2, 'A' x1, 'é' x1, '\\ud800' x1)"
    )
    assert "\n" not in message
    with pytest.raises(UnknownCharacters, match=r"26 kinds: 'A' x1, .*'H' x1, \.\.\.\)"):
        CharTokenizer(TEXT8_ALPHABET).encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_symbols_are_printable():
    symbols = ByteTokenizer().symbols
    assert all(symbol.isprintable() for symbol in symbols)
    assert (symbols[ord("A")], symbols[ord("\n")], symbols[0xE2]) == ("A", "\\n", "\\xe2")


@pytest.mark.parametrize(
    "tokenizer",
    [CharTokenizer(TEXT8_ALPHABET), UNICODE, ByteTokenizer(), ByteTokenizer("text8")],
    ids=repr,
)
def test_saved_tokenizers_load_as_they_were(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = load_tokenizer(path)
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.token_bytes == tokenizer.token_bytes
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    other = tokenizer.with_normalization("text8")
    assert (other.normalization, other.token_bytes) == ("text8", tokenizer.token_bytes)
    assert other.end == tokenizer.end


def test_fingerprints_tell_tokenizers_apart_and_do_not_change_with_the_program():
    made = [
        CharTokenizer("ab", "none"),
        CharTokenizer("ba", "none"),
        CharTokenizer("ab"),
        ByteTokenizer(),
    ]
    assert len({tokenizer.fingerprint for tokenizer in made}) == len(made)
    assert made[3].fingerprint == "9ae6a614626678bb87ebef606675ce416733df60d12714093a98e046d119a0a3"
    small = load_tokenizer(FOLDER / "english-small")
    expected = [324, 506, 582, 337, 804, 772, 82, 13]
    assert small.encode("The old king had three sons.").tolist() == expected


@quick
@given(
    st.text(
        st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(WIDE + "\u212aZ1 ")),
        max_size=80,
    )
)
@pytest.mark.parametrize(
    "ours", [CharTokenizer(TEXT8_ALPHABET), ByteTokenizer(), ByteTokenizer("text8")], ids=repr
)
def test_the_library_opens_the_file_and_reads_texts_alike(ours, text):
    theirs = tokenizers.Tokenizer.from_str(ours.to_json())
    prepared = ours.prepare(text)
    # of a text without letters the library leaves nothing, and text8 a space
    ids = [] if prepared == " " else ours.encode(prepared).tolist()
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids) == (prepared if ids else "")


GOOD = json.loads(CharTokenizer("ab", "none").to_json())


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[" * 100_000,
        "[]",
        "null",
        b"\xff",
        *(
            json.dumps(GOOD | change)
            for change in (
                {"normalizer": "nfc"},
                {"normalizer": {"type": "NFC"}},
                {"model": 3},
                {"model": GOOD["model"] | {"vocab": {"a": 0}}},
                {"model": GOOD["model"] | {"vocab": {"a": 0, "b": "1"}}},
            )
        ),
        *(
            json.dumps({k: v for k, v in GOOD.items() if k != name})
            for name in ("normalizer", "pre_tokenizer", "added_tokens", "model")
        ),
    ],
)
def test_damaged_files_are_one_line_with_their_name(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"alphabet": ""}, "alphabet"),
        ({"alphabet": "a\ud800", "normalize": "none"}, "alphabet"),
        ({"alphabet": "abc"}, "alphabet"),
        ({"kind": "bpe", "source": "gpt2", "alphabet": "ab"}, "alphabet"),
        ({"kind": "bpe", "vocab_size": 300, "normalize": "none", "alphabet": "ab"}, "alphabet"),
        ({"source": "gpt2"}, "source"),
        ({"vocab_size": 27}, "vocab_size"),
        ({"kind": "bpe"}, "vocab_size"),
        ({"kind": "bpe", "vocab_size": 10**9}, "vocab_size"),
        ({"kind": "bpe", "vocab_size": 256, "normalize": "none"}, "vocab_size"),
        ({"kind": "bpe", "source": "gpt2", "vocab_size": 300}, "vocab_size"),
    ],
)
def test_contradictory_configurations_name_the_field(fields, name):
    with pytest.raises(UserError, match=name) as caught:
        TokenizerConfig(**fields)
    assert "\n" not in str(caught.value)
