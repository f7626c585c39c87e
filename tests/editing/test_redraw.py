"""Redrawing: the rest stays to the bit, the weights are those of the model, and the draws have its
conditional.
"""

import dataclasses
import math
from itertools import product

import pytest
import torch

import tarflowlm
from helpers import mostly_nightly, tiny_ar, tiny_flow
from tarflowlm.editing.redraw import (
    Candidates,
    informative_level,
    propose,
    propose_tokens,
    redraw,
    rewrite,
    spaces_of,
    token_costs,
)
from tarflowlm.editing.states import Source, encode
from tarflowlm.errors import UserError
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.generation import generate

STACKS = {
    "mixd": {"couplings": ("mixd",)},
    "mixd-mix1": {"couplings": ("mixd", "mix1", "mix1")},
    "mix1": {"couplings": ("mix1", "mix1")},
    "mixd-mix1-P2": {"couplings": ("mixd", "mix1"), "patch": 2},
}
TEXT = torch.tensor([[0, 3, 1, 4, 1, 0, 2], [2, 2, 0, 1, 3, 4, 4]])


@pytest.fixture(params=mostly_nightly(STACKS, "mixd-mix1", "mixd-mix1-P2"))
def model(request):
    return tiny_flow(log_std=-3.0, **STACKS[request.param])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.slow
@pytest.mark.parametrize("span", [(0, 2), (3, 5), (4, 7), (0, 7)])
def test_the_rest_keeps_tokens_and_latents(model, span):
    text = encode(model, TEXT, generator())
    edit = rewrite(Source(model, text, generator(1)), [[span], []], Candidates(4))
    inside = torch.zeros(7, dtype=torch.bool)
    inside[slice(*span)] = True
    assert not edit.changed[0, ~inside].any()
    assert torch.equal(edit.states[-1][0, ~inside], text.states[0][0, :7][~inside])
    assert torch.equal(edit.tokens[1], TEXT[1])
    assert len(edit.states) == model.num_blocks + 1


