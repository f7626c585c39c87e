"""Texts, prompts, templates and stops of users, read by one rule."""

import re

import pytest

from tarflowlm.data import TEXT8_ALPHABET, ByteTokenizer, CharTokenizer, load_tokenizer
from tarflowlm.data.bpe import train_bpe
from tarflowlm.data.prompts import (
    BLANK,
    LONGEST_GAP,
    has_gaps,
    read,
    read_stop,
    read_template,
    tokens_without,
)
from tarflowlm.errors import UnknownCharacters, UserError
from tarflowlm.runs.hub import FOLDER

TEXT8 = CharTokenizer(TEXT8_ALPHABET, "text8")
LOWER = CharTokenizer(TEXT8_ALPHABET, "none")
TEXT8_BPE = train_bpe(
    [" the cat sat on the mat"] * 9, 32, alphabet=TEXT8_ALPHABET, normalization="text8"
)
SMALL = load_tokenizer(FOLDER / "english-small")
TOKENIZERS = {"char": TEXT8, "bpe": TEXT8_BPE, "normalize": LOWER}


def how(name):
    return "text8" if name == "normalize" else None


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the cat sat", "the cat sat"),
        ("the cat sat ", "the cat sat "),
        (" the cat", " the cat"),
        ("\tthe cat\n\n", " the cat "),
        ("It's 1815.", "it s one eight one five"),
        ("The Müller", "the m ller"),
        ("the\ncat", "the cat"),
        ("a  b", "a b"),
        ("the_cat", "the cat"),
        ("The, ", "the "),
        (", the", "the"),
        (" ", " "),
        (" \n ", " "),
        ("<|endoftext|>a", "a"),
    ],
)
def test_text8_keeps_a_space_at_an_end_iff_it_was_given(name, text, expected):
    reading = read(TOKENIZERS[name], text, normalize=how(name))
    assert reading.text == expected == TOKENIZERS[name].decode(reading.tokens.tolist())
    assert reading.notice == (None if text == expected else f"read as: {expected}")
    assert read(TOKENIZERS[name], reading.text).notice is None


@pytest.mark.parametrize("text", ["日本", ".", ". ", "...\n", " 日本 "])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_of_which_nothing_is_left_is_refused(name, text):
    with pytest.raises(UserError, match=r"nothing is left of the stop .* give some letters"):
        read(TOKENIZERS[name], text, name="stop", normalize=how(name))
    with pytest.raises(UserError, match="nothing is left of the template"):
        read_template(TOKENIZERS[name], f"_{text}", normalize=how(name))


@pytest.mark.parametrize("text", ["It's 1815, Müller.\n", "a  b", "日本", " ", "the_cat "])
def test_text_of_a_model_without_normalisation_stays_as_it_is(text):
    for tokenizer in (SMALL, ByteTokenizer()):
        reading = read(tokenizer, text)
        assert reading.text == text == tokenizer.decode(reading.tokens.tolist())
        assert reading.notice is None


def test_alphabet_without_upper_case_gets_lower_case_and_counts_what_it_lacks():
    assert read(LOWER, "The Cat").text == "the cat"
    assert read(TEXT8_BPE.with_normalization("none"), "The Cat").text == "the cat"
    assert read_template(LOWER, "The _at").text == "the _at"
    with pytest.raises(
        UnknownCharacters, match=r"^2 of 12 characters \(1 kinds: 'ü' x2\) are not in"
    ):
        read(LOWER, "Die Müller ü")
    assert read(TEXT8, "The cat", normalize="none").text == "the cat"


@pytest.mark.parametrize("text", ["", "a\udcfc"])
def test_empty_text_and_text_that_is_not_utf8_are_refused_by_name(text):
    with pytest.raises(UserError, match="other text"):
        read(TEXT8, text, name="other text")
    with pytest.raises(UserError, match="template"):
        read_template(TEXT8, text)


def test_space_at_the_end_of_a_prompt_is_left_to_the_next_token_where_tokens_hold_it():
    for tokenizer in (SMALL, TEXT8_BPE):
        for start in ("the ", "the", " ", " the "):
            begun = read(tokenizer, start, goes_on=True).tokens.tolist()
            whole = read(tokenizer, start.rstrip() + " cat").tokens.tolist()
            assert begun == whole[: len(begun)] or start == " "
            assert tokenizer.decode(begun) == (start.removesuffix(" ") or " ")
            begins = read(tokenizer, start, goes_on=True).begins
            assert (begins is not None) == (start in ("the ", " the "))
            if begins is not None:
                kept = [tokenizer.token_bytes[token] for token in begins.nonzero()[:, 0]]
                assert kept == [token for token in tokenizer.token_bytes if token[:1] == b" "]
    assert TEXT8.decode(read(TEXT8, "the his ", goes_on=True).tokens.tolist()) == "the his "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the_cat", "the_cat"),
        ("The _ sat", "the _ sat"),
        ("the __, then", "the __ then"),
        ("_, a", "_ a"),
        ("it's _.", "it s _"),
        ("2_2 ", "two _ two "),
        ("a_日本_", "a_ _"),
        (" _ ", " _ "),
        ("____", "____"),
    ],
)
def test_template_keeps_blanks_which_count_as_letters(text, expected):
    for name, tokenizer in TOKENIZERS.items():
        reading = read_template(tokenizer, text, normalize=how(name))
        assert reading.text == expected
        assert (reading.tokens == BLANK).sum() == text.count("_")
        assert read_template(tokenizer, reading.text).text == expected
    tokens = read_template(TEXT8, text).tokens.tolist()
    assert [BLANK if c == "_" else TEXT8_ALPHABET.index(c) for c in expected] == tokens


