"""Guessed tokens never change a text: whoever guesses, one call of several tokens gives the same
as one call a token, alone and in a batch.
"""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from test_sequential import assert_frequencies, discrete_probabilities

from helpers import FILLS, mostly_nightly, mostly_slow, tiny_ar, tiny_flow
from tarflowlm.drafts import Guesser, make_drafter
from tarflowlm.flow.cache import KVCache
from tarflowlm.generation import Generation, generate, rows
from tarflowlm.generation.plan import plan
from tarflowlm.generation.sampling import row_generators
from tarflowlm.generation.write import write
from tarflowlm.model import LanguageModel
from tarflowlm.requests import Sampling
from tarflowlm.training.stages import laws

MODELS = {
    "ar": lambda: tiny_ar(context=12),
    "mixd": lambda: tiny_flow(couplings=("mixd",), context=12),
    "fills": lambda: tiny_flow(**FILLS, alternate=False, log_std=-4.0, context=12),
}
"""All have 5 symbols, or a component of noise besides in the block that draws."""
REQUESTS = {
    "free": {},
    "top-p": {"temperature": 0.8, "top_p": 0.7},
    "top-k": {"top_k": 2},
    "min-p": {"min_p": 0.2},
    "prompt": {"prompt": torch.tensor([2, 0, 1])},
    "window": {"num_tokens": 30},
    "blanks": {"prompt": torch.tensor([2, -1, -1, 3, 0, -1]), "particles": 1},
}


