"""The table of edits: what each kind does to a text, with its defaults."""

import dataclasses

import pytest
import torch

from helpers import tiny_flow
from tarflowlm.data.bpe import train_bpe
from tarflowlm.data.tokenizer import CharTokenizer
from tarflowlm.editing import Redraw, Renoise, Replace, Rewrite, Source, Toward, encode
from tarflowlm.errors import UserError
from tarflowlm.progress import Silent

TEXT = "The king saw the other King"
WORD_PIECES = train_bpe(
    [f"{TEXT} The Queen saw the queen. " * 9], 280, alphabet=None, normalization="none"
)


class Stages(Silent):
    """Checks that every stage gets as many units as were announced."""

    total = count = 0

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self.total, self.count = total, 0

    def advance(self, count: int = 1) -> None:
        self.count += count


@pytest.fixture(scope="module", params=["characters", "word pieces"])
def source(request) -> Source:
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
    return Source(model, tokenizer, text.repeated(2), generator, Stages())


def edited(source: Source, kind) -> list[str]:
    """The texts of both edits, after checks that hold for all kinds."""
    edit = kind.apply(dataclasses.replace(source, generator=torch.Generator().manual_seed(1)))
    assert source.progress.count == source.progress.total
    assert torch.equal(edit.changed, edit.tokens != edit.before)
    return [source.tokenizer.decode(row) for row in edit.tokens.tolist()]


@pytest.mark.slow
def test_redraw_changes_as_many_words_as_asked(source):
    for options, most in (
        ({"words": 1}, 1),
        ({"strength": 0.3}, 2),
        ({"words": 2, "pick": "unlikely"}, 2),
    ):
        for text in edited(source, Redraw(candidates=4, **options)):
            changed = sum(
                a != b
                for a, b in zip(source.text.tokens[0], source.tokenizer.encode(text), strict=False)
            )
            assert changed > 0 or most == 0
    assert edited(source, Redraw(strength=0.0)) == [TEXT] * 2


def test_rewrite_changes_nothing_but_the_pieces(source):
    for text in edited(source, Rewrite(pieces=["saw"], candidates=3)):
        assert text.startswith("The king")
        assert text.endswith(" the other King")
    with pytest.raises(UserError, match="at least one"):
        Rewrite(pieces=[]).apply(source)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("king", "sing", "The sing saw the other King"),
        ("King", "Ting", "The king saw the other Ting"),
        ("The k", "The s", "The sing saw the other King"),
    ],
)
def test_replace_takes_the_first_word(source, old, new, expected):
    """With the space of its token, where a token holds one; the model regenerates what follows."""
    if source.tokenizer is WORD_PIECES:
        old, new, expected = (
            text.replace("sing", "queen").replace("Ting", "Queen") for text in (old, new, expected)
        )
        if old == "The k":
            old, new, expected = "The king", "The Queen", "The Queen saw the other King"
    end = expected.index(new) + len(new)
    assert all(text[:end] == expected[:end] for text in edited(source, Replace(old=old, new=new)))


def test_a_replacement_has_as_many_tokens(source):
    with pytest.raises(UserError, match="these must agree"):
        Replace(old="king", new="thorough").apply(source)
    with pytest.raises(UserError, match="'dog' does not occur"):
        Replace(old="dog", new="cat").apply(source)


@pytest.mark.slow
def test_toward_begins_and_ends_at_its_texts(source):
    generator = torch.Generator().manual_seed(2)
    tokens = source.text.tokens[:1, : source.text.length].flip(1).cpu()
    other = encode(source.model, tokens, generator)
    for options in ({}, {"level": 0}, {"level": 2}):
        assert edited(source, Toward(other=other, weight=0.0, **options)) == [TEXT] * 2
        wanted = source.tokenizer.decode(tokens[0].tolist())
        assert edited(source, Toward(other=other, weight=1.0, **options)) == [wanted] * 2
    with pytest.raises(UserError, match=r"weight 1\.5"):
        Toward(other=other, weight=1.5).apply(source)


@pytest.mark.slow
def test_renoise_changes_a_state_everywhere_or_at_some_words(source):
    assert edited(source, Renoise(level=1, strength=0.0)) == [TEXT] * 2
    everywhere = edited(source, Renoise(level=0, strength=1.0))
    assert all(text != TEXT for text in everywhere)
    edited(source, Renoise(level=2, strength=0.5, words=1))
