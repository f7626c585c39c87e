"""Gaps of unknown length and constraints: particles give what enumeration gives."""

import math
import re
from dataclasses import replace

import pytest
import torch
from enumeration import V, probabilities, texts
from torch import Tensor

import tarflowlm
from helpers import mostly_nightly, tiny_ar, tiny_flow
from tarflowlm.data import CharTokenizer
from tarflowlm.data.prompts import Gap
from tarflowlm.errors import UserError
from tarflowlm.generation import generate, write
from tarflowlm.generation.particles import is_rough
from tarflowlm.generation.plan import plan
from tarflowlm.generation.sampling import BLANK, Evidence, row_generators
from tarflowlm.generation.texts import Samples
from tarflowlm.pretrained import Pretrained
from tarflowlm.requests import Sampling, Writing

FLOW = {"vocab_size": V, "latent_dim": 1, "seed": 3}
# codes that overlap: the estimate is one of the text, not of its latents
WIDE = {"context": 4, "log_std": -0.3}
WIDE_AXIS = torch.linspace(-4.5, 4.5, 14)
SHARP = {"context": 2, "log_std": -1.8}
SHARP_AXIS = torch.linspace(-5, 5, 76)
STACK = {"couplings": ("mixd", "mix1"), "scale": 0.05}
AR = {"vocab_size": V, "seed": 1, "scale": 0.3}
OPEN = {
    "ar": lambda: tiny_ar(context=4, **AR),
    "mixd": lambda: tiny_flow(couplings=("mixd",), scale=0.5, **FLOW, **WIDE),
    "mixd-mix1": lambda: tiny_flow(**STACK, **FLOW, **WIDE),
}
CONSTRAINED = {
    "ar": lambda: tiny_ar(context=2, **AR),
    "mixd": lambda: tiny_flow(couplings=("mixd",), scale=0.5, **FLOW, **SHARP),
    "mixd-mix1": lambda: tiny_flow(**STACK, **FLOW, **SHARP),
}
NONE = torch.zeros(0, dtype=torch.long)
OPTIONS = {"num": 60, "particles": 64}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def begins_with(template: list[Tensor | Gap], *lengths: int) -> Tensor:
    """Which of all texts of 4 tokens begin with the template, its gaps having these lengths."""
    found = torch.ones(V**4, dtype=torch.bool)
    at = 0
    left = list(lengths)
    for part in template:
        if isinstance(part, Gap):
            at += left.pop(0)
            continue
        for token in part.tolist():
            found &= texts(4)[:, at] == token
            at += 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize("make", OPEN.values(), ids=OPEN.keys())
def test_lengths_of_a_gap_have_their_enumerated_probabilities(make):
    """Evidence times posterior is in the mean p(prefix, any m tokens, suffix) / M for every m."""
    model = make()
    joint = probabilities(model, WIDE_AXIS)
    assert joint.sum().item() == pytest.approx(1.0, abs=1e-2)
    for first in (NONE, torch.tensor([0])):
        template = [first, Gap(most=3 - len(first)), torch.tensor([2])]
        most = 3 - len(first)
        wanted = [joint[begins_with(template, m)].sum().item() for m in range(1, most + 1)]
        found = generate(model, num_tokens=4, prompt=template, generator=generator(), **OPTIONS)
        share = found.evidence.log_evidence.exp()[:, None] * found.filled.lengths[0] * most
        error = share.std(0) / math.sqrt(len(share))
        assert ((share.mean(0) - torch.tensor(wanted)).abs() < 4 * error + 2e-3).all()


@pytest.mark.slow
@pytest.mark.parametrize("make", OPEN.values(), ids=OPEN.keys())
def test_lengths_of_two_gaps_have_their_enumerated_probabilities(make):
    model = make()
    joint = probabilities(model, WIDE_AXIS)
    gap = Gap(most=1, least=0)
    template = [gap, torch.tensor([1]), gap, torch.tensor([2])]
    pairs = [joint[begins_with(template, m, n)].sum() for m in (0, 1) for n in (0, 1)]
    table = torch.stack(pairs).view(2, 2).double()
    found = generate(model, num_tokens=4, prompt=template, generator=generator(), **OPTIONS)
    weights = found.evidence.log_evidence.exp()
    error = weights.std().item() / math.sqrt(len(weights))
    assert weights.mean().item() == pytest.approx(table.mean().item(), abs=4 * error)
    for lengths, axis in zip(found.filled.lengths, (1, 0), strict=True):
        share = (weights[:, None] * lengths).sum(0) / weights.sum()
        assert share.tolist() == pytest.approx((table.sum(axis) / table.sum()).tolist(), abs=0.05)