class Fixed(Guesser):
    """Guesses that are random, or that always have one kind of error."""

    def __init__(self, choices: int, kind: str) -> None:
        self.choices, self.length = choices, 3
        self.kind = kind
        self.random = np.random.default_rng(0)

    def guess(self, past: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        numbers = numbers[:, : self.random.integers(0, numbers.shape[1] + 1)]
        if self.kind == "random":
            return self.random.integers(0, self.choices, numbers.shape[:2])
        # the number alone is often right, and its opposite hardly ever
        return (numbers if self.kind == "number" else -numbers).argmax(-1)


def written(model: LanguageModel, guesser: Guesser | None, **options) -> Generation:
    """Texts of `generate`, guessed by `guesser`."""
    generator = torch.Generator().manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        if guesser is not None:
            patch.setattr(model, "drafter", guesser, raising=False)
            patch.setattr(rows, "Guesser", lambda *_: guesser)
        return generate(model, generator=generator, **options)


def texts(model: LanguageModel, request: str, num: int, guesser: Guesser | None) -> Generation:
    return written(model, guesser, **({"num_tokens": 12, "num": num} | REQUESTS[request]))


CASES = [f"{name} {request}" for name in MODELS for request in REQUESTS]
FAST = ["ar free", "ar top-p", "ar window", "mixd min-p", "mixd blanks", "fills prompt"]


@pytest.mark.parametrize("case", mostly_slow(CASES, *FAST))
def test_guesses_do_not_change_a_text(case):
    name, request_ = case.split()
    model = MODELS[name]()
    alone = texts(model, request_, 1, None)
    for num in (1, 5):
        plain = alone if num == 1 else texts(model, request_, num, None)
        assert torch.equal(alone.tokens[0], plain.tokens[0])
        for kind in ("random", "number", "opposite"):
            found = texts(model, request_, num, Fixed(5, kind))
            assert torch.equal(found.tokens, plain.tokens), kind
            for ours, theirs in zip(found.latents, plain.latents, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            if plain.evidence is not None:
                torch.testing.assert_close(
                    found.evidence.log_evidence, plain.evidence.log_evidence, rtol=1e-4, atol=1e-4
                )


class Knowing(Guesser):
    """Guesses that are right, or all wrong, because they know the law of the model."""

    def __init__(self, log_p: torch.Tensor, is_right: bool) -> None:
        """`log_p` [K, K, K] of all texts of three tokens."""
        self.length, self.is_right = 3, is_right
        self.laws = [log_p.logsumexp((1, 2)), log_p.logsumexp(2), log_p]

    def guess(self, past: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        texts = torch.from_numpy(past)
        for place in range(numbers.shape[1]):
            context = tuple(texts.long().T)
            log_p = self.laws[len(context)]
            scores = (log_p[context] if context else log_p) + torch.from_numpy(numbers[:, place])
            token = scores.argmax(-1)
            token = token if self.is_right else (token + 1) % scores.shape[-1]
            texts = torch.cat((texts, token[:, None]), 1)
        return texts[:, past.shape[1] :].numpy()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The positions of every call of a KV cache."""
    found: list[int] = []
    extend = KVCache.extend

    def counted(cache, x):
        found.append(x.shape[1])
        return extend(cache, x)

    monkeypatch.setattr(KVCache, "extend", counted)
    return found


@pytest.mark.parametrize("name", ["ar", "mixd"])
def test_guesses_do_not_change_the_law(name, calls):
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    if name == "ar":
        model = tiny_ar(vocab_size=3, context=4, seed=1)
        with torch.no_grad():
            p = model.log_prob(texts).exp()
    else:
        model = tiny_flow(couplings=("mixd",), vocab_size=3, context=4, log_std=-9.0, seed=1)
        p = discrete_probabilities(model, 3, 3)
    log_p = p.log().view(3, 3, 3)
    guessers = {
        "steps": None,
        "right": Knowing(log_p, is_right=True),
        "wrong": Knowing(log_p, is_right=False),
        "random": Fixed(3, "random"),
    }
    plain = None
    for kind, guesser in guessers.items():
        calls.clear()
        found = written(model, guesser, num_tokens=3, num=2000).tokens
        assert_frequencies(found, p, 3)
        plain = found if plain is None else plain
        assert torch.equal(found, plain), kind
        if kind in ("steps", "wrong"):
            assert calls == ([1, 1, 1] if kind == "steps" else [3, 2, 1])
        # but for a row or two with a near tie, which ends what is final of a call
        assert kind != "right" or (calls[0] == 3 and len(calls) < 3)


def drafted(name: str) -> LanguageModel:
    """A model with a drafter of its own."""
    model = MODELS[name]()

    text = np.random.default_rng(0).integers(0, 5, 300)
    with torch.no_grad():
        model.drafter = make_drafter(partial(laws, model), text, 12, 300)
    return model


@pytest.mark.parametrize("name", mostly_nightly(MODELS, "ar", "mixd"))
def test_a_longer_text_begins_like_a_shorter_one(name, calls):
    model = drafted(name)
    assert model.drafter is not None
    for request in ({}, {"temperature": 0.8, "top_p": 0.7, "prompt": torch.tensor([2, 0, 1])}):

        def text(length: int, num: int = 2, request=request, **more) -> torch.Tensor:
            generator = torch.Generator().manual_seed(5)
            options = {"num_tokens": length, "num": num, "generator": generator}
            return generate(model, **options, **request, **more).tokens

        # of three windows, the first of 12 tokens
        longest = text(20)
        for length in (7, 13):
            assert torch.equal(text(length), longest[:, :length]), (request, length)
        calls.clear()
        assert torch.equal(text(20, num=1)[0], longest[0])
        assert max(calls) > 1
        assert torch.equal(text(20, num=5)[:2], longest)
        assert torch.equal(text(20, decoder="steps"), longest)


@pytest.mark.parametrize("name", mostly_nightly(MODELS, "ar", "mixd"))
def test_all_is_the_same_where_every_token_is_decided_by_its_text(name, monkeypatch):
    """As if all scores were nearly equal."""
    model = drafted(name)
    requests = ["top-p", "top-k", "min-p", "prompt"]
    usual = [texts(model, request, 2, Fixed(5, "number")) for request in requests]
    monkeypatch.setattr(rows, "NEAR", 1e4)
    for request, expected in zip(requests, usual, strict=True):
        for guesser in (None, Fixed(5, "number")):
            found = texts(model, request, 2, guesser)
            assert torch.equal(found.tokens, expected.tokens), request


@pytest.mark.parametrize("name", mostly_slow(MODELS, "ar"))
def test_texts_that_end_and_stream_are_those_of_steps(name):
    """Rows end at different places, and parts of any size are of final tokens."""
    model = drafted(name)

    def text(decoder: str, end: int, every: int, num: int) -> torch.Tensor:
        sampling = Sampling(decoder=decoder, temperature=0.9)
        plans = [plan(model, [], sampling, num_tokens=14, end=end) for _ in range(num)]
        streams = row_generators(range(num), torch.Generator().manual_seed(end))
        return torch.cat(list(write(model, plans, streams, every=every)), 1)

    for end, every, num in ((0, 1, 5), (2, 4, 5), (3, 3, 1)):
        steps = text("steps", end, 1, num)
        assert torch.equal(text("auto", end, every, num), steps)
        ended = (steps == end).int().argmax(1)
        assert all((row[at:] == end).all() for row, at in zip(steps, ended, strict=True) if at)
