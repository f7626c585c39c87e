"""Drafts change how fast block 1 is inverted, and never the result."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from tarflowlm.draft import Draft, DraftConfig
from tarflowlm.editing import encode, renoise
from tarflowlm.errors import UserError
from tarflowlm.generation import drafted, generate
from tarflowlm.generation.drafted import invert_with_drafts
from tarflowlm.generation.inversion import invert_block
from tarflowlm.generation.lookahead import Lookahead
from tarflowlm.language_model import seeded

SMALL = DraftConfig(width=8, hidden=16, past=2, ahead=4)


def drafting(model, config=SMALL):
    """The model in float32 with a random draft."""
    with seeded(7):
        draft = model.new_draft(config)
        for parameter in draft.parameters():
            nn.init.normal_(parameter, std=0.5)
    model.float().use_draft(draft)
    return model


def texts(model, decoder, **settings):
    settings = {"num_tokens": model.config.context, "num": 3} | settings
    return generate(model, decoder=decoder, generator=torch.Generator().manual_seed(3), **settings)


class Oracle(Draft):
    """A draft that knows the text with these tokens [B, N, P] and latents h [B, N, C]."""

    def __init__(self, model, h, config=SMALL):
        nn.Module.__init__(self)
        self.config = config
        with torch.no_grad():
            features = model.prior.block(0).features_of(None, h, first=True)
        # the last features belong to the position behind the text
        self.known, self.length = features.flatten(0, 1), features.shape[1]

    def start(self, features):
        return (features[:, -1, None] - self.known).abs().amax(-1).argmin(-1)

    def steps(self):
        return self.step

    def step(self, state, features, z):
        state = (state + 1).clamp(max=len(self.known) - 1)
        return state, self.known[state]


def latents(generation):
    return generation.states[-1]


@pytest.mark.parametrize("couplings", [("mixd",), ("mixd", "mix1", "mix1"), ("mix1", "mix1")], ids="-".join)
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("log_std", [-0.5, -6.0])
def test_drafted_equals_steps(couplings, patch, log_std, tiny_flow):
    model = drafting(tiny_flow(couplings=couplings, patch=patch, context=32, log_std=log_std))
    slow, fast = texts(model, "sequential"), texts(model, "drafted")
    assert torch.equal(slow.tokens, fast.tokens)
    assert fast.decoders[-1] == "drafted"
    assert 1 <= fast.sweeps[-1] <= 2 * 32 // patch
    assert torch.equal(texts(model, "auto").tokens, slow.tokens)


@pytest.mark.parametrize("patch", [1, 2])
def test_latents_equal_those_of_steps(patch, tiny_flow, normal):
    model = drafting(tiny_flow(couplings=("mixd",), patch=patch, context=32)).double()
    model.use_draft(model.draft.double())
    u = normal(5, 32 // patch, 2 * patch)
    with torch.no_grad():
        expected = invert_block(model.prior.block(0), u).h
        found = invert_with_drafts(model, u)
    torch.testing.assert_close(found.h, expected, rtol=1e-8, atol=1e-8)
    assert found.repeated == 0


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.7}, {"top_k": 2}, {"top_p": 0.8, "temperature": 1.3}], ids=["tau", "k", "p"]
)
@pytest.mark.parametrize("patch", [1, 2])
def test_adjusted_weights_are_verified_too(settings, patch, tiny_flow):
    model = drafting(tiny_flow(couplings=("mixd", "mix1"), patch=patch, context=32, log_std=-6.0))
    slow, fast = (texts(model, decoder, **settings) for decoder in ("sequential", "drafted"))
    assert torch.equal(slow.tokens, fast.tokens)
    assert fast.decoders[-1] == "drafted"
    assert not torch.equal(slow.tokens, texts(model, "sequential").tokens)


@pytest.mark.parametrize("prompt", [1, 2, 5, 31])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_prompt_stands_and_drafts_follow(prompt, patch, blocks, tiny_flow):
    model = drafting(tiny_flow(couplings=("mixd", "mix1")[:blocks], patch=patch, context=32, log_std=-6.0))
    given = torch.arange(prompt) % 5
    slow, fast = (texts(model, decoder, prompt=given) for decoder in ("sequential", "drafted"))
    assert torch.equal(slow.tokens, fast.tokens)
    torch.testing.assert_close(slow.log_evidence, fast.log_evidence, rtol=1e-4, atol=1e-4)
    assert fast.decoders[-1] == ("sequential" if prompt == 31 and patch == 2 else "drafted")
    warm = [texts(model, decoder, prompt=given, temperature=0.6).tokens for decoder in ("sequential", "drafted")]
    assert torch.equal(*warm)


def test_tokens_given_further_right_ask_for_steps(tiny_flow):
    model = drafting(tiny_flow(couplings=("mixd", "mix1"), context=16, log_std=-6.0))
    template = torch.tensor([1, 2, -1, -1, 3])
    slow, fast = (texts(model, decoder, template=template) for decoder in ("sequential", "drafted"))
    assert torch.equal(slow.tokens, fast.tokens)
    assert fast.decoders[-1] == "sequential"
    assert texts(model, "drafted", prompt=template[:2], particles=2).decoders[-1] == "sequential"


def test_a_draft_that_knows_the_text_takes_few_passes(tiny_flow, monkeypatch):
    # the clock would choose how far to look ahead
    monkeypatch.setattr(Lookahead, "choose", lambda self, rows: 4)
    model = tiny_flow(couplings=("mixd",), context=64, log_std=-6.0).float()
    slow = texts(model, "sequential", return_passes=True)
    model.use_draft(Oracle(model, latents(slow)))
    fast = texts(model, "drafted", return_rounds=True)
    assert torch.equal(slow.tokens, fast.tokens)
    assert len(fast.rounds) == fast.sweeps[0]
    assert fast.sweeps[0] < 64 / 2.5
    # what is final never changes
    for before, after in zip(fast.rounds, fast.rounds[1:], strict=False):
        for row, final in enumerate(before.final.tolist()):
            assert after.final[row] >= final
            assert torch.equal(before.tokens[row, :final], slow.tokens[row, :final])
    assert torch.equal(fast.rounds[-1].tokens, slow.tokens)


def test_rows_do_not_depend_on_each_other(tiny_flow):
    """One row is done early, as its draft knows the text; it leaves the batch, and the others go on."""
    model = tiny_flow(couplings=("mixd",), context=64, log_std=-6.0).float()
    slow = texts(model, "sequential", return_passes=True)
    wrong = model.codebook.encode((slow.tokens + 1) % 5, torch.zeros_like(latents(slow)))
    half = torch.where(torch.tensor([True, False, False])[:, None, None], latents(slow), wrong)
    model.use_draft(Oracle(model, half))
    assert torch.equal(texts(model, "drafted").tokens, slow.tokens)


def test_progress_is_told_once_per_position(tiny_flow):
    model, ticks = drafting(tiny_flow(couplings=("mixd", "mix1"), context=32)), []
    texts(model, "drafted", tick=lambda: ticks.append(1))
    assert len(ticks) == 2 * 32
    ticks.clear()
    texts(model, "drafted", prompt=torch.tensor([1, 2, 3]), tick=lambda: ticks.append(1))
    assert len(ticks) == 2 * 32


def test_a_position_that_was_taken_for_final_is_inverted_again(tiny_flow, normal, monkeypatch):
    """If everything counts as unchanged at once, the way back to the noise shows it."""
    model = drafting(tiny_flow(couplings=("mixd",), context=32)).double()
    model.use_draft(model.draft.double())
    u = normal(2, 32, 2)
    monkeypatch.setitem(drafted.TOLERANCE, torch.float64, 1e9)
    with torch.no_grad():
        found, expected = invert_with_drafts(model, u), invert_block(model.prior.block(0), u).h
    assert 0 < found.repeated < 32
    torch.testing.assert_close(found.h, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("by_position", "expected"), [(0.0, "drafted"), (1e3, "sequential")], ids=["passes are cheap", "positions cost"]
)
def test_auto_takes_the_quicker_way(by_position, expected, tiny_flow, monkeypatch):
    """The clock decides: a pass costs one unit, and more for every position."""
    model = tiny_flow(couplings=("mixd",), context=64, log_std=-6.0).float()
    slow, clock = texts(model, "sequential", num=1, return_passes=True), [0.0]
    wrong = model.codebook.encode((slow.tokens + 1) % 5, torch.zeros_like(latents(slow)))
    model.use_draft(Oracle(model, wrong if by_position else latents(slow)))
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    original = drafted._Drafting._pass

    def timed(self, n):
        clock[0] += 1 + by_position * n
        return original(self, n)

    monkeypatch.setattr(drafted._Drafting, "_pass", timed)
    found = texts(model, "auto", num=1)
    assert found.decoders == (expected,)
    assert torch.equal(found.tokens, slow.tokens)


@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize("decoder", ["drafted", "auto"])
def test_edits_are_drafted_too(strength, decoder, tiny_flow):
    model, ticks = drafting(tiny_flow(couplings=("mixd", "mix1"), context=16, log_std=-6.0)), []

    def edited(decoder, tick=None):
        text = encode(model, torch.arange(12)[None] % 5, generator=torch.Generator().manual_seed(0))
        random = torch.Generator().manual_seed(1)
        return renoise(model, text, level=2, strength=strength, generator=random, decoder=decoder, tick=tick)

    slow = edited("sequential")
    fast = edited(decoder, tick=lambda: ticks.append(1))
    assert torch.equal(slow.tokens, fast.tokens)
    assert len(ticks) == 2 * 12


def test_a_model_without_a_draft_says_so(tiny_flow):
    model = tiny_flow(couplings=("mixd", "mix1")).float()
    with pytest.raises(UserError, match="the model has no draft; train one with `tarflowlm draft`"):
        texts(model, "drafted")
    with pytest.raises(UserError, match="only block 1 can be drafted"):
        texts(drafting(model), ("drafted", "sequential"))


def test_looking_ahead_follows_what_was_accepted_and_what_it_costs():
    bold, shy, middle = Lookahead(8), Lookahead(8), Lookahead(8)
    for _ in range(50):
        bold.accepted(8, [8])
        shy.accepted(8, [0])
        middle.accepted(8, [3])
    assert bold.choose(1) == 8
    assert shy.choose(1) == 1
    assert middle.choose(1) == 3
    # positions of many rows cost more than a pass
    assert bold.choose(640) == 1
    undecided = Lookahead(8)
    assert undecided.choose(64) < undecided.choose(1)


@pytest.mark.parametrize("base", [1.0, 100.0])
def test_what_passes_cost_is_fitted(base):
    ahead = Lookahead(8)
    for n in (1, 9) * 40:
        ahead.took(base + 1.0 * n, n)
        ahead.drafted(0.5)
    found, slope, drafting = ahead.costs()
    assert 0.5 * base < found < 3 * base
    assert 0.5 < slope < 1.5
    assert drafting == pytest.approx(0.5)


def test_rounds_are_refused_where_there_are_none(tiny_flow, tiny_ar):
    model = drafting(tiny_flow(couplings=("mixd", "mix1"), context=16, log_std=-6.0))
    with pytest.raises(UserError, match="rounds: a baseline has no drafts"):
        texts(tiny_ar(context=16), "sequential", return_rounds=True)
    for settings in ({"particles": 2, "prompt": torch.tensor([1])}, {"template": torch.tensor([1, -1, 2])}):
        with pytest.raises(UserError, match="rounds: only drafts have them"):
            texts(model, "drafted", return_rounds=True, **settings)
    with pytest.raises(UserError, match="every window has rounds of its own"):
        texts(model, "drafted", return_rounds=True, num_tokens=20)


def test_what_is_final_never_moves_back(tiny_flow):
    model = drafting(tiny_flow(couplings=("mixd", "mix1"), context=32, log_std=-6.0))
    rounds = texts(model, ("sequential", "auto"), num=6, return_rounds=True).rounds
    for before, after in pairwise(rounds):
        assert (after.final >= before.final).all()