def no_token_twice(tokens: Tensor) -> Tensor:
    mask = torch.ones(V, dtype=torch.bool)
    mask[tokens[-1:]] = False
    return mask


FIRST_TWO = torch.tensor([True, True, False])
CASES = {
    "mask": ({"allowed": FIRST_TWO}, lambda x: (x < 2).all(1)),
    "function": ({"allowed": no_token_twice}, lambda x: (x[:, 1:] != x[:, :-1]).all(1)),
    "blanks": (
        {"allowed": FIRST_TWO, "prompt": torch.tensor([BLANK, 2])},
        lambda x: (x[:, 0] < 2) & (x[:, 1] == 2),
    ),
    "words": (
        {"prompt": [NONE, Gap(most=1, least=0, once=True), torch.tensor([1])]},
        lambda x: (x == 1).any(1),
    ),
}
PAIRS = [f"{name} {case}" for name in CONSTRAINED for case in CASES]
ALWAYS = ["mixd function", "mixd blanks", "mixd-mix1 mask", "mixd-mix1 words"]
ALWAYS += [f"ar {case}" for case in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("pair", mostly_nightly(PAIRS, *ALWAYS))
def test_texts_follow_their_probabilities_given_a_constraint(pair):
    name, case = pair.split()
    options, fits = CASES[case]
    model = CONSTRAINED[name]()
    joint = torch.where(fits(texts(2)), probabilities(model, SHARP_AXIS).double(), 0.0)
    found = generate(model, num_tokens=2, num=300, particles=32, generator=generator(), **options)
    assert fits(found.tokens).all()
    evidence = found.evidence.log_evidence.exp()
    error = evidence.std().item() / math.sqrt(300)
    wanted = joint.sum().item()
    assert evidence.mean().item() == pytest.approx(wanted, abs=4 * error + 0.01 * wanted)
    code = (found.tokens * V ** torch.arange(2).flip(0)).sum(-1)
    observed = torch.bincount(code, minlength=V**2).double() / 300
    assert (observed - joint / joint.sum()).abs().max() < 4 * math.sqrt(0.25 / 300)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONSTRAINED)
def test_two_words_come_in_any_order(name):
    """The first of them is neither, before either of them is there."""
    three = {
        "ar": lambda: tiny_ar(context=3, **AR),
        "mixd": lambda: tiny_flow(couplings=("mixd",), scale=0.5, **FLOW, **SHARP | {"context": 3}),
        "mixd-mix1": lambda: tiny_flow(**STACK, **FLOW, **SHARP | {"context": 3}),
    }
    model = three[name]()
    has_both = (texts(3) == 1).any(1) & (texts(3) == 2).any(1)
    joint = torch.where(has_both, probabilities(model, SHARP_AXIS).double(), 0.0)
    gap = Gap(most=1, least=0, once=True)
    template = [NONE, gap, torch.tensor([1]), gap, torch.tensor([2])]
    options = {"num": 300, "particles": 32, "generator": generator()}
    found = generate(model, num_tokens=3, prompt=template, **options)
    assert ((found.tokens == 1).any(1) & (found.tokens == 2).any(1)).all()
    evidence = found.evidence.log_evidence.exp()
    error = evidence.std().item() / math.sqrt(300)
    wanted = joint.sum().item()
    assert evidence.mean().item() == pytest.approx(wanted, abs=4 * error + 0.01 * wanted)
    code = (found.tokens * V ** torch.arange(3).flip(0)).sum(-1)
    observed = torch.bincount(code, minlength=V**3).double() / 300
    assert (observed - joint / wanted).abs().max() < 4 * math.sqrt(0.25 / 300)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [None, "ab", "a "])
