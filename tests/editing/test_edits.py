"""Edits that requests ask for: what each does to a text, with its defaults."""

import pytest

import tarflowlm
from helpers import tiny_flow
from tarflowlm.data.bpe import train_bpe
from tarflowlm.data.tokenizer import CharTokenizer
from tarflowlm.editing.edits import edit
from tarflowlm.errors import Progress, UserError
from tarflowlm.requests import Edit

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
def lm(request) -> tarflowlm.Pretrained:
    tokenizer = (
        CharTokenizer(" adbceghiknorstuwKT", "none")
        if request.param == "characters"
        else WORD_PIECES
    )
    model = tiny_flow(
        vocab_size=tokenizer.vocab_size, context=32, couplings=("mixd", "mix1"), log_std=-4.0
    )
    return tarflowlm.Pretrained(model, tokenizer)


def edited(lm: tarflowlm.Pretrained, **options) -> list[str]:
    """The texts of two edits, after checks that hold for all of them."""
    progress = Stages()
    found = edit(Edit(text=TEXT, num=2, seed=1, **options), lm, progress)
    assert progress.count == progress.total
    change = found.change
    assert change.changed.shape == change.tokens.shape
    if change.tokens.shape == change.before.shape:
        assert change.changed.equal(change.tokens != change.before)
    return found.texts


@pytest.mark.slow
def test_as_many_words_are_redrawn_as_asked(lm):
    tokens = lm.tokenizer.encode(TEXT)
    for options in ({"words": 1}, {"strength": 0.3}, {"words": 2, "pick": "unlikely"}):
        for text in edited(lm, candidates=4, **options):
            assert list(lm.tokenizer.encode(text)) != list(tokens)
    assert edited(lm, strength=0.0) == [TEXT] * 2


@pytest.mark.slow
def test_a_redrawn_word_keeps_the_spaces_around_it(lm):
    for number in range(1, 5):
        for text in edited(lm, words=number, candidates=60):
            assert len(text.split(" ")) >= 6 - number
            assert not text.startswith(" ")
            assert not text.endswith(" ")


def test_rewriting_changes_nothing_but_the_pieces(lm):
    for text in edited(lm, rewrite="saw", candidates=3):
        assert text.startswith("The king")
        assert text.endswith(" the other King")


def test_every_occurrence_of_a_piece_can_be_rewritten():
    tokenizer = CharTokenizer(" aeghiknstwTK", "none")
    model = tiny_flow(
        vocab_size=tokenizer.vocab_size, context=32, couplings=("mixd",), log_std=-4.0
    )
    request = Edit(text="The king saw the king", rewrite=("king",), everywhere=True, candidates=40)
    changed = edit(request, tarflowlm.Pretrained(model, tokenizer)).change.changed[0]
    assert changed[4:8].any()
    assert changed[17:].any()
    assert not changed[:4].any()
    assert not changed[8:17].any()


def test_replacing_keeps_the_rest_whatever_the_lengths(lm):
    queen = "queen" if lm.tokenizer is WORD_PIECES else "kings"
    for old, new in (
        ("king", queen),
        ("King", queen.title()),
        ("saw", "saw a"),
        ("saw the", "King"),
    ):
        found = lm.edit(TEXT, replace=(old, new), around=0)
        assert found == TEXT.replace(old, new)


def test_replacing_redraws_at_most_the_neighbouring_words(lm):
    for text in edited(lm, replace=("saw", "the saw"), candidates=8):
        assert text.startswith("The")
        assert " the saw" in text
        assert text.endswith(" King")
    with pytest.raises(UserError, match="context of 32"):
        edited(lm, replace=("saw", "the other " * 20))
    with pytest.raises(UserError, match="'dog'"):
        edited(lm, replace=("dog", "king"))


@pytest.mark.slow
def test_a_state_changes_everywhere_or_at_some_words(lm):
    assert edited(lm, level=1, strength=0.0) == [TEXT] * 2
    assert all(text != TEXT for text in edited(lm, level=0, strength=1.0))
    edited(lm, level=2, strength=0.5, words=1)
