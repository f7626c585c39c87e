"""Edits beyond the product's: they begin and end at their texts, and follow their formulas."""

import math

import pytest
import torch
from torch import Tensor

from helpers import mostly_nightly, tiny_flow
from reproduction.edits import blend, blended_spans, interpolate
from tarflowlm.editing.edits import words_of
from tarflowlm.editing.redraw import Candidates
from tarflowlm.editing.states import Source, encode
from tarflowlm.model import TarFlowLM

STACKS = {
    "mixd-mix1": {"couplings": ("mixd", "mix1", "mix1")},
    "affine": {"couplings": ("affine", "affine")},
    "mixd-mix1-P2": {"couplings": ("mixd", "mix1"), "patch": 2},
}
TEXT = torch.tensor([[0, 3, 1, 4, 1, 0, 2], [2, 2, 0, 1, 3, 4, 4]])


@pytest.fixture(params=mostly_nightly(STACKS, "mixd-mix1", "mixd-mix1-P2"))
def model(request) -> TarFlowLM:
    return tiny_flow(log_std=-3.0, **STACKS[request.param])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    return (math.sin((1 - weight) * angle) * a + math.sin(weight * angle) * b) / math.sin(angle)


@pytest.mark.slow
def test_interpolation_has_its_ends_and_its_arc(model):
    first, second = (encode(model, x[None], generator()) for x in TEXT)
    source = Source(model, first, generator())
    for level in range(model.num_blocks + 1):
        for weight, tokens in ((0.0, TEXT[:1]), (1.0, TEXT[1:])):
            edit = interpolate(source, second, level=level, weight=weight)
            assert torch.equal(edit.tokens, tokens)
        middle = interpolate(source, second, level=level, weight=0.3)
        expected = slerp(first.states[level], second.states[level], 0.3)
        torch.testing.assert_close(middle.states[0], expected[:, :7], rtol=1e-6, atol=1e-6)
    assert torch.equal(middle.changed, middle.tokens != TEXT[:1])


@pytest.mark.slow
def test_blends_take_and_keep_the_requested_spans(model):
    first, second = (encode(model, x[None], generator()) for x in TEXT)
    spans = [([(0, 2)], [(4, 7)])]
    edit = blend(Source(model, first, generator(1)), second, spans, Candidates(3))
    assert torch.equal(edit.tokens[0, :2], TEXT[1, :2])
    assert torch.equal(edit.tokens[0, 4:], TEXT[0, 4:])
    for taken, whole in (([], TEXT[:1]), ([(0, 7)], TEXT[1:])):
        edit = blend(Source(model, first, generator()), second, [(taken, [(0, 7)])], Candidates(1))
        assert torch.equal(edit.tokens, whole)


def test_a_blend_keeps_the_words_that_nothing_cuts():
    first, second = (
        words_of([character.encode() for character in text])
        for text in ("the king of land", "a cat or another")
    )
    taken, kept = blended_spans(first, second, [second[1]], 16)
    assert taken == [(1, 6)]
    assert kept == [(8, 12), (11, 16)]
