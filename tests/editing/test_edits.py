"""The edits by name: what each does to a text, with its defaults."""

import dataclasses

import pytest
import torch

from helpers import tiny_flow
from tarflowlm.data.bpe import train_bpe
from tarflowlm.data.tokenizer import CharTokenizer
from tarflowlm.editing.edits import EDITS, WordSource, options_of
from tarflowlm.editing.states import encode
from tarflowlm.errors import Progress, UserError

TEXT = "The king saw the other King"
WORD_PIECES = train_bpe(
    [f"{TEXT} The Queen saw the queen. " * 9], 280, alphabet=None, normalization="none"
)


class Stages(Progress):
    """Checks that every stage gets as many units as were announced."""

    total = count = 0

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self.total, self.count = total, 0

    def advance(self, count: int = 1) -> None:
        self.count += count


@pytest.fixture(scope="module", params=["characters", "word pieces"])
def source(request) -> WordSource:
    tokenizer = (
        CharTokenizer(" adbceghiknorstuwKT", "none")
        if request.param == "characters"
        else WORD_PIECES
    )
    model = tiny_flow(
        vocab_size=tokenizer.vocab_size, context=32, couplings=("mixd", "mix1"), log_std=-4.0
    )
    generator = torch.Generator().manual_seed(0)
    text = encode(model, torch.from_numpy(tokenizer.encode(TEXT))[None], generator)
    return WordSource(model, text.repeated(2), generator, Stages(), tokenizer=tokenizer)


def edited(source: WordSource, name: str, **options) -> list[str]:
    """The texts of both edits, after checks that hold for all of them."""
    source = dataclasses.replace(source, generator=torch.Generator().manual_seed(1))
    edit = EDITS[name](source, **options)
    assert source.progress.count == source.progress.total
    assert edit.changed.shape == edit.tokens.shape
    if edit.tokens.shape == edit.before.shape:
        assert torch.equal(edit.changed, edit.tokens != edit.before)
    return [source.tokenizer.decode(row) for row in edit.tokens.tolist()]


def test_options_are_the_arguments_of_an_edit():
    assert options_of("words") == {"strength", "words", "pick", "candidates", "temperature"}
    assert "source" not in set().union(*map(options_of, EDITS))


@pytest.mark.slow
def test_as_many_words_are_redrawn_as_asked(source):
    for options, most in (
        ({"words": 1}, 1),
        ({"strength": 0.3}, 2),
        ({"words": 2, "pick": "unlikely"}, 2),
    ):
        for text in edited(source, "words", candidates=4, **options):
            changed = sum(
                a != b
                for a, b in zip(source.text.tokens[0], source.tokenizer.encode(text), strict=False)
            )
            assert changed > 0 or most == 0
    assert edited(source, "words", strength=0.0) == [TEXT] * 2


@pytest.mark.slow
def test_a_redrawn_word_keeps_the_spaces_around_it(source):
    for number in range(1, 5):
        for text in edited(source, "words", words=number, candidates=60):
            assert len(text.split(" ")) >= 6 - number
            assert not text.startswith(" ")
            assert not text.endswith(" ")


def test_rewriting_changes_nothing_but_the_pieces(source):
    for text in edited(source, "rewrite", pieces=["saw"], candidates=3):
        assert text.startswith("The king")
        assert text.endswith(" the other King")
    with pytest.raises(UserError, match="at least one"):
        edited(source, "rewrite", pieces=[])


def test_every_occurrence_of_a_piece_can_be_rewritten():
    text = "The king saw the king"
    tokenizer = CharTokenizer(" aeghiknstwTK", "none")
    model = tiny_flow(
        vocab_size=tokenizer.vocab_size, context=32, couplings=("mixd",), log_std=-4.0
    )
    generator = torch.Generator().manual_seed(0)
    tokens = encode(model, torch.from_numpy(tokenizer.encode(text))[None], generator)
    source = WordSource(model, tokens, generator, tokenizer=tokenizer)
    edit = EDITS["rewrite"](source, pieces=["king"], everywhere=True, candidates=40)
    changed = edit.changed[0]
    assert changed[4:8].any()
    assert changed[17:].any()
    assert not changed[:4].any()
    assert not changed[8:17].any()


REPLACED = [("king", "queen"), ("King", "Queen"), ("saw", "saw a"), ("saw the", "King")]


@pytest.mark.parametrize(("old", "new"), REPLACED)
def test_replacing_keeps_the_rest_whatever_the_lengths(source, old, new):
    if source.tokenizer is not WORD_PIECES:
        new = new.replace("queen", "kings").replace("Queen", "Kings")
    assert edited(source, "replace", old=old, new=new, around=0) == [TEXT.replace(old, new)] * 2


def test_replacing_redraws_at_most_the_neighbouring_words(source):
    for text in edited(source, "replace", old="saw", new="the saw", candidates=8):
        assert text.startswith("The")
        assert " the saw" in text
        assert text.endswith(" King")
    with pytest.raises(UserError, match="context of 32"):
        edited(source, "replace", old="saw", new="the other " * 20)
    with pytest.raises(UserError, match="'dog'"):
        edited(source, "replace", old="dog", new="king")


@pytest.mark.slow
def test_a_state_changes_everywhere_or_at_some_words(source):
    assert edited(source, "level", level=1, strength=0.0) == [TEXT] * 2
    everywhere = edited(source, "level", level=0, strength=1.0)
    assert all(text != TEXT for text in everywhere)
    edited(source, "level", level=2, strength=0.5, words=1)
