"""Sequential sampling is exact: it inverts the stack, and its frequencies are the model's
probabilities.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from helpers import normal, tiny_ar, tiny_flow
from tarflowlm.baseline import TokenLM
from tarflowlm.generation import generate
from tarflowlm.generation.decoder import Drawing
from tarflowlm.generation.inverse import invert_stack
from tarflowlm.generation.sampling import Gumbel, Noise, row_generators
from tarflowlm.model import TarFlowLM
from tarflowlm.requests import Sampling

NUM = 4000


def frequencies(texts: Tensor, V: int) -> Tensor:
    """How often each of the V^T texts occurs, the last token running fastest: shares."""
    code = torch.zeros(len(texts), dtype=torch.long)
    for token in texts.unbind(1):
        code = code * V + token
    return torch.bincount(code, minlength=V ** texts.shape[1]).double() / len(texts)


def assert_frequencies(texts: Tensor, probabilities: Tensor, V: int) -> None:
    """Pearson's chi-square at most 8 standard deviations above its mean; nothing impossible
    occurs.
    """
    observed = frequencies(texts, V)
    assert not observed[probabilities < 1e-12].any()
    likely = probabilities * len(texts) > 1
    degrees = int(likely.sum()) - 1
    p, q = probabilities[likely], observed[likely]
    chi_square = (len(texts) * (q - p) ** 2 / p).sum().item()
    assert chi_square < degrees + 8 * math.sqrt(2 * degrees)
    assert (q - 1 / len(q)).abs().max() > 0.05  # far from uniform: the test says something


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("patch", [1, 2])
def test_inverting_the_stack_gives_the_states_of_forward(patch):
    model = tiny_flow(couplings=("mixd", "mix1", "affine"), patch=patch)
    with torch.no_grad():
        found, _ = invert_stack(model, normal(3, 8, 2))
        states, _ = model.prior.states(found[-1])
    assert len(found) == 4
    for ours, theirs in zip(found, reversed(states), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prompt", [None, [2], [1, 0, 2]])
@pytest.mark.parametrize(
    "fields", [{}, {"patch": 2}, {"patch": 2, "in_patch": "autoregressive"}], ids=str
)
def test_the_baseline_takes_the_largest_sum_of_logit_and_number(prompt, fields):
    """Against a plain loop over the full logits, without a cache."""
    lm: TokenLM = tiny_ar(**fields)
    P = lm.config.patch
    gumbel = Gumbel(torch.tensor([3, 1, 2]), 8 // P, (P, lm.config.vocab_size))
    given = [] if prompt is None else prompt
    tokens = torch.zeros(3, 8, dtype=torch.long)
    tokens[:, : len(given)] = torch.tensor(given, dtype=torch.long)
    numbers = gumbel.at(slice(None), slice(0, 8 // P)).flatten(1, 2)
    with torch.no_grad():
        for t in range(len(given), 8):
            tokens[:, t] = (lm.logits(tokens)[:, t] + numbers[:, t]).argmax(-1)
        is_known = (torch.arange(8) < len(given)).expand(3, 8)
        empty = torch.zeros(3, 8, 0)
        passage = Drawing(lm, 0, empty, gumbel, tokens.where(is_known, -1), None)
        steps = [passage.step() for _ in range(passage.num_positions)]
        expected = lm.logits(tokens).log_softmax(-1).gather(-1, tokens[..., None])[:, : len(given)]
    assert torch.equal(passage.values.flatten(1), tokens)
    log_p = [step for step in steps if step is not None]
    assert len(log_p) == -(-len(given) // lm.config.patch)
    torch.testing.assert_close(sum(log_p, torch.zeros(3)).double(), expected.sum((1, 2)).double())


@pytest.mark.parametrize(
    "fields", [{}, {"patch": 2}, {"patch": 2, "in_patch": "autoregressive"}], ids=str
)
def test_frequencies_of_the_baseline_are_its_probabilities(fields):
    lm: TokenLM = tiny_ar(vocab_size=3, context=4, seed=1, **fields)
    texts = torch.tensor(list(itertools.product(range(3), repeat=2)))
    with torch.no_grad():
        probabilities = lm.log_prob(texts).exp()
    assert_frequencies(
        generate(lm, num_tokens=2, num=NUM, generator=generator()).tokens, probabilities, 3
    )


@torch.no_grad()
def discrete_probabilities(model: TarFlowLM, length: int, V: int) -> Tensor:
    """Of all V^length texts: the mixture weights at the means, for components well apart."""
    texts = torch.tensor(list(itertools.product(range(V), repeat=length)))
    block, z = model.prior.blocks[0], model.codebook.mean[texts]
    h = model.prior.patch(z)
    features = block.coupling.token_features(block.features(h), h).flatten(1, 2)
    log_w = block.coupling.weight_head(features).log_softmax(-1)
    return log_w.gather(-1, texts[..., None]).sum((1, 2)).exp()


PATCHES = [{}, *({"patch": 2, "in_patch": kind} for kind in ("autoregressive", "independent"))]


@pytest.mark.parametrize(("length", "fields"), [(1, {}), *((2, fields) for fields in PATCHES)])
def test_frequencies_of_a_mixd_block_are_its_weights(length, fields):
    model = tiny_flow(couplings=("mixd",), vocab_size=4, log_std=-9.0, seed=1, **fields)
    tokens = generate(model, num_tokens=length, num=NUM, generator=generator()).tokens
    assert_frequencies(tokens, discrete_probabilities(model, length, 4), 4)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_a_power_of_the_weights(temperature):
    model = tiny_flow(couplings=("mixd",), vocab_size=4, log_std=-9.0, seed=1)
    power = discrete_probabilities(model, 1, 4) ** (1 / temperature)
    with torch.no_grad():
        states, _ = invert_stack(
            model, normal(NUM, 1, 2), adjust=Sampling(temperature=temperature).adjustment(4)
        )
        z = states[-1]
    assert_frequencies(model.codebook.decode(z), power / power.sum(), 4)
    drawn = generate(
        model,
        num_tokens=1,
        num=NUM,
        temperature=temperature,
        generator=generator(2),
    )
    assert_frequencies(drawn.tokens, power / power.sum(), 4)

    lm: TokenLM = tiny_ar(vocab_size=3, context=4, seed=1)
    with torch.no_grad():
        power = lm.log_prob(torch.arange(3)[:, None]).exp() ** (1 / temperature)
    tokens = generate(
        lm, num_tokens=1, num=NUM, generator=generator(), temperature=temperature
    ).tokens
    assert_frequencies(tokens, power / power.sum(), 3)


@pytest.mark.parametrize(("decoder", "way"), [("sweeps", "steps"), ("auto", "draw")])
def test_truncated_weights_have_the_rest_of_the_probability(decoder, way):
    model = tiny_flow(couplings=("mixd",), vocab_size=4, log_std=-9.0, seed=1)
    kept = discrete_probabilities(model, 1, 4)
    kept[kept.argmin()] = 0.0
    found = generate(model, num_tokens=1, num=NUM, top_k=3, decoder=decoder, generator=generator(1))
    assert [work.decoder for work in found.work] == [way]
    assert_frequencies(found.tokens, kept / kept.sum(), 4)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["sweeps", "auto"])
def test_a_prompt_conditions_a_single_block(decoder):
    """p(x_2 | x_1): for one block from left to right a prompt is exact."""
    model = tiny_flow(couplings=("mixd",), vocab_size=4, log_std=-9.0, seed=1)
    joint = discrete_probabilities(model, 2, 4).view(4, 4)
    for first in (0, 3):
        prompt = torch.tensor([first])
        tokens = generate(
            model,
            num_tokens=2,
            num=NUM,
            prompt=prompt,
            decoder=decoder,
            generator=generator(first),
        ).tokens
        assert (tokens[:, 0] == first).all()
        assert_frequencies(tokens[:, 1:], joint[first] / joint[first].sum(), 4)


def test_latents_are_exact_samples_where_codes_are_soft():
    """Tokens drawn from p(x|z) have the model's probabilities; the mode of p(x|z), which `generate`
    takes, never gives a token from where another one is more probable.
    """
    model = tiny_flow(couplings=("affine",) * 3, vocab_size=3, latent_dim=1, log_std=-0.3, seed=1)
    axis = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None, None]
    with torch.no_grad():
        density = model.prior.log_prob(axis).exp() * (axis[1] - axis[0]).item()
        exact = density @ model.codebook.log_posterior(axis)[:, 0].exp()
        assert exact.sum().item() == pytest.approx(1.0, abs=1e-3)
        found = generate(model, num_tokens=1, num=NUM, generator=generator())
        posterior = model.codebook.log_posterior(found.latents[-1])[:, 0].exp()
    drawn = torch.multinomial(posterior, 1, generator=generator(1))
    assert_frequencies(drawn, exact, 3)
    distance = 0.5 * (frequencies(found.tokens, 3) - exact).abs().sum().item()
    assert distance > 0.05


def test_every_row_has_a_stream_of_its_own():
    def rows(num: int, seed: int = 0, length: int = 6) -> Tensor:
        streams = row_generators(range(num), generator(seed))
        return Noise(tiny_flow(), streams, 1).normal(length)[..., 0]

    assert torch.equal(rows(4)[:2], rows(2))
    assert not torch.equal(rows(1), rows(1, seed=1))
    assert len(rows(50).unique(dim=0)) == 50
    correlation = torch.corrcoef(rows(20, length=2000))
    assert (correlation - torch.eye(20)).abs().max() < 0.12
