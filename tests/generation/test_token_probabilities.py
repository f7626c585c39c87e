"""Temperature, top-k and top-p act on tokens, whatever block 1 is: Mix-1 models with known token probabilities."""

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tarflowlm.errors import UserError
from tarflowlm.generation import generate, sampling
from tarflowlm.model import TarFlowLM

V, NUM = 4, 1500
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=2)))


@pytest.fixture(params=[1, 2], ids=["P1", "P2"])
def model(request, tiny_flow) -> TarFlowLM:
    """One Mix-1 block that is the Mix-d block of the codebook: weights softmax(shared c + bias of the place)."""
    return as_mixd(tiny_flow(couplings=("mix1",), components=(V,), vocab_size=V, patch=request.param, log_std=-6.0))


@torch.no_grad()
def as_mixd(model: TarFlowLM) -> TarFlowLM:
    coupling = model.prior.block(0).coupling
    head = coupling.head
    for weights in head.weights:
        weights.zero_()
    head.evidence.zero_()
    coupling.start_from(model.codebook)
    generator = torch.Generator().manual_seed(5)
    head.shared.weight.normal_(generator=generator)
    for a, bias in enumerate(0.5 * torch.randn(model.config.patch, V, generator=generator).double()):
        head.biases[0][2 * a : 2 * a + 2] += bias
    return model


@torch.no_grad()
def token_log_w(model: TarFlowLM, tokens: Tensor) -> Tensor:
    """The log-probabilities [B, T, V] of every token given those before."""
    block, patch = model.prior.block(0), model.config.patch
    h = model.prior.patch(model.codebook.mean[tokens])[0]
    bias = block.coupling.head.biases[0][::2]
    log_w = block.coupling.head.shared(block._features(h))[:, :, None] + bias
    assert log_w.shape[2] == patch
    return log_w.flatten(1, 2).log_softmax(-1)


def adjusted_probabilities(model: TarFlowLM, adjust) -> Tensor:
    """Of all V^2 texts of two tokens."""
    log_w = adjust(token_log_w(model, TEXTS)).log_softmax(-1)
    return log_w.gather(-1, TEXTS[..., None]).sum((1, 2)).exp()


def sample(model: TarFlowLM, num: int = NUM, seed: int = 0, **options) -> Tensor:
    return generate(model, num_tokens=2, num=num, generator=torch.Generator().manual_seed(seed), **options).tokens


def frequencies(tokens: Tensor) -> Tensor:
    return torch.bincount(tokens[:, 0] * V + tokens[:, 1], minlength=V**2).double() / len(tokens)


def assert_frequencies(tokens: Tensor, expected: Tensor) -> None:
    error = (frequencies(tokens) - expected).abs()
    assert (error < 4.5 * (expected * (1 - expected) / len(tokens)).sqrt() + 2 / len(tokens)).all()


def test_the_model_has_the_probabilities_that_the_tests_take_for_known(model):
    expected = adjusted_probabilities(model, lambda log_w: log_w)
    assert (expected - 1 / V**2).abs().max() > 0.1
    assert_frequencies(sample(model), expected)


def test_top_k_of_one_always_gives_the_most_probable_token(model):
    tokens = sample(model, num=400, top_k=1)
    assert torch.equal(token_log_w(model, tokens).argmax(-1), tokens)


@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_temperature_is_a_power_of_the_probabilities_of_tokens(temperature, model):
    expected = adjusted_probabilities(model, lambda log_w: log_w / temperature)
    tokens = sample(model, temperature=temperature)
    assert_frequencies(tokens, expected)
    entropy = torch.special.entr(frequencies(tokens)).sum().item()
    wanted = torch.special.entr(expected).sum().item()
    surprise = (expected * (expected.log() + wanted) ** 2).sum().item()
    assert entropy == pytest.approx(wanted, abs=4.5 * math.sqrt(surprise / NUM) + V**2 / NUM)


def test_top_p_keeps_the_smallest_set_of_tokens_that_reaches_it(model):
    tokens = sample(model, num=600, top_p=0.9)
    p, order = token_log_w(model, tokens).exp().sort(dim=-1, descending=True)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p < 0.9)
    assert kept.gather(-1, tokens[..., None]).all()
    first = kept[0, 0].nonzero()[:, 0]
    assert tokens[:, 0].unique().tolist() == first.tolist()
    assert 1 < len(first) < V


