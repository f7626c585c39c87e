"""The path of accelerators, on a CPU: little memory, few waits, and no products in TF32."""

import math
import warnings
from collections import Counter
from functools import cache, partial

import pytest
import torch
from numerics_cases import codebook_case
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tarflowlm import chunks, flow
from tarflowlm.flow import full_precision
from tarflowlm.flow.numerics import (
    COMPILED,
    head_sums,
    mixture,
    mixture_log_prob,
    mixture_log_prob_from_features,
    nearby,
    reference,
    rosenblatt,
    rosenblatt_inverse,
    vocabulary_rosenblatt,
)


def separated(rows, components, dim, separation):
    """u, log_w, mean, log_std of codes so many standard deviations apart."""
    u, log_w, mean, _ = codebook_case(rows, components, dim, 0, torch.float32)
    nearest = torch.cdist(mean[:64], mean).topk(2, largest=False).values[:, 1].median().item()
    return u, 2 * log_w, mean, torch.full((components,), math.log(nearest / separation))


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(("separation", "found"), [(40.0, True), (1.0, False)])
def test_an_inverse_of_few_components_is_the_one_of_all_or_says_that_it_is_not(separation, found):
    u, *book = separated(5, 1024, 10, separation)
    exact = reference.rosenblatt_inverse(u, *book)
    z, is_right = vocabulary_rosenblatt.by_heaviest(u, *book, reference.mixture_cdf_inverse)
    assert is_right.all() if found else not is_right.any()
    torch.testing.assert_close(z[is_right], exact[is_right], rtol=0, atol=1e-6)
    torch.testing.assert_close(rosenblatt_inverse(u, *book), exact, rtol=0, atol=1e-6)


def near_case(rows, separation=20.0):
    noise, _, mean, log_std = separated(rows, 200, 6, separation)
    tokens = torch.arange(rows) % len(mean)
    return mean[tokens] + log_std.exp()[tokens, None] * noise, mean, log_std


def test_near_pairs_are_those_of_a_cpu(monkeypatch):
    case = near_case(50)
    expected = nearby.near_components(*case)
    monkeypatch.setattr(flow, "is_eager_cpu", lambda t: False)
    monkeypatch.setattr(chunks, "HELD_CPU", 4 * 200 * 7)  # chunks of 7 rows
    found = nearby.near_components(*case)
    assert expected is not None
    assert found is not None
    assert found.rows.equal(expected.rows)
    assert found.components.equal(expected.components)
    assert nearby.near_components(*near_case(50, separation=1.0)) is None
    case[0][3, 0] = math.nan
    assert nearby.near_components(*case) is None


@pytest.mark.usefixtures("accelerator")
def test_a_component_far_away_or_without_weight_costs_no_digits():
    z = torch.tensor([[0.3, -0.2]])
    mean = torch.tensor([[90.0, 0.0], [0.0, 0.0], [0.4, -0.1]])
    log_std = torch.full((3,), -2.0)
    for first in (0.0, -math.inf):
        log_w = torch.tensor([[first, 0.0, 1.0]])
        exact = mixture_log_prob(*(t.double() for t in (z, log_w, mean, log_std)))
        assert exact.isfinite().all()
        found = mixture_log_prob(z, log_w, mean, log_std)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("spare", [1.5, 0.05, 1e9])
def test_a_sweep_turns_to_pairs_at_a_channel_of_few_rows(spare, monkeypatch):
    """With room for all pairs, for too few of them, and without pairs."""
    u, log_w, mean, log_std = separated(150, 300, 9, 15.0)
    z = reference.rosenblatt_inverse(u, log_w, mean, log_std)
    z[0, 2] = math.nan
    exact = reference.rosenblatt(*(t.double() for t in (z, log_w, mean, log_std)))
    monkeypatch.setattr(vocabulary_rosenblatt, "SPARE", spare)
    monkeypatch.setattr(chunks, "HELD_CPU", 300 * 20)
    calls = Counter()
    by_all = reference.rosenblatt

    def counted(z, *rest):
        calls["rows"] += len(z)
        return by_all(z, *rest)

    monkeypatch.setattr(vocabulary_rosenblatt.reference, "rosenblatt", counted)
    found = rosenblatt(z, log_w.__getitem__, mean, log_std)
    for value, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-5, equal_nan=True)
    assert (calls["rows"] > 30) == (spare < 1)


