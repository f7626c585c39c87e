"""Texts beyond the trained context: which windows write them, and that each is what `generate`
writes.
"""

import pytest
import torch

from tarflowlm.data.windows import spans
from tarflowlm.errors import UserError
from tarflowlm.generation import Generation, generate
from tarflowlm.generation.sampling import row_generators
from tarflowlm.model import LanguageModel


def sample(model: LanguageModel, seed: int = 0, **options) -> Generation:
    return generate(model, generator=torch.Generator().manual_seed(seed), **({"num": 3} | options))


@pytest.mark.parametrize(
    ("patch", "num_tokens", "num_given", "expected"),
    [
        (1, 5, 0, [(0, 5)]),
        (1, 8, 7, [(0, 8)]),
        (1, 9, 0, [(0, 8), (4, 9)]),
        (1, 17, 3, [(0, 8), (4, 12), (8, 16), (12, 17)]),
        (1, 20, 8, [(4, 12), (8, 16), (12, 20)]),
        (1, 14, 13, [(9, 14)]),
        (4, 14, 0, [(0, 8), (4, 12), (8, 14)]),
        (8, 20, 0, [(0, 8), (8, 16), (16, 20)]),
    ],
)
def test_windows_keep_their_last_half(patch, num_tokens, num_given, expected):
    assert spans(num_tokens, 8, patch=patch, given=num_given) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "options"), [(None, {}), ([2, 0, 1], {"temperature": 0.7, "top_k": 3})]
)
def test_every_window_is_what_generate_writes_after_the_last_one(prompt, options, model):
    """The first window is a text of the context; the next has the kept half as its prompt, and the
    noise goes on.
    """
    if options and "affine" in {b.coupling for b in getattr(model.config, "blocks", ())}:
        pytest.skip("an affine block has no probabilities of tokens")
    options = options | {"prompt": None if prompt is None else torch.tensor(prompt)}
    tokens = sample(model, num_tokens=15, **options).tokens
    rows = row_generators(range(3), torch.Generator().manual_seed(0))
    # the generators go on from one window to the next
    expected = generate(model, num=3, num_tokens=8, generator=rows, **options).tokens
    for length in (8, 7):
        options |= {"prompt": expected[:, -4:]}
        more = generate(model, num=3, num_tokens=length, generator=rows, **options).tokens
        expected = torch.cat((expected, more[:, 4:]), dim=1)
    assert torch.equal(tokens, expected)


@pytest.mark.slow
def test_rows_and_seeds_beyond_the_context(model):
    tokens = sample(model, num_tokens=19).tokens
    assert tokens.shape == (3, 19)
    assert ((tokens >= 0) & (tokens < 5)).all()
    assert torch.equal(sample(model, num_tokens=19).tokens, tokens)
    assert torch.equal(sample(model, num_tokens=19, num=1).tokens[0], tokens[0])
    assert torch.equal(sample(model, num_tokens=16).tokens, tokens[:, :16])
    assert torch.equal(sample(model, num_tokens=8).tokens, tokens[:, :8])
    assert len(tokens[:, 12:].unique(dim=0)) > 1


@pytest.mark.parametrize("length", [8, 9, 20])
def test_last_half_window_of_a_long_prompt_counts(length, model):
    long = torch.arange(length) % 5
    tokens = sample(model, num_tokens=length + 6, prompt=long).tokens
    assert torch.equal(tokens[:, :length], long.expand(3, -1))
    assert torch.equal(
        sample(model, num_tokens=10, prompt=long[-4:]).tokens[:, 4:], tokens[:, length:]
    )


@pytest.mark.slow
def test_the_evidence_is_that_of_the_prompt_and_the_work_that_of_all_windows(model):
    prompt = torch.tensor([1, 2])
    short, long = (sample(model, num_tokens=length, prompt=prompt) for length in (8, 12))
    assert torch.equal(long.evidence.log_evidence, short.evidence.log_evidence)
    assert sample(model, num_tokens=12).evidence is None
    assert sample(model, num_tokens=12, prompt=torch.zeros(9, dtype=torch.long)).evidence is None
    assert [work.decoder for work in long.work] == [work.decoder for work in short.work]
    if long.work and not model.config.continues_exactly:
        pairs = zip(long.work, short.work, strict=True)
        *above, first = ((one.passes, other.passes) for one, other in pairs)
        assert all(passes == 2 * other for passes, other in above)
        # block 1 makes a pass for each position without given tokens: 2, then 4 are given
        patch = model.config.patch
        assert first == (16 // patch - 2 // patch - 4 // patch, 8 // patch - 2 // patch)
    assert long.latents == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt": torch.tensor([-1, 1])},
            "length 9.* context of 8 tokens, .* a prompt without blanks",
        ),
        ({"particles": 2}, "particles 2: beyond the trained context of 8 tokens"),
        (
            {"prompt": torch.zeros(9, dtype=torch.long)},
            "the given text has 9 tokens, which leaves no room in 9",
        ),
    ],
)
def test_impossible_options_of_long_texts_are_refused(options, message, model):
    with pytest.raises(UserError, match=message):
        sample(model, num_tokens=9, **options)
