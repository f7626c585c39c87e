"""Edits that requests ask for: what each does to a text, with its defaults."""

import pytest
import torch

import tarflowlm
from helpers import tiny_ar, tiny_flow
from tarflowlm.data import TEXT8_ALPHABET
from tarflowlm.data.bpe import train_bpe
from tarflowlm.data.library import CharTokenizer
from tarflowlm.editing.edits import (
    edit,
    find_all,
    neighbours,
    num_words,
    pick_words,
    words_of,
)
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


@pytest.fixture(scope="module", params=["characters", "word pieces", "baseline"])
def lm(request) -> tarflowlm.Pretrained:
    tokenizer = (
        CharTokenizer(" adbceghiknorstuwKT", "none")
        if request.param == "characters"
        else WORD_PIECES
    )
    shape = {"vocab_size": tokenizer.vocab_size, "context": 32}
    if request.param == "baseline":
        return tarflowlm.Pretrained(tiny_ar(**shape), tokenizer)
    model = tiny_flow(**shape, couplings=("mixd", "mix1"), log_std=-4.0)
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


@pytest.mark.parametrize("options", [{"words": 2}, {"level": 1, "strength": 0.5}])
def test_an_edit_does_not_depend_on_how_many_there_are(options):
    model = tiny_flow(vocab_size=27, context=32, couplings=("mixd", "mix1"), log_std=-4.0)
    lm = tarflowlm.Pretrained(model, CharTokenizer(TEXT8_ALPHABET))
    one, two = (edit(Edit(text=TEXT, num=num, **options), lm).texts for num in (1, 2))
    assert one == two[:1]
    assert two[0] != two[1]


@pytest.mark.slow
def test_a_redrawn_word_keeps_the_spaces_around_it(lm):
    for number in (1, 4):
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
    if lm.model.is_exact:
        with pytest.raises(UserError, match="no states"):
            edited(lm, level=0)
        return
    assert edited(lm, level=1, strength=0.0) == [TEXT] * 2
    assert all(text != TEXT for text in edited(lm, level=0, strength=1.0))
    edited(lm, level=2, strength=0.5, words=1)


# words as spans of tokens, for characters and for pieces that begin with a space


def characters(text: str) -> list[bytes]:
    return [character.encode() for character in text]


def spans(text: str) -> list[tuple[int, int]]:
    return words_of(characters(text))


def test_words_lie_between_white_space():
    assert spans("the king  of") == [(0, 3), (4, 8), (10, 12)]
    assert spans(" a b ") == [(1, 2), (3, 4)]
    assert spans("   ") == spans("") == []


def test_a_token_that_begins_with_a_space_begins_a_word():
    pieces = [b"the", b" ki", b"ng", b" of", b"\n", b"\xc3", b"\xa9", b" of"]
    assert words_of(pieces) == [(0, 1), (1, 3), (3, 4), (5, 7), (7, 8)]
    assert words_of([b" ", b"the", b"ng"]) == [(1, 3)]


def test_a_share_is_a_number_of_words():
    words = spans("a b c d e f g h i j")
    assert [num_words(s, words) for s in (0.0, 0.01, 0.1, 0.25, 0.5, 1.0)] == [0, 1, 1, 2, 5, 10]


def test_words_are_picked_at_random_or_by_cost():
    words = spans("aa b cc d ee")
    found = {tuple(pick_words(words, 2, 12, torch.Generator().manual_seed(s))) for s in range(30)}
    # without those at the ends, where nothing says that a word begins or ends
    assert found == {((3, 4), (5, 7)), ((3, 4), (8, 9)), ((5, 7), (8, 9))}
    assert (10, 12) in pick_words(words, 3, 13, torch.Generator().manual_seed(2))
    assert pick_words(words, 5, 12, torch.Generator()) == words
    costs = [9.0, 9.0, 0.0, 1.0, 0.0, 3.0, 0.0, 0.0, 2.0, 0.0, 9.0, 9.0]
    assert pick_words(words, 2, 12, torch.Generator(), costs=costs) == [(5, 7), (8, 9)]
    with pytest.raises(UserError, match="words 6: the text has 5"):
        pick_words(words, 6, 12, torch.Generator())


def test_neighbours_are_words_on_both_sides():
    words = spans("a bc d ef g")
    assert neighbours(words, 5, 6, 1) == [(2, 4), (7, 9)]
    assert neighbours(words, 5, 6, 2) == [(0, 4), (7, 11)]
    assert neighbours(words, 0, 1, 1) == [(2, 4)]
    assert neighbours(words, 5, 6, 0) == []


def test_pieces_are_whole_words():
    text = characters("other the king, then the fox_b")
    assert find_all(text, "the") == [(6, 9), (21, 24)]
    assert find_all(text, "the king,") == [(6, 15)]
    assert find_all(text, "fox") == [(25, 28)]
    assert find_all([b"the", b" ki", b"ng", b" of"], "king") == [(1, 3)]
    assert find_all(characters("into to to"), "to to") == [(5, 10)]
    assert find_all(characters("---"), "--") == [(0, 2)]
    # Chinese has no spaces between words
    assert find_all(characters("\u9f8d\u738b\u4f86\u4e86"), "\u738b") == [(1, 2)]
    for piece in ("", "queen"):
        with pytest.raises(UserError, match="does not occur"):
            find_all(text, piece)
    for piece, word in (("ther", "other"), ("o", "other"), ("the k", "the king")):
        with pytest.raises(UserError, match=f"'{piece}' is part of a word: give '{word}'"):
            find_all(text, piece)


def test_words_are_found_in_parts_of_characters():
    pieces = [b"caf", b"\xc3", b"\xa9", b" na", b"\xc3", b"\xafve", b" caf", b"\xc3\xa9", b" caf"]
    assert find_all(pieces, "caf\u00e9") == [(0, 3), (6, 8)]
    assert find_all(pieces, "na\u00efve") == [(3, 6)]
    assert find_all(pieces, "caf") == [(8, 9)]
