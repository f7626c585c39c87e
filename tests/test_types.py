"""The types that a user's program gets. mypy checks this file, and its tests run the same lines."""

import copy
import inspect
from typing import assert_type

import pytest
import torch
from torch import Tensor

import tarflowlm
from tarflowlm import Pretrained, Scores, TarFlowLM, TokenLM
from tarflowlm.data import Tokenizer
from tarflowlm.evaluation.likelihood import Likelihood
from tarflowlm.model import ElboTerms, LanguageModel


def test_a_model_and_its_tokenizer_keep_their_types() -> None:
    lm = tarflowlm.load("english-mini")
    model, tokenizer = lm
    assert_type(lm, Pretrained[TarFlowLM])
    assert_type(model, TarFlowLM)
    assert_type(tokenizer, Tokenizer)
    assert_type(lm.model, TarFlowLM)
    assert_type(lm.to("cpu").model, TarFlowLM)
    assert isinstance(tokenizer, Tokenizer)
    tokens = lm.encode("the cat")[None]
    assert_type(tokens, Tensor)
    terms = tarflowlm.elbo(lm.model, tokens, generator=torch.Generator().manual_seed(0))
    assert_type(terms, ElboTerms)
    assert_type(model.codebook.encode(tokens, model.draw_noise(tokens)), Tensor)
    assert_type(lm.evaluate("the cat\n"), Likelihood)
    assert_type(lm.encode(["a", "b"]), list[Tensor])


def test_a_model_that_is_known_by_its_path_alone_is_a_language_model() -> None:
    name: str = "english-mini-ar"
    model, tokenizer = tarflowlm.load(name)
    assert_type(model, LanguageModel)
    assert isinstance(model, TokenLM)
    lm = Pretrained(model, tokenizer)
    assert_type(lm, Pretrained[TokenLM])
    assert_type(lm.model, TokenLM)


def test_options_have_names_and_types() -> None:
    lm = tarflowlm.load("english-mini")
    text: str = lm.write("the", length=8, seed=1)
    scored: Scores = lm.score(text)
    assert scored.total > 0
    known = inspect.signature(lm.write).parameters
    assert next(iter(known)) == "prompt"
    assert (known["seed"].annotation, known["seed"].default) == (int, 0)
    assert known["stop_at_end"].default is True
    for function in (lm.write, lm.fill, lm.edit, lm.score, lm.evaluate, tarflowlm.generate):
        shown = str(inspect.signature(function))
        assert "**" not in shown
        assert "object at" not in shown
    with pytest.raises(tarflowlm.UserError, match="did you mean length"):
        lm.write("the", lenght=8)  # type: ignore[call-arg]


def test_a_copy_is_a_pair_of_its_own_model() -> None:
    lm = tarflowlm.load("english-mini")
    other = copy.deepcopy(lm)
    model, _ = other
    assert model is other.model
    assert model is not lm.model
    assert len(other) == 2
    assert copy.copy(lm) == lm
    assert hash(copy.copy(lm)) == hash(lm) != hash(other)
