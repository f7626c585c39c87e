"""What `tarflowlm edit` looks for in a text of word pieces, which begin with a space."""

import pytest
import torch
from rich.console import Console

from tarflowlm.cli.arguments import EditArgs
from tarflowlm.cli.edit import _replacements, _texts
from tarflowlm.cli.prompts import Wording
from tarflowlm.data.bpe import train_bpe
from tarflowlm.editing import Encoded
from tarflowlm.errors import UserError

TEXT = "The king saw the other King"
TOKENIZER = train_bpe([f"{TEXT} The Queen saw the queen. " * 9], 280, alphabet=None, normalization="none")


def replaced(old: str, new: str) -> str:
    wording = Wording(TOKENIZER, None)
    tokens = wording.tokens(TEXT, "text")
    wanted = _replacements(EditArgs(text=TEXT, replace=(old, new)), wording, Encoded(tokens[None], len(tokens), ()))
    return TOKENIZER.decode(torch.where(wanted >= 0, wanted, tokens))


def test_a_word_is_replaced_with_the_space_of_its_token():
    assert len(TOKENIZER.encode(TEXT)) == 6
    assert replaced("king", "queen") == "The queen saw the other King"
    assert replaced("King", "Queen") == "The king saw the other Queen"
    assert replaced("The king", "The Queen") == "The Queen saw the other King"


def test_what_the_model_is_certain_of_stays_and_is_called_so(run):
    text = "The people of the United States have always been ready to defend it."
    done = run("edit", "english-small", "--text", text, "--rewrite", "States", "--candidates", 2)
    assert "0 of 14 tokens changed" in done.out
    assert "all candidates were what is there" in done.out
    done = run("edit", "english-small", "--text", text, "--candidates", 8)
    assert "1 of 14 tokens changed" in done.out
    assert "all candidates" not in done.out


def test_a_replacement_has_as_many_tokens():
    with pytest.raises(UserError, match="' king' has 1 token, with 'zzz' in its place 4, and these must agree"):
        replaced("king", "zzz")
    with pytest.raises(UserError, match=r"of 2 tokens, or .*, with --rewrite 'The king' in place of --replace"):
        replaced("The king", "queen")
    with pytest.raises(UserError, match="the text to replace is empty"):
        replaced("", "queen")
    with pytest.raises(UserError, match="the replacement is empty"):
        replaced("king", "")
    with pytest.raises(UserError, match="'dog' does not occur"):
        replaced("dog", "queen")


def test_the_longer_of_two_texts_is_cut(capsys):
    wording = Wording(TOKENIZER, None)
    for text, other in ((TEXT, "The queen"), ("The queen", TEXT)):
        first, second = _texts(EditArgs(text=text, toward=other), wording, Console(stderr=True))
        assert {TOKENIZER.decode(first), TOKENIZER.decode(second)} == {"The king", "The queen"}
        assert "is cut from 6 to 2 tokens" in capsys.readouterr().err
