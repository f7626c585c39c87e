"""Character and byte tokenizers, and the tokenizer file."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflowlm.data import (
    TEXT8_ALPHABET,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    TokenizerConfig,
    build_tokenizer,
    load_tokenizer,
)
from tarflowlm.errors import UserError

# from the alphabet of the property test below, whose characters need one to four bytes each
WIDE = "aé€\U0001f600\x00\n"
UNICODE = CharTokenizer(WIDE, "none")
quick = settings(derandomize=True, max_examples=100, deadline=None)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


@quick
@given(any_text)
def test_bytes_round_trip_and_count_characters(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == text
    assert tokenizer.characters_per_token[ids].sum() == len(text)


@quick
@given(st.text(st.sampled_from(WIDE), max_size=80))
def test_characters_round_trip_and_count_characters(text):
    ids = UNICODE.encode(text)
    assert ids.dtype == np.int64
    assert [WIDE[i] for i in ids] == list(text)
    assert UNICODE.decode(ids) == text
    assert UNICODE.characters_per_token[ids].sum() == len(text)


def test_ids_are_positions_in_the_alphabet():
    tokenizer = build_tokenizer(TokenizerConfig())
    assert tokenizer.vocab_size == 27
    assert tokenizer.encode(TEXT8_ALPHABET).tolist() == list(range(27))
    assert tokenizer.symbols == list(TEXT8_ALPHABET)


def test_alphabets_of_more_than_a_byte():
    alphabet = "".join(chr(0x4E00 + i) for i in range(300)) + "ab"
    tokenizer = CharTokenizer(alphabet, "none")
    for text in (alphabet, "ab", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for unknown in ("c", "\U0010ffff"):
        with pytest.raises(UserError, match="1 of 2 characters"):
            tokenizer.encode("a" + unknown)


def test_unknown_characters_are_counted_and_shown():
    tokenizer = CharTokenizer(TEXT8_ALPHABET)
    with pytest.raises(UserError) as caught:
        tokenizer.encode("Caf\u00e9 \x00\x00\x00 A\ud800 C")
    message = str(caught.value)
    assert message.startswith("8 of 13 characters (5 kinds: '\\x00' x3, 'C' x2, 'A' x1, 'é' x1, '\\ud800' x1)")
    assert "BPE" in message
    assert "\n" not in message


def test_many_unknown_characters_are_shown_in_part():
    with pytest.raises(UserError, match=r"26 kinds: 'A' x1, .*'H' x1, \.\.\.\)"):
        CharTokenizer(TEXT8_ALPHABET).encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_an_ascii_unknown_is_found_on_the_fast_path():
    with pytest.raises(UserError, match="1 of 3 characters"):
        CharTokenizer(TEXT8_ALPHABET).encode("a\x7fb")


def test_encode_does_not_normalise_but_prepare_does():
    tokenizer = CharTokenizer(TEXT8_ALPHABET)
    assert tokenizer.prepare("The 2!") == " the two"
    assert CharTokenizer(TEXT8_ALPHABET, "none").prepare("The 2!") == "The 2!"


def test_lone_surrogates_are_refused():
    with pytest.raises(UserError, match=r"character 1 of the text, '\\ud800', is half of a surrogate pair"):
        ByteTokenizer().encode("a\ud800")


def test_incomplete_utf8_shows_as_replacement():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("a€")[:-1]) == "a\ufffd"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("ids", [[0, 256], [-1], np.array([[0]]), [0.5], torch.zeros(2, 2, dtype=torch.long)])
def test_impossible_ids_are_refused(ids):
    with pytest.raises(UserError, match="token id"):
        ByteTokenizer().decode(ids)


def test_ids_may_be_a_tensor():
    assert ByteTokenizer().decode(torch.tensor([104, 105])) == "hi"


def test_symbols_are_printable():
    symbols = ByteTokenizer().symbols
    assert len(symbols) == 256
    assert all(symbol.isprintable() for symbol in symbols)
    assert (symbols[ord("A")], symbols[ord("\n")], symbols[0xE2]) == ("A", "\\n", "\\xe2")


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer(TEXT8_ALPHABET), UNICODE, ByteTokenizer(), ByteTokenizer("text8")], ids=repr
)
def test_saved_tokenizers_load_as_they_were(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = load_tokenizer(path)
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.to_json() == tokenizer.to_json()
        assert loaded.token_bytes == tokenizer.token_bytes
        assert loaded.normalization == tokenizer.normalization
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_fingerprints_tell_tokenizers_apart():
    tokenizers = [
        CharTokenizer("ab", "none"),
        CharTokenizer("ba", "none"),
        CharTokenizer("ab", "text8"),
        ByteTokenizer("none"),
        ByteTokenizer("text8"),
    ]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == len(tokenizers)
    # written down: a checkpoint's fingerprint must not change with the program
    assert tokenizers[3].fingerprint == "3c517e0fd89156d24ca179eaf386d867034b09d9df367c79e1323ac6481f3505"


GOOD = json.loads(CharTokenizer("ab", "none").to_json())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a tarflowlm tokenizer"),
        ('{"version": "1.0", "model": {}}', "not a tarflowlm tokenizer"),
        (json.dumps(GOOD | {"version": 99}), "format version 99"),
        (json.dumps(GOOD | {"kind": "word"}), "kind 'word'"),
        (json.dumps(GOOD | {"kind": []}), "kind "),
        (json.dumps(GOOD | {"normalize": "nfc"}), "normalize='nfc'"),
        (json.dumps(GOOD | {"alphabet": "aa"}), "more than once"),
        (json.dumps(GOOD | {"alphabet": 3}), "damaged"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "alphabet"}), "damaged"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "normalize"}), "damaged"),
    ],
)
def test_broken_tokenizer_files_are_refused(content, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_tokenizer_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        ByteTokenizer().save(tmp_path / "missing" / "tokenizer.json")


def test_from_json_is_on_the_base_class():
    assert isinstance(Tokenizer.from_json(ByteTokenizer().to_json()), ByteTokenizer)
