"""Words as spans of tokens, for characters and for pieces that begin with a space."""

import pytest
import torch

from tarflowlm.editing.words import (
    find_all,
    find_piece,
    neighbours,
    num_words,
    pick_words,
    words_of,
)
from tarflowlm.errors import UserError


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


def test_pieces_are_found_as_words_first():
    text = characters("other the king")
    assert find_piece(text, "the") == (6, 9)
    assert find_piece(text, "ther") == (1, 5)
    assert find_piece(text, "the k") == (6, 11)
    assert find_piece([b"the", b" ki", b"ng", b" of"], "king") == (1, 3)
    for piece in ("", "queen"):
        with pytest.raises(UserError, match="does not occur"):
            find_piece(text, piece)


def test_words_are_found_in_parts_of_characters():
    pieces = [b"caf", b"\xc3", b"\xa9", b" na", b"\xc3", b"\xafve", b" caf", b"\xc3\xa9", b" caf"]
    assert find_all(pieces, "caf\u00e9") == [(0, 3), (6, 8)]
    assert find_all(pieces, "na\u00efve") == [(3, 6)]
    assert find_piece(pieces, "caf") == (8, 9)
    assert find_all(pieces, "") == []
