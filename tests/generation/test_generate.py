"""`generate`: seeds, rows, prompts, passes, lengths, and what it refuses."""

import pytest
import torch
from torch import Tensor, nn

from helpers import FILLS, mostly_nightly, normal, tiny_ar, tiny_flow
from tarflowlm.baseline import TokenLM
from tarflowlm.data.prompts import Gap
from tarflowlm.errors import Progress, UserError
from tarflowlm.generation import Generation, generate
from tarflowlm.generation.inverse import invert_stack
from tarflowlm.model import TarFlowLM


def passes_of(result: Generation, model: nn.Module) -> tuple[Tensor, ...]:
    return result.passes(model) if isinstance(model, TarFlowLM) else ()


def states_of(result: Generation, model: nn.Module) -> tuple[Tensor, ...]:
    return result.states(model) if isinstance(model, TarFlowLM) else ()


def sample(model: nn.Module, seed: int = 0, **options) -> Generation:
    options = {"num_tokens": 8, "num": 3} | options
    return generate(model, **({"generator": torch.Generator().manual_seed(seed)} | options))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_text_and_another_seed_another(model):
    tokens = sample(model).tokens
    assert tokens.shape == (3, 8)
    assert tokens.dtype == torch.int64
    assert ((tokens >= 0) & (tokens < 5)).all()
    assert torch.equal(sample(model).tokens, tokens)
    others = sample(model, seed=1).tokens
    assert not torch.equal(others, tokens)
    assert len(others.unique(dim=0)) == 3


@pytest.mark.slow
def test_the_global_generator_plays_no_part(model):
    torch.manual_seed(0)
    tokens, expected = sample(model).tokens, torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(sample(model).tokens, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [None, [3, 1, 4]])
def test_rows_do_not_depend_on_how_many_there_are(model, prompt):
    """A batch that shares one stream of noise gives a row another text when a row is added."""
    options = {"prompt": None if prompt is None else torch.tensor(prompt)}
    assert torch.equal(
        sample(model, num=1, **options).tokens[0], sample(model, num=3, **options).tokens[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize("length", mostly_nightly([1, 2, 3, 5, 7, 8], 1, 2, 7, 8))
def test_any_length_will_do(model, length):
    """Patches need not divide it."""
    result = sample(model, num_tokens=length)
    assert result.tokens.shape == (3, length)
    assert all(tokens.shape == (3, length) for tokens in passes_of(result, model))
    assert all(state.shape == (3, length, 2) for state in states_of(result, model))


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [[], [2], [2, 0], [4, 4, 4, 1, 2, 3, 0]], ids=len)
def test_the_prompt_is_kept(model, prompt):
    result = sample(model, prompt=torch.tensor(prompt, dtype=torch.long))
    assert result.tokens[:, : len(prompt)].tolist() == [prompt] * 3
    assert result.tokens.shape == (3, 8)


def test_a_stack_that_runs_left_to_right_continues_a_prompt_exactly():
    """What follows has the noise that the whole text has there, so p(z_> | z_<=) is the model's
    own.
    """
    model, num = tiny_flow(**FILLS, alternate=False, log_std=-4.0), 3
    with torch.no_grad():
        states, _ = invert_stack(model, normal(4, 8, 2))
        known = [h[:, :num] for h in reversed(states)]
        again, _ = invert_stack(model, states[0], known=known)
    for h, same in zip(states, again, strict=True):
        torch.testing.assert_close(same, h)
    prompt = torch.tensor([1, 0, 4])
    assert (
        sample(model, prompt=prompt, temperature=0.8).tokens[:, :num].tolist()
        == [prompt.tolist()] * 3
    )


@pytest.mark.slow
def test_passes_lead_from_noise_to_the_text(model):
    result = sample(model)
    passes, states = passes_of(result, model), states_of(result, model)
    if isinstance(model, TokenLM):
        assert (passes, states, result.latents) == ((), (), ())
        return
    assert len(passes) == len(states) == model.num_blocks + 1
    assert torch.equal(passes[-1], result.tokens)
    assert torch.equal(states[-1], result.latents[-1])
    for tokens, state in zip(passes, states, strict=True):
        assert torch.equal(model.codebook.decode(state), tokens)
    with torch.no_grad():
        u, _ = model.prior(result.latents[-1])
    torch.testing.assert_close(u, states[0], rtol=1e-6, atol=1e-6)


class Count(Progress):
    """Counts how often it is advanced."""

    count = 0

    def advance(self, count: int = 1) -> None:
        self.count += count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "num_given"),
    [
        (1, 0),
        (8, 0),
        (8, 3),
        (9, 0),
        (20, 3),
        (20, 11),
        pytest.param(5, 0, marks=pytest.mark.nightly),
        pytest.param(20, 0, marks=pytest.mark.nightly),
    ],
)
def test_progress_counts_the_tokens_of_all_samples(model, length, num_given):
    progress = Count()
    sample(
        model,
        num_tokens=length,
        prompt=torch.zeros(num_given, dtype=torch.long),
        progress=progress,
    )
    assert progress.count == 3 * length


