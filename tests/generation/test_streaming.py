"""Tokens told while a text is written are those of the text; parts of many samples are what they
are among all.
"""

import pytest
import torch
from torch import Tensor

from helpers import tiny_ar, tiny_flow
from tarflowlm.generation import Generation, Watch, generate
from tarflowlm.generation.sampling import row_generators
from tarflowlm.language_model import LanguageModel

pytestmark = pytest.mark.slow

MODELS = {
    "ar": {},
    "ar-P2": {"patch": 2, "in_patch": "autoregressive"},
    "mixd": {"couplings": ("mixd",)},
    "mixd-mix1": {"couplings": ("mixd", "mix1"), "log_std": -5.0},
    "mixd-mix1-P4": {"couplings": ("mixd", "mix1"), "patch": 4, "log_std": -5.0},
}
"""All have a context of 8 tokens."""


@pytest.fixture(params=MODELS.items(), ids=MODELS.keys())
def model(request) -> LanguageModel:
    name, fields = request.param
    return tiny_ar(**fields) if name.startswith("ar") else tiny_flow(**fields)


def sample(model: LanguageModel, **options) -> Generation:
    return generate(model, **({"num": 2, "generator": torch.Generator().manual_seed(0)} | options))


def streams(rows) -> list[torch.Generator]:
    return row_generators(rows, torch.Generator().manual_seed(0))


def told(model: LanguageModel, **options) -> list[Tensor]:
    """What was told, which together is the text that is written without telling."""
    parts: list[Tensor] = []
    tokens = sample(model, watch=Watch(on_tokens=parts.append), **options).tokens
    assert torch.equal(torch.cat(parts, 1), tokens)
    assert torch.equal(sample(model, **options).tokens, tokens)
    return parts


PROMPTS = {
    "none": None,
    "one": torch.tensor([2, 0, 1]),
    "each": torch.tensor([[2, 0, 1], [3, -1, -1]]),
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("length", [7, 8, 19])
def test_steps_tell_position_by_position(length, prompt, model):
    P = model.config.patch
    parts = told(model, num_tokens=length, prompt=prompt, decoder="steps")
    common = 0 if prompt is None else 3 if prompt.dim() == 1 else 1
    if common:
        assert parts[0].shape[1] == common
    assert max(part.shape[1] for part in parts[bool(common) :]) <= P
    assert len(parts) >= (length - common) // P


@pytest.mark.parametrize("decoder", ["sweeps", "auto"])
def test_sweeps_tell_what_is_checked(decoder):
    model = tiny_flow(couplings=("mixd", "mix1"), log_std=-5.0)
    parts = told(model, num_tokens=18, decoder=decoder)
    if decoder == "sweeps":
        # the first window is swept, and the others, after given tokens, have a block 1 that goes by
        # steps
        assert [part.shape[1] for part in parts] == [8] + 10 * [1]


@pytest.mark.parametrize(
    "options",
    [
        {"particles": 3, "prompt": torch.tensor([1, 2])},
        {"decoding": "drawn"},
        {"prompt": torch.tensor([-1, 1, -1, 2])},
        {"prompt": torch.tensor([2, -1, 2]), "temperature": 0.5},
    ],
)
def test_other_ways_to_write_tell_the_same_text(options, model):
    told(model, num_tokens=8, **options)


def test_parts_of_many_samples_are_what_they_are_among_all(model):
    all_of_them = sample(model, num_tokens=11, num=5).tokens
    parts = [
        sample(model, num_tokens=11, generator=streams(rows)).tokens
        for rows in (range(1, 3), range(3, 5), [4, 0])
    ]
    assert torch.equal(torch.cat(parts), all_of_them[[1, 2, 3, 4, 4, 0]])


def test_prompts_of_different_lengths_do_not_influence_each_other(model):
    prompts = torch.tensor([[2, 0, 1], [3, -1, -1]])
    for length in (8, 14):
        together = sample(model, num_tokens=length, prompt=prompts)
        for row, prompt in enumerate((prompts[0], prompts[1, :1])):
            alone = sample(model, num_tokens=length, num=1, generator=streams([row]), prompt=prompt)
            assert torch.equal(alone.tokens[0], together.tokens[row])
            torch.testing.assert_close(alone.log_evidence[0], together.log_evidence[row])


def test_on_tokens_ends_a_text_after_a_window(model):
    seen: list[int] = []
    whole = sample(model, num_tokens=30).tokens

    def on_tokens(tokens: Tensor) -> bool:
        seen.append(tokens.shape[1])
        return sum(seen) in (9, 12)

    found = sample(model, num_tokens=30, watch=Watch(on_tokens=on_tokens))
    assert sum(seen) == 12
    assert torch.equal(found.tokens, whole[:, :12])
