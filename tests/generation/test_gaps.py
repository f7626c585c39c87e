"""Gaps of unknown length and constraints: particles give what enumeration gives."""

import pytest
import torch
from enumeration import V, probabilities, texts
from torch import Tensor

from helpers import tiny_ar, tiny_flow
from tarflowlm.baseline import TokenLM
from tarflowlm.data.prompts import Gap
from tarflowlm.errors import UserError
from tarflowlm.generation import generate
from tarflowlm.model import TarFlowLM

FLOW = {"vocab_size": V, "context": 4, "latent_dim": 1, "seed": 3}
MODELS = {
    "ar": lambda: tiny_ar(vocab_size=V, context=4, seed=1, scale=0.6),
    # codes that overlap: the estimate is one of the text, not of its latents
    "mixd": lambda: tiny_flow(couplings=("mixd",), log_std=-0.8, scale=0.5, **FLOW),
    "mixd-mix1": lambda: tiny_flow(couplings=("mixd", "mix1"), log_std=-0.8, scale=0.2, **FLOW),
}
ONE = [Gap(most=3), torch.tensor([2])]
TWO = [Gap(most=1, least=0), torch.tensor([1]), Gap(most=1, least=0), torch.tensor([2])]
NONE = torch.zeros(0, dtype=torch.long)


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request) -> TarFlowLM | TokenLM:
    return request.param()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def starts(template: list[Tensor | Gap], *lengths: int) -> Tensor:
    """Which of all texts begin with the template, where its gaps have these lengths."""
    found, at, left = torch.ones(V**4, dtype=torch.bool), 0, list(lengths)
    for part in template:
        if isinstance(part, Gap):
            at += left.pop(0)
            continue
        for token in part.tolist():
            found &= texts(4)[:, at] == token
            at += 1
    return found


@pytest.mark.slow
def test_lengths_of_a_gap_have_their_enumerated_probabilities(model):
    """The mean of evidence times posterior is p(prefix, any m tokens, suffix) / 3 for every m."""
    joint = probabilities(model)
    assert joint.sum().item() == pytest.approx(1.0, abs=1e-2)
    for first in (NONE, torch.tensor([0])):
        template = [first, Gap(most=3 - len(first)), torch.tensor([2])]
        most = template[1].most
        wanted = torch.stack([joint[starts(template, m)].sum() for m in range(1, most + 1)])
        found = generate(
            model, num_tokens=4, num=40, prompt=template, particles=400, generator=generator()
        )
        share = found.evidence.log_evidence.exp()[:, None] * found.filled.lengths[0]
        torch.testing.assert_close(share.mean(0) * most, wanted, rtol=0.06, atol=1e-3)


@pytest.mark.slow
def test_lengths_of_two_gaps_have_their_enumerated_probabilities(model):
    joint = probabilities(model)
    table = torch.tensor([[joint[starts(TWO, m, n)].sum() for n in (0, 1)] for m in (0, 1)])
    found = generate(
        model, num_tokens=4, num=40, prompt=TWO, particles=400, generator=generator()
    )
    weights = found.evidence.log_evidence.exp()
    assert weights.mean().item() == pytest.approx(table.mean().item(), rel=0.06)
    for gap, axis in ((0, 1), (1, 0)):
        share = (weights[:, None] * found.filled.lengths[gap]).sum(0) / weights.sum()
        torch.testing.assert_close(share, (table.sum(axis) / table.sum()).double(), rtol=0.06, atol=1e-2)