@pytest.mark.slow
def test_tokens_of_soft_codes_are_the_chosen_ones_and_estimated_well(tiny_flow):
    """p(x) = sum_j w_j E_{z ~ N_j} p(x | z), where the mixture of the model is that of the codebook."""
    model = as_mixd(tiny_flow(couplings=("mix1",), components=(V,), vocab_size=V, log_std=-0.7))
    book = model.codebook
    with torch.no_grad():
        eps = torch.randn(4000, 1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        confusion = book.log_posterior(book.mean + book.log_std.exp()[:, None] * eps).exp().mean(0)
    p = token_log_w(model, TEXTS[:1])[0, 0].exp() @ confusion
    assert confusion.diagonal().min() < 0.95
    cold = p**2 / (p**2).sum()
    tokens = sample(model, num=4000, temperature=0.5)
    observed = torch.bincount(tokens[:, 0], minlength=V).double() / 4000
    # S draws leave an error of their own in the power
    assert (observed - cold).abs().max() < 0.04
    assert (sample(model, num=200, top_k=1)[:, 0] == p.argmax()).double().mean() > 0.95


FREE = {
    "mix1": {"couplings": ("mix1",)}, "mix1-P2": {"couplings": ("mix1", "mix1"), "patch": 2},
    "own-mixd": {"couplings": ("mixd", "mix1"), "components": (7, 3)},
    "own-mixd-P2": {"couplings": ("mixd",), "components": (7,), "patch": 2},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fields", FREE.values(), ids=FREE.keys())
def test_rows_do_not_depend_on_each_other_and_given_tokens_are_kept(fields, tiny_flow, any_stack):
    model = tiny_flow(**fields)
    templates = torch.tensor([[-1, 3, -1, 1, -1], [2, -1, -1, -1, 0], [-1] * 5])
    for options in ({}, {"prompt": torch.tensor([3, 1, 4])}, {"prompt": templates, "particles": 3}):
        alone = dict(options, prompt=templates[:1]) if "particles" in options else options
        common = {"num_tokens": 7, "temperature": 0.7, "top_k": 3}
        many, one = (
            generate(model, num=num, generator=torch.Generator().manual_seed(2), **common, **given)
            for num, given in ((3, options), (1, alone))
        )
        assert torch.equal(many.tokens[:1], one.tokens)
        assert (many.log_evidence is None) == (options == {})
        given = options.get("prompt", torch.full((1,), -1))
        assert ((many.tokens[:, : given.shape[-1]] == given) | (given == -1)).all()


def test_a_prompt_conditions_chosen_tokens(model):
    joint = adjusted_probabilities(model, lambda log_w: log_w / 0.5).view(V, V)
    # of the second token alone: the first is given
    expected = joint[1] / joint[1].sum()
    tokens = sample(model, temperature=0.5, prompt=torch.tensor([1]))
    observed = torch.bincount(tokens[:, 1], minlength=V).double() / NUM
    assert (observed - expected).abs().max() < 4.5 * math.sqrt(0.25 / NUM)


@pytest.mark.parametrize(("options", "name"), [
    ({"temperature": 0.5}, "temperature 0.5"), ({"top_k": 2}, "top-k 2"), ({"top_p": 0.5}, "top-p 0.5"),
])  # fmt: skip
def test_blocks_without_probabilities_of_tokens_refuse(options, name, tiny_flow, monkeypatch):
    for coupling in ("affine", "token-affine"):
        with pytest.raises(UserError, match=rf"{name}: block 1 \({coupling}\) has no weights of tokens"):
            sample(tiny_flow(couplings=(coupling, "mix1")), num=1, **options)
    mix1 = tiny_flow(couplings=("mix1",))
    sample(mix1, num=1, **options)
    monkeypatch.setattr(sampling, "LARGEST_VOCABULARY", 4)
    with pytest.raises(UserError, match=rf"{name}: block 1 \(mix1\) .* all 5 of them .* at most 4: .*temperature 1"):
        sample(mix1, num=1, **options)


@pytest.mark.parametrize(("scale", "is_refused"), [(1.0, True), (0.0, False)])
def test_choices_that_ignore_much_of_what_upper_blocks_know_are_refused(scale, is_refused, tiny_flow):
    model = tiny_flow(couplings=("mix1", "mix1"))
    with torch.no_grad():
        for parameter in model.prior.block(1).parameters():
            parameter *= scale
    options = {"num_tokens": 6, "generator": torch.Generator().manual_seed(0)}
    generate(model, **options)
    with pytest.raises(UserError, match=r"bits a token: sample it at temperature 1") if is_refused else nullcontext():
        generate(model, temperature=0.9, **options)


def test_what_a_choice_ignores_is_said(any_stack, tiny_flow, caplog):
    generate(tiny_flow(couplings=("mix1", "mix1")), temperature=0.9, num_tokens=6)
    assert "ignore what the blocks above it know, in this model" in caplog.text