@pytest.mark.parametrize("span", [(2, 4), (0, 2), (6, 8)])
def test_weights_are_the_density_over_that_of_the_proposal(model, span):
    """Spans of whole positions, whose density in block 1 can be read off."""
    text = encode(model, torch.cat((TEXT, TEXT[:, :1]), 1), generator()).row(0)
    z, _, log_w = propose(Source(model, text, generator(1)), span, Candidates(5))
    patch = model.config.patch
    with torch.no_grad():
        proposal = model.prior.block(0).log_prob(model.prior.patch(z))
        expected = model.prior.log_prob(z) - proposal[:, span[0] // patch : span[1] // patch].sum(1)
    difference = log_w - expected
    torch.testing.assert_close(difference, difference[:1].expand(5), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("couplings", "level"),
    [(("mix1", "mix1"), 1), (("mixd", "mix1", "mix1"), 1), (("mix1",) * 3, 2)],
)
@pytest.mark.parametrize(("patch", "span"), [(1, (2, 5)), (1, (0, 2)), (2, (2, 6)), (2, (6, 8))])
def test_weights_of_a_state_are_the_density_over_that_of_the_proposal(
    couplings, level, patch, span
):
    model = tiny_flow(log_std=-3.0, couplings=couplings, patch=patch)
    text = encode(model, torch.cat((TEXT, TEXT[:, :1]), 1), generator()).row(0)
    z, tokens, log_w = propose(Source(model, text, generator(1)), span, Candidates(5, level=level))
    assert torch.equal(tokens, model.codebook.decode(z))
    with torch.no_grad():
        h = model.prior.states(z)[0][level]
        proposal = model.prior.block(level).log_prob(model.prior.patch(h))
        expected = model.prior.log_prob(h, above=level) - proposal[
            :, span[0] // patch : span[1] // patch
        ].sum(1)
    difference = log_w - expected
    torch.testing.assert_close(difference, difference[:1].expand(5), rtol=1e-8, atol=1e-8)
    outside = torch.ones(8, dtype=torch.bool)
    outside[slice(*span)] = False
    before = text.states[level].expand_as(h)
    torch.testing.assert_close(h[:, outside], before[:, outside], rtol=1e-8, atol=1e-8)
    assert (h[:, ~outside] - before[:, ~outside]).abs().amax((1, 2)).min() > 1e-3


def test_a_span_at_the_beginning_is_drawn_after_the_lead():
    model = tiny_flow(log_std=-8.0)
    lead, text = torch.tensor([[2]]), TEXT[:1]
    longer = encode(model, torch.cat((lead, text), 1), generator())
    z = torch.cat((model.codebook.mean[lead], longer.states[0][:, 1:]), 1)
    longer = dataclasses.replace(longer, states=tuple(model.prior.states(z)[0]))
    alone = dataclasses.replace(
        longer, tokens=text, length=7, states=tuple(model.prior.states(z[:, 1:])[0])
    )
    found = redraw(Source(model, alone, generator(1)), (0, 3), Candidates(9, lead=(2,)))
    wanted = redraw(Source(model, longer, generator(1)), (1, 4), Candidates(9))
    assert torch.equal(found.tokens, wanted.tokens[:, 1:])
    assert torch.equal(found.states[0], wanted.states[0][:, 1:])


@pytest.mark.slow
def test_parts_of_positions_are_redrawn_with_their_position():
    """Seven tokens in four positions of two: the padding after the text does not count."""
    model = tiny_flow(log_std=-3.0, couplings=("mix1", "mix1"), patch=2)
    text = encode(model, TEXT, generator())
    edit = rewrite(Source(model, text, generator(1)), [[(3, 4)], [(6, 7)]], Candidates(30, level=1))
    assert edit.tokens.shape == TEXT.shape
    assert edit.changed[0, 3]
    assert edit.changed[1, 6]
    assert torch.isfinite(edit.bounds[1]).all()


@pytest.mark.slow
def test_words_are_redrawn_in_the_state_that_tells_most():
    """Block 1 of english-passes fills in a few letters; block 2 above it writes words."""
    model, tokenizer = tarflowlm.load("english-passes")
    sentence = "the government of the united states is a great nation of the people"
    text = encode(model, torch.from_numpy(tokenizer.encode(sentence))[None], generator())
    assert informative_level(model, text) == 1
    start = sentence.index("great")
    edits = [[(start, start + 5)]] * 4
    lower, upper = (
        rewrite(Source(model, text.repeated(4), generator(1)), edits, Candidates(16, level=level))
        for level in (0, 1)
    )
    assert upper.bounds[1].mean() < lower.bounds[1].mean()
    assert upper.changed[:, start : start + 5].any(1).all()


def test_part_of_a_position_is_weighed_by_what_it_keeps():
    """One token of a patch of two: p(z) over the density of the noise, at equal latents."""
    model = tiny_flow(log_std=-3.0, couplings=("mixd",), patch=2)
    text = encode(model, TEXT, generator()).row(0)
    z, _, log_w = propose(Source(model, text, generator(1)), (2, 3), Candidates(4))
    with torch.no_grad():
        u, log_det = model.prior(z)
        log_p = model.prior.log_prob(z)
        torch.testing.assert_close(log_p, log_det + standard_normal_log_prob(u))
        # position 1 holds tokens 2 and 3; the first of them is drawn, with the density of block 1
        # at d channels
        coupling, h = model.prior.block(0).coupling, model.prior.patch(z)
        features = model.prior.block(0).features(h)[:, 1]
        u, log_det = next(coupling.conditionals(features)).forward(z[:, 2])
        drawn = log_det + standard_normal_log_prob(u)
    difference = log_w - (log_p - drawn)
    torch.testing.assert_close(difference, difference[:1].expand(4), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("couplings", [("mixd",), ("mixd", "mix1")])
def test_weighted_candidates_have_the_conditional_of_the_model(couplings):
    """Two of four tokens, all nine pairs given the latents of the others: p(x_W, z_O) from latents
    z_W ~ q(.|x_W).
    """
    model = tiny_flow(log_std=-3.0, vocab_size=3, context=4, couplings=couplings)
    text = encode(model, torch.tensor([[1, 2, 0, 1]]), generator())
    with torch.no_grad():
        _, tokens, log_w = propose(Source(model, text, generator(1)), (1, 3), Candidates(4000))
    found = torch.zeros(9).double().index_add(0, tokens[:, 1] * 3 + tokens[:, 2], log_w.softmax(0))
    pairs = torch.tensor(list(product(range(3), repeat=2))).repeat_interleave(400, 0)
    with torch.no_grad():
        noise = torch.randn(len(pairs), 2, 2, generator=generator(2), dtype=torch.float64)
        z = text.states[0].repeat(len(pairs), 1, 1)
        z[:, 1:3] = model.codebook.encode(pairs, noise)
        log_p = model.prior.log_prob(z) - model.codebook.log_normaliser(z[:, 1:3]).sum(1)
    expected = log_p.view(9, 400).logsumexp(1).softmax(0)
    assert (found - expected).abs().sum() / 2 < 0.05, (found, expected)


@pytest.mark.parametrize("span", [(1, 3), (2, 4)])
def test_candidates_of_the_baseline_have_its_conditional(span):
    model = tiny_ar(vocab_size=3, context=4)
    text = encode(model, torch.tensor([[1, 2, 0, 1]]), generator())
    with torch.no_grad():
        _, tokens, log_w = propose_tokens(Source(model, text, generator(1)), span, Candidates(4000))
        inside = slice(*span)
        pairs = torch.tensor(list(product(range(3), repeat=2)))
        every = text.tokens.repeat(9, 1)
        every[:, inside] = pairs
        expected = model.log_prob(every).softmax(0)
    assert (tokens[:, : span[0]] == text.tokens[:, : span[0]]).all()
    assert (tokens[:, span[1] :] == text.tokens[:, span[1] :]).all()
    first, second = tokens[:, inside].T
    found = torch.zeros(9).double().index_add(0, first * 3 + second, log_w.softmax(0))
    assert (found - expected).abs().sum() / 2 < 0.05, (found, expected)


@pytest.mark.slow
def test_candidates_that_repeat_the_text_come_last():
    model = tiny_flow(log_std=-6.0, couplings=("mixd",))
    text = encode(model, TEXT[:1], generator())
    changed = [
        redraw(Source(model, text, generator(s)), (3, 4), Candidates(60)).tokens[0, 3]
        for s in range(20)
    ]
    assert TEXT[0, 3] not in changed
    only = [
        redraw(Source(model, text, generator(s)), (3, 4), Candidates(1)).tokens[0, 3]
        for s in range(40)
    ]
    assert TEXT[0, 3] in only


def test_edits_report_the_tail_of_their_weights():
    model = tiny_flow(log_std=-3.0, couplings=("mixd", "mix1"))
    text = encode(model, TEXT, generator())
    source = Source(model, text, generator(1))
    first, untouched = rewrite(source, [[(1, 3), (4, 6)], []], Candidates(60)).pareto_k
    assert math.isfinite(first)
    assert math.isnan(untouched)
    one = redraw(Source(model, text.row(0), generator(1)), (1, 3), Candidates(60))
    # too few for a tail
    again = redraw(Source(model, one, generator(1)), (4, 6), Candidates(4))
    assert again.pareto_k == one.pareto_k


def test_another_span_is_tried_where_all_candidates_repeat_one():
    """At a low temperature block 1 repeats a text of most probable tokens, but for one that is
    changed.
    """
    model = tiny_flow(log_std=-9.0, couplings=("mixd",))
    sure = Candidates(60, temperature=1e-3)
    tokens = generate(model, num_tokens=7, top_k=1, generator=generator()).tokens
    text = encode(model, tokens, generator()).repeated(2)
    words = [(at, at + 1) for at in range(7)]
    spans = [[(1, 2)], []]
    same = rewrite(Source(model, text, generator(1)), spans, sure, spare=words)
    assert not same.changed.any()
    tokens[0, 5] = (tokens[0, 5] + 1) % 5
    text = encode(model, tokens, generator()).repeated(2)
    assert not rewrite(Source(model, text, generator(1)), spans, sure).changed.any()
    other = rewrite(Source(model, text, generator(1)), spans, sure, spare=words)
    assert other.changed.sum(1).tolist() == [1, 0]
    assert other.changed[0, 5]


def test_candidates_may_repeat_the_text_where_this_is_allowed():
    model = tiny_flow(log_std=-9.0, couplings=("mixd",))
    tokens = generate(model, num_tokens=7, top_k=1, generator=generator()).tokens
    text = encode(model, tokens, generator())
    repeated = {
        may_repeat: [
            redraw(
                Source(model, text, generator(seed)), (3, 4), Candidates(60, may_repeat=may_repeat)
            ).tokens.equal(tokens)
            for seed in range(9)
        ]
        for may_repeat in (False, True)
    }
    assert not any(repeated[False])
    assert 0 < sum(repeated[True]) < 9


def test_candidates_that_keep_the_spaces_of_a_span_are_preferred():
    """Token 4 begins with a space, and 1 ends with one."""
    model = tiny_flow(log_std=-6.0, couplings=("mixd",))
    text = encode(model, TEXT[:1], generator())
    spaces = spaces_of([b"a", b"b ", b"c", b"d", b" e"])
    for seed in range(10):
        draws = Candidates(60, spaces=spaces)
        redrawn = redraw(Source(model, text, generator(seed)), (2, 4), draws)
        first, last = redrawn.tokens[0, 2:4].tolist()
        assert first != 4  # token 1 stood there
        assert last != 1  # token 4 stood there


def test_costs_add_up_to_the_bound_of_block_1():
    for patch in (1, 2):
        model = tiny_flow(log_std=-3.0, couplings=("mixd",), patch=patch)
        text = encode(model, torch.cat((TEXT, TEXT[:, :1]), 1), generator())
        with torch.no_grad():
            expected = model.codebook.log_normaliser(text.states[0]).sum(1) - model.prior.log_prob(
                text.states[0]
            )
        torch.testing.assert_close(token_costs(model, text).sum(1), expected)


def test_refusals():
    model = tiny_flow(couplings=("mix1", "mix1"))
    text = encode(model, TEXT[:1], generator())
    for level in (0, 1):
        candidates = Candidates(2, temperature=0.5, level=level)
        with pytest.raises(UserError, match=f"state {level} .* no weights of tokens"):
            redraw(Source(model, text, generator()), (1, 3), candidates)
