"""Temperature, top-k and top-p on mixture weights and logits."""

import math

import pytest
import torch

import tarflowlm
from tarflowlm.errors import UserError
from tarflowlm.requests import Sampling

PROBABILITIES = torch.tensor([[0.3, 0.05, 0.5, 0.15]], dtype=torch.float64)


def adjusted(**options) -> list[float]:
    # no map where nothing changes
    adjust = Sampling(**options).adjustment(4) or (lambda log_w: log_w)
    # log-weights need not be normalised
    return adjust(PROBABILITIES.log() + 3.0).softmax(-1)[0].tolist()


def kept(*indices: int) -> list[float]:
    total = sum(PROBABILITIES[0, i].item() for i in indices)
    return pytest.approx(
        [PROBABILITIES[0, i].item() / total if i in indices else 0.0 for i in range(4)], abs=1e-12
    )


@pytest.mark.parametrize("temperature", [0.25, 0.5, 2.0, 100.0])
def test_temperature_is_a_power(temperature):
    power = PROBABILITIES[0] ** (1 / temperature)
    assert adjusted(temperature=temperature) == pytest.approx(
        (power / power.sum()).tolist(), rel=1e-9
    )


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-50])
def test_temperature_0_takes_the_most_probable(temperature):
    assert adjusted(temperature=temperature) == adjusted(top_k=1) == kept(2)


@pytest.mark.parametrize(
    ("top_k", "indices"), [(1, [2]), (2, [2, 0]), (3, [2, 0, 3]), (4, range(4)), (9, range(4))]
)
def test_top_k_keeps_the_largest(top_k, indices):
    assert adjusted(top_k=top_k) == kept(*indices)


@pytest.mark.parametrize(
    ("top_p", "indices"),
    [
        (0.01, [2]),
        (0.49, [2]),
        (0.51, [2, 0]),
        (0.79, [2, 0]),
        (0.81, [2, 0, 3]),
        (0.949, [2, 0, 3]),
        (0.96, range(4)),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, indices):
    assert adjusted(top_p=top_p) == kept(*indices)


@pytest.mark.parametrize(
    ("min_p", "indices"),
    [(1.0, [2]), (0.61, [2]), (0.59, [2, 0]), (0.31, [2, 0]), (0.29, [2, 0, 3]), (0.0, range(4))],
)
def test_min_p_keeps_what_is_not_far_below_the_largest(min_p, indices):
    assert adjusted(min_p=min_p) == kept(*indices)


def test_the_options_apply_one_after_another():
    """Temperature first: at 2 the largest two have 0.564 and 0.436 of their sum."""
    assert adjusted(temperature=2.0, top_k=2, top_p=0.6)[1] == 0.0
    a, b = math.sqrt(0.5), math.sqrt(0.3)
    assert adjusted(temperature=2.0, top_k=2, top_p=0.6) == pytest.approx(
        [b / (a + b), 0, a / (a + b), 0], abs=1e-12
    )
    assert adjusted(temperature=2.0, top_k=2, top_p=0.5) == kept(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_p_of_one_keeps_the_far_tail_of_a_large_vocabulary(dtype):
    """A cumulative sum in float32 reaches 1 thousands of components early."""
    log_w = 3 * torch.randn(4, 50_257, generator=torch.Generator().manual_seed(0), dtype=dtype)
    adjust = Sampling(temperature=0.999, top_p=1.0).adjustment(50_257)
    assert adjust is not None
    torch.testing.assert_close(adjust(log_w), (log_w / 0.999).log_softmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0: must be at least 0"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"top_k": 0}, "top_k 0: must be at least 1"),
        ({"top_p": 0.0}, "top_p 0.0: must be at least 1e-30 and at most 1"),
        ({"top_p": 1.5}, "top_p 1.5"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)


def test_a_sampler_of_ones_own_is_a_function_of_log_weights():
    """Before the options, and on all roads: in a flow, the baseline, a gap and a stream."""
    lm = tarflowlm.load("stories")
    warm = lm.write("The king", length=12, temperature=0.5, top_p=0.8)
    doubled = {"temperature": 1, "adjust": lambda w: 2 * w, "top_p": 0.8}
    assert lm.write("The king", length=12, **doubled) == warm
    assert "".join(lm.stream("The king", length=12, **doubled)) == warm
    without = torch.tensor([b"e" in token for token in lm.tokenizer.token_bytes])
    never = {"adjust": lambda w: w.masked_fill(without, -torch.inf), "length": 20}
    for model in (lm, tarflowlm.load("stories-ar")):
        assert "e" not in model.write(**never)
    assert "e" not in lm.fill("A man [...] a dog.", adjust=never["adjust"])


@pytest.mark.parametrize(
    ("own", "said"),
    [(1, "adjust 1: give a function"), (lambda w: w[:0], "return log-weights of the shape")],
)
def test_a_function_that_is_no_sampler_is_refused(own, said):
    with pytest.raises(UserError, match=said):
        tarflowlm.load("english-mini").write(length=3, adjust=own)
