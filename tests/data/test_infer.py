"""The tokenizer that keeps a text of one's own, and what others lose of it."""

import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers import prepared, suited_to
from tarflowlm.data import (
    TEXT8_ALPHABET,
    ByteTokenizer,
    CharTokenizer,
    DataConfig,
    TokenizerConfig,
    infer_tokenizer,
    misfit,
    prepare_corpus,
)
from tarflowlm.data.normalize import is_wrapped, unwrapped
from tarflowlm.data.reading import read_text
from tarflowlm.data.sources import resolve_source
from tarflowlm.data.splits import SPLITS
from tarflowlm.errors import UserError

CHARS = TokenizerConfig()
OPEN = TokenizerConfig(normalize="auto")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Perché no? È «così», papà.\n", "char"),
        ("def f(x):\n\treturn {x: [1, 'ß']}\n", "char"),
        ("".join(map(chr, range(0x4E00, 0x4E00 + 257))), "byte"),
    ],
)
def test_a_text_of_ones_own_keeps_every_character(text, kind, tmp_path, caplog):
    file = tmp_path / "own.txt"
    file.write_bytes(b"\xef\xbb\xbf" + (text * 9).replace("\n", "\r\n").encode())
    with caplog.at_level("INFO"):
        found = suited_to(str(file), OPEN)
    assert (found.kind, found.normalize) == (kind, "none")
    assert ["symbols" in one or "is short" in one for one in caplog.messages] == [True, True]
    corpus = prepared(str(file), found)
    read = "".join(corpus.tokenizer.decode(np.asarray(corpus.split(name))) for name in SPLITS)
    assert read == text * 9
    assert corpus.tokenizer.end is None
    assert corpus.tokenizer.vocab_size == (len(set(text)) if kind == "char" else 256)


def test_advice_for_english_is_given_for_english_alone(tmp_path, caplog):
    file = tmp_path / "own.txt"
    texts = {
        "The king of the land went to a wood. ": True,
        "ACGT": False,
        "Es war einmal ein alter König, der hatte drei. ": False,
    }
    for text, is_english in texts.items():
        caplog.clear()
        file.write_text(text * 99)
        with caplog.at_level("INFO"):
            suited_to(str(file), OPEN)
        assert "is short for a new model" in caplog.text
        assert ("learns English faster" in caplog.text) == is_english


def test_what_the_27_symbols_lack_is_told(tmp_path, caplog):
    file = tmp_path / "own.txt"
    with caplog.at_level("INFO"):
        file.write_text("f(x), a(b) " * 9)
        suited_to(str(file), replace(OPEN, normalize="text8"))
        assert "55.6% of the characters become spaces, ( ) , first" in caplog.text
        caplog.clear()
        file.write_text("The king of 1815 " * 9)
        suited_to(str(file), replace(OPEN, normalize="text8"))
        suited_to("tales", replace(OPEN, normalize="text8"))
    assert not caplog.messages


def test_what_is_asked_for_is_not_changed(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("Die Müller. " * 9, encoding="utf-8")
    few = TokenizerConfig(alphabet="ab", normalize="auto")
    assert suited_to(str(file), few) == replace(few, normalize="none")
    with pytest.raises(UserError, match="no fields, leave #field out"):
        resolve_source(DataConfig(source=f"{file}#field"))
    words = TokenizerConfig(kind="bpe", vocab_size=300, normalize="auto")
    assert suited_to(str(file), words) == replace(words, normalize="none")
    for given in (CHARS, TokenizerConfig(kind="byte", normalize="none")):
        assert suited_to(str(file), given) == given
    assert suited_to("tales", OPEN) == suited_to("text8", OPEN) == CHARS
    prepared(str(file), TokenizerConfig(kind="byte", normalize="none"), tmp_path / "out")
    assert suited_to(str(tmp_path / "out"), OPEN).kind == "byte"


def test_letters_that_normalisation_drops_are_reported(caplog, tmp_path):
    path = tmp_path / "german.txt"
    path.write_text("Die Müller führen über Brücken. " * 50, encoding="utf-8")
    text = DataConfig(source=str(path))
    assert "15.4% of the letters" in misfit(text, CharTokenizer(TEXT8_ALPHABET))
    assert misfit(text, ByteTokenizer()) is None
    assert "know, 'Düü" not in (misfit(text, CharTokenizer("abc", "none")) or "")
    path.write_text("日本語。" * 50, encoding="utf-8")
    with pytest.raises(UserError, match=r"nothing of .*german.txt.*another normalisation"):
        prepared(str(path), CHARS, tmp_path / "none")


# lines that were wrapped by hand


WRAPPED = """It was the best of times, it was the worst of times, it was the age
of wisdom, it was the age of foolishness, it was the epoch of belief,
it was the epoch of well-
known incredulity, it was the season of Light.

    A line of verse
    and another

The end."""


NOVEL = "\n\n".join(textwrap.fill("So it was the age of wisdom; " * (5 + n % 9)) for n in range(40))


def test_lines_of_paragraphs_are_joined():
    first, verse, end = unwrapped(WRAPPED).split("\n\n")
    assert "the age of wisdom" in first
    assert "of well-known incredulity" in first
    assert "\n" not in first
    assert (verse, end) == ("    A line of verse\n    and another", "The end.")
    assert unwrapped(unwrapped(WRAPPED)) == unwrapped(WRAPPED)


def test_wrapped_lines_are_noticed(tmp_path, caplog):
    file = tmp_path / "novel.txt"
    file.write_text(NOVEL)
    with caplog.at_level("INFO"):
        suited_to(str(file), OPEN)
    assert "--unwrap" in caplog.text
    caplog.clear()
    config = infer_tokenizer(DataConfig(source=str(file), unwrap=True))
    assert "--unwrap" not in caplog.text
    corpus = prepare_corpus(config, out=tmp_path / "out")
    text = "".join(corpus.tokenizer.decode(np.asarray(corpus.split(name))) for name in SPLITS)
    assert text == unwrapped(read_text(file))
    code = Path(__file__).read_text(encoding="utf-8")
    assert is_wrapped(NOVEL)
    assert not is_wrapped(code)
    assert not is_wrapped(unwrapped(NOVEL))
    assert not is_wrapped("")