def test_words_that_must_not_come_are_whole_and_weigh_the_text(prompt):
    """A word of the prompt may stay; what is drawn makes none, at the end neither."""
    model = tiny_ar(context=6, **AR)
    lm = Pretrained(model, CharTokenizer(" ab", "none"))
    request = Writing(prompt=prompt, without="Ab", length=6, num=300, particles=32, temperature=1.0)
    batches = list(Samples(request, lm).batches())
    drawn = [text for one in batches for text in one.texts]
    joint = probabilities(model).double()
    every = [lm.tokenizer.decode(text.tolist()) for text in texts(6)]
    start = len(prompt or "")
    # one that begins in the prompt and goes on is drawn
    banned = [
        any(one.end() > start for one in re.finditer(r"(?<!\w)ab(?!\w)", text)) for text in every
    ]
    fits = torch.tensor([text.startswith(prompt or "") for text in every]) & ~torch.tensor(banned)
    wanted = joint * fits
    share = torch.tensor([drawn.count(text) / 300 for text in every])
    assert (share - wanted / wanted.sum()).abs().max() < 4 * math.sqrt(0.25 / 300)
    assert not share[~fits].any()


def test_words_that_must_not_come_are_kept_out_of_what_follows_a_gap():
    lm = Pretrained(tiny_ar(context=8, **AR), CharTokenizer(" ab", "none"))
    for text in lm.fill("b [...2]b b", without=["ab", "bb"], num=20, temperature=1.0):
        assert re.fullmatch(r"b .{1,2}b b", text)
        assert not {"ab", "bb"} & set(text.split())


def test_a_rule_holds_beside_a_mask_and_ends_with_its_document():
    tokenizer = CharTokenizer(" ab", "none", has_end=True)
    lm = Pretrained(tiny_ar(vocab_size=4, context=12, scale=0.3), tokenizer)
    found = lm.write(without=["ab", "a"], num=20, temperature=1.0)
    assert not any("a" in text for text in found)
    assert min(map(len, found)) < 11
    for text in lm.write("b", contains=["a", "bb"], words=4, num=20, temperature=1.0):
        assert len(text.split()) == 4
        assert {"a", "bb"} <= set(text.split())


def test_the_usual_top_p_is_of_the_tokens_that_may_come():
    """The most probable token of a set has its probability, and the others of it none."""
    lm = Pretrained(tiny_ar(context=8, **AR), CharTokenizer(" ab", "none"))
    own = replace(lm, run=replace(lm.run, temperature=1.0, top_p=1e-3))
    greedy = own.write("a", without="b", length=8, num=5)
    assert len(set(greedy)) == 1
    assert len(set(lm.write("a", without="b", length=8, num=5))) > 1
    words = own.write("a", contains="b", length=8, num=5)
    assert all(" b" in text for text in words)
    # a temperature leaves top-p out, as everywhere
    assert len(set(own.write("a", without="b", length=8, num=5, temperature=1.0))) > 1


@pytest.mark.slow
def test_a_rough_choice_is_made_among_more_particles():
    lm = tarflowlm.load("english-mini-ar")

    def found(**options) -> tuple[list[str], Evidence]:
        request = Writing(template="x[...3]qqx", seed=2, **options)
        (written,) = Samples(request, lm).batches()
        return written.texts, written.generation.evidence

    texts, evidence = found(num=6)
    particles = evidence.particles.tolist()
    assert len(set(particles)) > 1
    assert set(particles) <= {16, 32, 64}
    assert not is_rough(evidence)[evidence.particles < 64].any()
    assert evidence.ess.tolist() == found(num=6)[1].ess.tolist()
    # whatever the others need
    row = particles.index(max(particles))
    fewer, alone = found(num=row + 1)
    assert fewer == texts[: row + 1]
    assert alone.particles.tolist() == particles[: row + 1]
    assert set(found(num=6, particles=16)[1].particles.tolist()) == {16}