def test_progress_of_gaps_counts_all_tokens():
    progress = Count()
    one, two = torch.tensor([1]), torch.tensor([2])
    prompt = [one, Gap(most=2), two, Gap(most=2), one]
    sample(tiny_ar(context=8), num_tokens=8, prompt=prompt, progress=progress)
    assert progress.count == 3 * 8


def test_top_k_of_one_is_the_most_probable_text_of_the_baseline():
    lm = tiny_ar()
    tokens = sample(lm, top_k=1).tokens
    with torch.no_grad():
        assert torch.equal(lm.logits(tokens).argmax(-1), tokens)


def test_top_k_of_one_is_the_most_probable_text_of_a_mixd_block():
    model = tiny_flow(couplings=("mixd",), log_std=-9.0)
    tokens, block = sample(model, top_k=1).tokens, model.prior.blocks[0]
    with torch.no_grad():
        log_w = block.coupling.weight_head(block.features(model.codebook.mean[tokens]))
    assert torch.equal(log_w.argmax(-1), tokens)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": 0.5}, "temperature 0.5"),
        ({"top_k": 2}, "top_k 2"),
        ({"top_p": 0.5}, "top_p 0.5"),
    ],
)
@pytest.mark.parametrize("couplings", [("affine", "mix1"), ("mix1",)])
def test_flows_without_weights_of_tokens_refuse_to_change_them(couplings, options, name):
    with pytest.raises(
        UserError, match=rf"{name}: block 1 {couplings[0]} has no weights of tokens"
    ):
        sample(tiny_flow(couplings=couplings), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "num 0: must be at least 1"),
        ({"num_tokens": 0}, "length 0: must be at least 1"),
        (
            {"prompt": torch.arange(5).repeat(2)[:8]},
            "the given text has 8 tokens, which leaves no room in 8",
        ),
        (
            {"prompt": torch.zeros(3, dtype=torch.long), "num_tokens": 2},
            "3 tokens, which leaves no room in 2",
        ),
        ({"prompt": torch.tensor([1, 5])}, r"the prompt \[1, 5\] has tokens outside of 0 to 4"),
        ({"prompt": torch.tensor([-2])}, "tokens outside of 0 to 4"),
        ({"prompt": torch.full((9,), -1)}, "the given text has 9 tokens"),
        ({"particles": 0}, "particles 0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 0.0}, "top_p 0.0"),
    ],
)
def test_impossible_requests_are_refused(model, options, message):
    with pytest.raises(UserError, match=message):
        sample(model, **options)


@pytest.mark.slow
def test_particles_are_16_where_given_tokens_follow_a_blank():
    model = tiny_flow(couplings=("mixd", "mix1"), log_std=-4.0)
    for prompt, particles in (([1, -1, 2], 16), ([-1, 2], 16), ([1, 2], 1), ([], 1)):
        options = {"prompt": torch.tensor(prompt, dtype=torch.long)}
        usual, explicit = sample(model, **options), sample(model, particles=particles, **options)
        assert torch.equal(usual.tokens, explicit.tokens)
        if prompt:
            assert torch.equal(usual.evidence.log_evidence, explicit.evidence.log_evidence)


def test_particles_are_refused_where_a_prompt_is_continued_exactly():
    model = tiny_flow(**FILLS, alternate=False, log_std=-4.0)
    with pytest.raises(UserError, match="particles 4"):
        sample(model, prompt=torch.tensor([1, 0, 4]), particles=4)
    assert sample(model, prompt=torch.tensor([1, -1, 4]), particles=4).evidence is not None