class Waits(TorchDispatchMode):
    """Counts operations whose result the host waits for."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        self.found.update([name] if name in ("_local_scalar_dense", "nonzero") else [])
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("rows", [7, 100])
def test_the_waits_do_not_grow_with_the_rows(rows, monkeypatch):
    monkeypatch.setattr(chunks, "HELD_CPU", 4 * 200 * 7)
    with Waits() as waits:
        nearby.near_components(*near_case(rows))
    assert waits.found.total() == 2


@pytest.mark.usefixtures("accelerator")
def test_gradients_of_pairs_come_in_small_parts(monkeypatch):
    z, mean, log_std = near_case(40)
    weight = torch.randn(200, 5)
    leaves = [t.requires_grad_() for t in (z, torch.randn(40, 5), weight, torch.zeros(200))]

    def gradients():
        log_p = mixture_log_prob_from_features(*leaves, mean, log_std, relative=True)
        return torch.autograd.grad(log_p.sum(), leaves)

    expected = gradients()
    monkeypatch.setattr(chunks, "HELD_CPU", 4 * 5 * 3)
    torch.testing.assert_close(gradients(), expected)


@pytest.mark.parametrize("components", [64, 261, 1001])
@pytest.mark.parametrize("kept", [0, 2**27])
def test_a_padded_head_has_the_sums_shares_and_gradients_of_a_plain_one(
    components, kept, monkeypatch
):
    """In tiles of 64 components, whose last one an accelerator fills."""
    g = torch.Generator().manual_seed(0)
    features, weight, bias, of_sum, of_logit = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((50, 24), (components, 24), (components,), (50,), (50,))
    )
    target = torch.randint(components, (50,), generator=g)
    leaves = [t.requires_grad_() for t in (features, weight, bias)]
    monkeypatch.setattr(chunks, "LOGITS", kept)

    def results():
        total, chosen = head_sums(*leaves, torch.arange(50), target, maps=COMPILED)
        return total, chosen, *torch.autograd.grad(total @ of_sum + chosen @ of_logit, leaves)

    logits = features @ weight.T + bias
    total, chosen = logits.logsumexp(-1), logits.gather(-1, target[:, None])[:, 0]
    plain = torch.autograd.grad(total @ of_sum + chosen @ of_logit, leaves)
    expected = (total, chosen, *plain)
    torch.testing.assert_close(results(), expected, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(flow, "is_eager_cpu", lambda t: False)
    monkeypatch.setattr(mixture, "compiled", lambda function: function)
    torch.testing.assert_close(results(), expected, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(chunks, "HELD_CPU", 64 * 30)
    torch.testing.assert_close(results(), expected, rtol=1e-12, atol=1e-12)


def test_a_map_is_compiled_once_for_every_number_of_rows(monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(mixture, "compiled", cache(partial(torch.compile, backend=counter)))
    for rows in (5, 7, 30):
        u, log_w, mean, log_std = codebook_case(rows, 9, 1, 0, torch.float32)
        mixture.fused(reference.mixture_cdf, u[:, 0], log_w, mean.T, log_std[None])
    assert counter.frame_count == 1


@pytest.mark.parametrize("before", ["tf32", "ieee"])
def test_full_precision_has_no_tf32(before):
    """Also after the older call that Lightning recommends."""
    torch.set_float32_matmul_precision("high")
    matmul = torch.backends.cuda.matmul
    kept = matmul.fp32_precision
    on_cuda = FakeTensor(FakeTensorMode(), torch.empty(1, device="meta"), torch.device("cuda:0"))
    try:
        matmul.fp32_precision = before
        with warnings.catch_warnings(action="ignore"), full_precision(on_cuda):
            assert matmul.fp32_precision == "ieee"
            with full_precision(on_cuda):
                assert matmul.fp32_precision == "ieee"
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == before
    finally:
        matmul.fp32_precision = kept
    assert torch.get_float32_matmul_precision() == "high"
    assert matmul.allow_tf32
    torch.set_float32_matmul_precision("highest")