def test_a_text_matches_an_expression():
    pytest.importorskip("llguidance")
    ends = Pretrained(
        tiny_ar(vocab_size=4, context=12, scale=0.3), CharTokenizer(" ab", "none", has_end=True)
    )
    plain = Pretrained(tiny_ar(context=12, **AR), CharTokenizer(" ab", "none"))
    for lm in (ends, plain):
        for text in lm.write("a", matches=r"[ab]{3} (a|bb)", num=20, temperature=1.0):
            assert re.fullmatch(r"a[ab]{3} (a|bb)", text)
        with pytest.raises(UserError, match="candidates fits"):
            lm.write("a", matches=r"[ab]{30}", particles=2)
        with pytest.raises(UserError, match=r"matches '\('.*unclosed group"):
            lm.write("a", matches="(")
    lengths = {len(text) for text in ends.write(matches="a+", num=30, temperature=1.0)}
    assert len(lengths) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "where"), [(None, r".* a(?!\w)"), (" ab", r".* a(?!\w)"), ("b a", r"b a(?!\w)")]
)
def test_words_that_a_text_must_contain_are_whole(prompt, where):
    """Neither the start of a longer word, nor one of the prompt that goes on."""
    model = tiny_ar(context=6, **AR)
    lm = Pretrained(model, CharTokenizer(" ab", "none"))
    request = Writing(prompt=prompt, contains="a", length=6, num=300, particles=32, temperature=1.0)
    batches = list(Samples(request, lm).batches())
    evidence = torch.cat([one.generation.evidence.log_evidence.exp() for one in batches])
    drawn = [text for one in batches for text in one.texts]
    joint = probabilities(model)
    every = [lm.tokenizer.decode(text.tolist()) for text in texts(6)]
    begun = torch.tensor([text.startswith(prompt or "") for text in every])
    fits = begun & torch.tensor([re.match(where, text) is not None for text in every])
    wanted = joint.double() * fits
    error = evidence.std().item() / math.sqrt(300)
    assert evidence.mean().item() == pytest.approx(wanted.sum().item(), abs=4 * error + 1e-7)
    share = torch.tensor([drawn.count(text) / 300 for text in every])
    assert (share - wanted / wanted.sum()).abs().max() < 4 * math.sqrt(0.25 / 300)


def test_a_text_may_end_after_its_constraint_and_its_gaps():
    lm = Pretrained(tiny_ar(vocab_size=4, context=8), CharTokenizer(" ab", "none", has_end=True))

    def found(request: Writing) -> tuple[list[str], list[int]]:
        batches = list(Samples(request, lm).batches())
        drawn = [text for one in batches for text in one.texts]
        return drawn, [length for one in batches for length in one.lengths]

    drawn, lengths = found(Writing(contains="a", length=8, num=60, temperature=1.0))
    assert all("a" in text.split() for text in drawn)
    # the context of 8 also holds the end of the document before it
    assert {length < 7 for length in lengths} == {True, False}
    drawn, lengths = found(Writing(template="a[...2]b", length=8, num=60, temperature=1.0))
    assert all(re.match(r"a.{1,2}b", text) for text in drawn)
    assert {length < 8 for length in lengths} == {True, False}


def test_a_usual_temperature_is_of_models_that_draw_tokens():
    lm = Pretrained(tiny_flow(couplings=("mix1",), vocab_size=3), CharTokenizer(" ab", "none"))
    lm = replace(lm, run=replace(lm.run, temperature=0.8))
    assert next(Samples(Writing(length=4), lm).batches()).texts
    with pytest.raises(UserError, match=r"temperature 0\.8: block 1 mix1 has no weights"):
        Samples(Writing(length=4, temperature=0.8), lm)