def test_a_blank_behind_a_backslash_is_a_character():
    text = r"a \_cat\_ sat _ here"
    for tokenizer, expected in ((TEXT8, "a cat sat _ here"), (SMALL, "a _cat_ sat _ here")):
        reading = read_template(tokenizer, text)
        assert (reading.tokens == BLANK).sum() == 1
        assert reading.given == "a _cat_ sat _ here"
        assert reading.text == expected
    with pytest.raises(UserError, match="no blank"):
        read_template(TEXT8, r"a \_ b")


def test_a_blank_may_be_a_letter_of_the_alphabet():
    """A text with underscores, such as a program, trains a model of letters that has them."""
    tokenizer = CharTokenizer("_ abcdefghijklmnopqrstuvwxyz", "none")
    for text, expected in (
        (r"a\_b = _c", "a_b = ?c"),
        ("the [...4] of", "the ???? of"),
        (r"\_ the [...2] of", "_ the ?? of"),
    ):
        tokens = read_template(tokenizer, text.replace("=", "e")).tokens.tolist()
        shown = "".join("?" if t == BLANK else tokenizer.alphabet[t] for t in tokens)
        assert shown == expected.replace("=", "e")
    assert (read_template(TEXT8, "th_ c_t", "t").tokens == BLANK).sum() == 2


@pytest.mark.parametrize(
    ("blank", "message"), [("", "--blank"), ("__", "--blank"), ("?", "no blank")]
)
def test_blank_that_cannot_be_one_is_refused(blank, message):
    with pytest.raises(UserError, match=message):
        read_template(TEXT8, "the _ sat", blank)


GAPS = "Once there was [...] who lived in the [...12] forest, un[...3]ed."


@pytest.mark.parametrize("tokenizer", [SMALL, TEXT8], ids=["bpe", "char"])
def test_given_text_around_gaps_comes_out_unchanged(tokenizer):
    reading = read_template(tokenizer, GAPS)
    pieces = [tokenizer.decode(piece.tolist()) for piece in reading.parts[::2]]
    gaps = reading.parts[1::2]
    assert [(gap.least, gap.most) for gap in gaps] == [(1, LONGEST_GAP), (1, 12), (1, 3)]
    assert len(reading.tokens) == sum(len(piece) for piece in reading.parts[::2]) + LONGEST_GAP + 15
    text = pieces[0]
    for gap, piece in zip(gaps, pieces[1:], strict=True):
        # what a gap may begin with restores the space that was left to it
        text += "X" if gap.begins is None else " X"
        text += piece
    assert text == re.sub(r"\[\.\.\.\d*\]", "X", reading.text)
    for gap in gaps:
        if gap.begins is not None:
            kept = [tokenizer.token_bytes[token] for token in gap.begins.nonzero()[:, 0]]
            assert kept
            assert all(token.startswith(b" ") for token in kept)
    mixed = read_template(tokenizer, "[...] of _ it").parts[1::2]
    assert [gap.most for gap in mixed] == [LONGEST_GAP, 1]
    blanks = read_template(tokenizer, "the _ of").parts[1::2]
    assert [gap.most for gap in blanks] == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a [...0] b", "0 tokens"),
        ("a [...00] b", "0 tokens"),
        ("a [... b", "cannot be read"),
        ("a _ [...x] b", "cannot be read"),
        ("a [...99999] b", "cannot be read"),
        ("the end [...]", "ends in a gap"),
        ("the end [...] ", "ends in a gap"),
    ],
)
def test_gaps_that_mean_nothing_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        read_template(SMALL, text)


def test_a_gap_before_what_normalisation_drops_is_refused():
    with pytest.raises(UserError, match="ends in a gap"):
        read_template(TEXT8, "the king of[...6].")


def test_a_stop_that_loses_its_punctuation_is_a_whole_word():
    given = ["Question:", "Q:", "The end", " the", "ab\n"]
    assert [read_stop(TEXT8, stop).text for stop in given] == [
        " question ",
        " q ",
        "the end",
        " the",
        "ab ",
    ]
    assert read_stop(LOWER, "Q:", normalize="text8").text == " q "
    assert read_stop(SMALL, "Q:").text == "Q:"


def test_gaps_are_read_as_phones_write_them():
    plain = read_template(SMALL, "a [...3] b [...] c")
    for text in ("a [..3] b […] c", "a […3] b [..] c"):
        found = read_template(SMALL, text)
        assert found.tokens.tolist() == plain.tokens.tolist()
        assert [part.most for part in found.parts[1::2]] == [3, 8]
    assert all(map(has_gaps, ("a […] b", "a [..4]", "the _ b", "__ b", "a _, b")))
    assert not any(map(has_gaps, ("a [.] b", "a_b", "_name", "[4]")))


def test_tokens_without_letters_have_none_of_them_in_either_case():
    for tokenizer in (SMALL, TEXT8, ByteTokenizer()):
        free = tokens_without(tokenizer, "eQ")
        for token, kept in zip(tokenizer.token_bytes, free.tolist(), strict=True):
            assert kept == (not set(token) & set(b"eEqQ"))
    for letters in (TEXT8_ALPHABET, "abcdefghijklmnopqrstuvwxyz"):
        with pytest.raises(UserError, match="no letters are left"):
            tokens_without(TEXT8, letters)
    with pytest.raises(UserError, match="text of `without` is not UTF-8"):
        tokens_without(TEXT8, "e\udcff")
    # half of a character might be completed to a letter that is left out
    assert not tokens_without(ByteTokenizer(), "é")[0xC3]
    # a letter without a capital bans none of the letters that its capital would have
    letters = CharTokenizer("sSß", "none")
    assert tokens_without(letters, "ß").tolist() == [True, True, False]
