"""A text to write is pieces and gaps: what `plan` decides, and that tokens stay what they were."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from helpers import tiny_ar, tiny_flow
from tarflowlm.data.prompts import Gap
from tarflowlm.errors import UserError
from tarflowlm.generation import generate, generate_plainly
from tarflowlm.generation.plan import plan
from tarflowlm.generation.sampling import Noise, row_generators
from tarflowlm.model import LanguageModel
from tarflowlm.requests import Sampling

GOLDEN = Path(__file__).with_name("golden_tokens.json")
LEFT = {"alternate": False, "log_std": -4.0, "channel_mix": None}
MODELS = {
    "ar": tiny_ar,
    "ar-P2": lambda: tiny_ar(patch=2, in_patch="autoregressive"),
    "mixd": lambda: tiny_flow(couplings=("mixd",)),
    "stack": lambda: tiny_flow(couplings=("mixd", "mix1")),
    "stack-P2": lambda: tiny_flow(couplings=("mixd", "mix1"), patch=2),
    "left": lambda: tiny_flow(couplings=("mixd", "mixd"), **LEFT),
}
"""All have a context of 8 tokens and 5 symbols."""
REQUESTS = {
    "free": {},
    "steps": {"decoder": "steps"},
    "sweeps": {"decoder": "sweeps"},
    "prompt": {"prompt": torch.tensor([2, 0])},
    "particles": {"prompt": torch.tensor([-1, 2, -1, 3]), "particles": 4},
    "window": {"prompt": torch.tensor([2, 0]), "num_tokens": 15},
    "adjusted": {"temperature": 0.7, "top_k": 3, "top_p": 0.9},
    "gap": {"prompt": [torch.tensor([1]), Gap(most=3), torch.tensor([2, 0])]},
    "mask": {"allowed": torch.tensor([True, True, False, True, False]), "particles": 4},
}


@cache
def built(name: str) -> LanguageModel:
    return MODELS[name]()


def text(name: str, request: str) -> list[list[int]]:
    options = {"num_tokens": 8, "num": 2} | REQUESTS[request]
    generator = torch.Generator().manual_seed(7)
    return generate(built(name), generator=generator, **options).tokens.tolist()


def noise_of(model: LanguageModel) -> torch.Tensor:
    streams = row_generators([0], torch.Generator().manual_seed(7))
    return Noise(model, streams, 1).normal(8)


def test_tokens_are_what_they_were():
    """Recorded when a request was still decided in several places; refusals have no tokens."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert set(golden) == {f"{name} {request}" for name in MODELS for request in REQUESTS}
    for key, tokens in golden.items():
        if tokens is None:
            with pytest.raises(UserError, match=r"patch 2|no blocks"):
                text(*key.split())
        else:
            assert text(*key.split()) == tokens, key


@pytest.mark.parametrize("name", ["stack", "stack-P2", "left"])
def test_sweeps_invert_the_noise_as_the_formulas_say(name):
    model = built(name)
    with torch.no_grad():
        plain = model.codebook.decode(model.prior.inverse(noise_of(model)))
    assert text(name, "sweeps")[:1] == plain.tolist()


@pytest.mark.parametrize("name", ["ar", "ar-P2", "mixd"])
def test_plain_texts_have_the_frequencies_of_others(name):
    model = built(name)
    plain = generate_plainly(model, 2, 3000, torch.Generator().manual_seed(0))
    others = generate(model, num_tokens=2, num=3000, generator=torch.Generator().manual_seed(1))
    shares = [
        torch.bincount(x @ torch.tensor([5, 1]), minlength=25) for x in (plain, others.tokens)
    ]
    # five standard deviations of a difference of two shares of 1/2
    assert ((shares[0] - shares[1]) / 3000).abs().max() < 5 * (0.5 / 3000) ** 0.5


def decided(name: str, *template: list[int] | Gap, num_tokens: int = 8, **options) -> tuple:
    parts = [part if isinstance(part, Gap) else torch.tensor(part).long() for part in template]
    found = plan(built(name), parts, Sampling(**options), num_tokens=num_tokens)
    return found.way, found.particles, [len(piece) for piece in found.pieces], len(found.gaps)


def test_the_way_and_the_particles_follow_from_pieces_and_gaps():
    blank = Gap(most=1)
    assert decided("stack") == ("inversion", 1, [0], 0)
    assert decided("ar") == ("filter", 1, [0], 0)
    assert decided("stack", [1, 2]) == ("filter", 1, [2], 0)
    assert decided("left", [1, 2]) == ("inversion", 1, [2], 0)
    assert decided("left", [1, 2], blank, [3]) == ("filter", 16, [2, 1], 1)
    assert decided("mixd", [1], blank, blank, [2], particles=3) == ("filter", 3, [1, 1], 1)
    assert decided("mixd", [1], Gap(most=2), [2], blank) == ("gaps", 16, [1, 1, 0], 2)
    assert decided("mixd", [1], Gap(most=2, least=2, once=True), [2])[0] == "gaps"


@pytest.mark.parametrize(
    ("name", "template", "options", "words"),
    [
        ("ar", [[1] * 8], {}, "8 tokens, which leaves no room in 8"),
        ("left", [[1, 2]], {"particles": 4}, "continues a prompt exactly"),
        ("stack", [[1]], {"num_tokens": 9, "particles": 2}, "beyond the trained context"),
        ("stack-P2", [[1], Gap(most=2), [1]], {}, "patch 2"),
        ("ar", [], {"decoder": "sweeps"}, "no blocks to invert"),
        ("mixd", [], {"num_tokens": 0}, "length 0"),
    ],
)
def test_what_a_model_cannot_write_is_refused(name, template, options, words):
    with pytest.raises(UserError, match=words):
        decided(name, *template, **options)