@pytest.mark.slow
@pytest.mark.parametrize("make", OPEN.values(), ids=OPEN.keys())
def test_a_constraint_counts_up_to_the_end_of_a_template(make):
    """What is drawn behind it, and not shown, neither keeps the constraint nor weighs a length."""
    model = make()
    joint = probabilities(model, WIDE_AXIS)
    template = [NONE, Gap(most=3), torch.tensor([2])]
    first_two = [(texts(4)[:, :m] < 2).all(1) & begins_with(template, m) for m in (1, 2, 3)]
    wanted = torch.stack([joint[fits].sum() for fits in first_two]).double()
    one = plan(
        model,
        template,
        Sampling(particles=64),
        num_tokens=4,
        allowed=FIRST_TWO,
        continues=False,
    )
    found = write(model, [one] * 60, row_generators(range(60), generator()))
    share = found.evidence.log_evidence.exp()[:, None] * found.filled.lengths[0] * 3
    error = share.std(0) / math.sqrt(len(share))
    assert ((share.mean(0) - wanted).abs() < 4 * error + 2e-3).all()


def test_the_first_token_of_a_gap_is_one_that_may_begin_it():
    begins = torch.tensor([False, False, True])
    template = [torch.tensor([0]), Gap(most=2, begins=begins), torch.tensor([1])]
    for make in OPEN.values():
        found = generate(make(), num_tokens=4, num=20, prompt=template, generator=generator())
        assert (found.tokens[:, 1] == 2).all()
        for row, given in zip(found.tokens, found.filled.given, strict=True):
            assert row[given].tolist() == [0, 1]


def test_samples_of_a_template_do_not_depend_on_each_other():
    template = [torch.tensor([0]), Gap(most=2), torch.tensor([1])]
    for make in OPEN.values():
        streams = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        both = generate(make(), num_tokens=4, num=2, prompt=template, generator=streams)
        alone = generate(
            make(),
            num_tokens=4,
            prompt=template,
            generator=[torch.Generator().manual_seed(6)],
        )
        assert torch.equal(both.tokens[1:], alone.tokens)
        torch.testing.assert_close(both.filled.lengths[0][1:], alone.filled.lengths[0])


def never_the_first(model):
    """All tokens but the one that the model would begin with."""
    begins = generate(model, num_tokens=1, top_k=1, generator=generator()).tokens[0]
    mask = torch.ones(V, dtype=torch.bool).index_fill(0, begins, False)
    return lambda tokens: mask if len(tokens) == 0 else ~mask | mask


def test_a_mask_may_be_an_array():
    model = OPEN["ar"]()
    for mask in (FIRST_TWO, lambda tokens: FIRST_TWO):
        array = (lambda tokens: FIRST_TWO.numpy()) if callable(mask) else mask.numpy()
        texts = [
            generate(model, num_tokens=4, num=2, allowed=one, generator=generator()).tokens
            for one in (mask, array)
        ]
        assert torch.equal(*texts)


def test_what_no_particle_fits_and_models_without_weights_are_refused():
    model = OPEN["ar"]()
    free = torch.ones(V, dtype=torch.bool)
    impossible = {"allowed": lambda tokens: free & (len(tokens) < 2)}
    refused = [
        (model, impossible, "candidates fits: raise the particles"),
        *(
            (
                make(),
                {"allowed": never_the_first(make())} | limit,
                f"fits: {remedy}, raise the part",
            )
            for make in OPEN.values()
            for limit, remedy in (({"top_k": 1}, "raise top-k"), ({"top_p": 1e-6}, "raise top-p"))
        ),
        (model, {"prompt": [Gap(most=1, least=2), torch.tensor([1])]}, "least <= most"),
        (model, {"allowed": free.long()}, "boolean mask of shape"),
        (model, {"allowed": free.long().numpy()}, "boolean mask of shape"),
        (model, {"allowed": free[1:].numpy()}, "boolean mask of shape"),
        (model, {"allowed": lambda tokens: tokens}, "boolean mask of shape"),
        (model, {"allowed": free, "num_tokens": 9}, "at most the context of 4"),
        (model, {"prompt": [Gap(most=4), torch.tensor([1])]}, "leaves no room"),
        (tiny_flow(couplings=("mix1",)), {"prompt": [Gap(most=2)]}, "block 1 mix1"),
        (tiny_ar(patch=2), {"prompt": [Gap(most=2)]}, "patch 2"),
    ]
    for wrong, options, words in refused:
        with pytest.raises(UserError, match=words):
            generate(wrong, **({"num_tokens": 4} | options))
