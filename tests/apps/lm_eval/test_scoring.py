"""Scoring for lm-evaluation-harness: likelihoods equal `evaluate`, continuations equal
`generate`.
"""

import pytest
import torch

from helpers import tiny_ar, tiny_flow
from tarflowlm.data import TEXT8_ALPHABET, CharTokenizer
from tarflowlm.errors import Progress
from tarflowlm.evaluation.likelihood import evaluate
from tarflowlm.generation import generate
from tarflowlm.objective import conditional_bound
from tarflowlm.pretrained import Pretrained, load
from tarflowlm.requests import Writing
from tarflowlm_apps.lm_eval.scoring import Piece, TextScorer

TEXT = " the quick brown fox jumps over the lazy dog and so on"
TOKENIZER = CharTokenizer(TEXT8_ALPHABET)


class Count(Progress):
    done = 0
    total: int | None = None

    def stage(self, name, total=None, done=0):
        self.total = total

    def advance(self, count=1):
        self.done += count


@pytest.fixture
def scorer():
    def build(kind: str, *, samples: int = 1, patch: int = 1, seed: int = 0) -> TextScorer:
        fields = {"vocab_size": 27, "context": 16, "patch": patch}
        couplings = {"one": ("mixd",), "two": ("mixd", "mix1")}
        model = (
            tiny_ar(**fields) if kind == "ar" else tiny_flow(couplings=couplings[kind], **fields)
        )
        return TextScorer(Pretrained(model, TOKENIZER), samples=samples, seed=seed)

    return build


@pytest.mark.parametrize(("kind", "samples"), [("ar", 1), ("one", 1), ("two", 3)])
def test_rolling_log_likelihood_equals_evaluate(scorer, kind, samples):
    s = scorer(kind, samples=samples, seed=4)
    windows = s.encode(TEXT)[:48].view(3, 16)
    result = evaluate(
        s.model, windows, torch.from_numpy(TOKENIZER.characters_per_token), samples=samples, seed=4
    )
    expected = -48 * result.nats_per_token
    assert s.rolling([TEXT[:48]]) == pytest.approx([expected])
    assert sum(s.rolling([TEXT[:16], TEXT[16:48]])) == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "patch"), [("ar", 1), ("two", 1), ("ar", 2), ("one", 2)])
def test_rest_of_a_text_is_a_window_of_its_own(scorer, kind, patch):
    s, progress = scorer(kind, patch=patch), Count()
    head, tail = 4 * " abcdefg", " the end"[:7]
    texts = [head, tail, "", head + tail]
    whole, rest, nothing, both = s.rolling(texts, progress)
    assert nothing == 0.0
    if kind == "ar":  # the windows of a flow differ in their noise
        assert whole + rest == pytest.approx(both)
    assert s.rolling([tail]) == pytest.approx([rest])
    assert progress.done == progress.total == (2 + 1) + 1 + 1 + (2 + 1)


@pytest.mark.parametrize("patch", [1, 2])
def test_baseline_obeys_the_chain_rule_and_finds_greedy_tokens(scorer, patch):
    s = scorer("ar", patch=patch)
    tokens = s.encode(TEXT[:15])
    pieces = [Piece(tokens, 0), Piece(tokens[:7], 0), Piece(tokens, 7)]
    whole, first, second = (value for value, _ in s.conditional(pieces))
    assert first + second == pytest.approx(whole)
    (text,) = s.complete([(TEXT[:6], Writing(max_new_tokens=4, top_k=1))])
    assert s.conditional([Piece(s.encode(TEXT[:6] + text), 6)])[0][1]
    assert not s.conditional([Piece(s.encode(TEXT[:6] + text[:3] + "zq"[text[3] == "z"]), 6)])[0][1]


def test_flows_are_scored_by_bounds_under_common_noise(scorer):
    for kind in ("one", "two"):
        s = scorer(kind)
        tokens, noise = s.encode(TEXT[:12])[None], s.noise[0][:, :12]
        if kind == "one":
            bound = conditional_bound(s.model, tokens, 5, noise)
        else:
            head = s.model.bound(tokens[:, :5], noise[:, :5])
            bound = s.model.bound(tokens, noise) - head
        ((value, greedy),) = s.conditional([Piece(tokens[0], 5)])
        assert (value, greedy) == (pytest.approx(-bound.item()), False)


def test_scores_do_not_depend_on_other_requests(scorer):
    s = scorer("two", samples=2)
    pieces = [s.encode_pair(TEXT[:i], TEXT[i : i + 3]) for i in (4, 8, 4, 0)]
    together = s.conditional(pieces)
    for piece, (value, _) in zip(pieces, together, strict=True):
        assert s.conditional([piece])[0][0] == pytest.approx(value)


@pytest.mark.parametrize(("kind", "patch"), [("ar", 1), ("two", 1), ("one", 2)])
@pytest.mark.parametrize("given", [0, 3, 20, 40])
def test_every_token_is_scored_once_in_windows_that_fit(scorer, kind, patch, given):
    s = scorer(kind, patch=patch)
    pieces = s.pieces(torch.arange(50), given)
    scored = torch.cat([piece.tokens[piece.given :] for piece in pieces])
    assert scored.tolist() == list(range(given, 50))
    assert all(-(-len(piece.tokens) // patch) * patch <= 16 for piece in pieces)
    assert all(piece.given % patch == 0 for piece in pieces) or kind == "ar"
    assert all((piece.tokens.diff() == 1).all() for piece in pieces)
    ((value, _),) = s.conditional([Piece(s.encode(TEXT[:50]), given)])
    assert value < 0


@pytest.mark.parametrize(
    ("context", "continuation", "given", "text"),
    [
        ("Answer:", " Yes!", 6, "answer yes"),
        ("Answer: ", "Yes", 6, "answer yes"),
        ("", "Yes", 0, "yes"),
        ("the ca", "ts", 6, "the cats"),
        ("a", "…", 1, "a"),
        ("…", "…", 0, ""),
    ],
)
def test_context_and_continuation_are_normalised_together(
    scorer, context, continuation, given, text
):
    pair = scorer("ar").encode_pair(context, continuation)
    assert (TOKENIZER.decode(pair.tokens), pair.given) == (text, given)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ar", "two"])
def test_continuations_equal_generate(scorer, kind):
    s = scorer(kind)
    how = Writing(max_new_tokens=5, top_k=1)
    prompt = s.encode("the q")
    found = generate(
        s.model, num_tokens=10, prompt=prompt, top_k=1, generator=torch.Generator().manual_seed(0)
    )
    text = TOKENIZER.decode(found.tokens[0, 5:])
    progress = Count()
    asked = [
        ("The q", how),
        ("Long before this ", Writing(max_new_tokens=20, top_k=1)),
        ("The q", how),
    ]
    first, long, third = s.complete(asked, progress)
    assert first == text
    assert len(long) == 20
    assert progress.done == 3
    assert third == first
    stop = Writing(max_new_tokens=5, top_k=1, stop=("\n", text[2]))
    assert s.complete([("The q", stop)]) == [text[: text.index(text[2])]]
    # a stop is read as the texts are; a line end means nothing to this model
    shouted = Writing(max_new_tokens=5, top_k=1, stop=("\n", text[2:4].upper()))
    assert s.complete([("The q", shouted)]) == [text[: text.index(text[2:4])]]


def test_stops_of_tasks_are_those_that_a_model_can_write(scorer):
    """Markup is none for a model of letters."""
    given = ["Question:", "</s>", "<|im_end|>", "\n\n", "the end"]
    assert scorer("ar")._stops(given) == ("Question:", "the end")


def test_a_token_in_which_both_texts_meet_is_scored():
    lm = load("english-small")
    scorer = TextScorer(lm)
    pair = scorer.encode_pair("The ki", "ng")
    assert lm.decode(pair.tokens) == "The king"
    assert pair.given < len(pair.tokens)
    nothing = Piece(pair.tokens, len(pair.tokens))
    (nats, _), (empty, is_greedy) = scorer.conditional([pair, nothing])
    assert nats < 0.0
    assert (empty, is_greedy) == (0.0, False)


def test_a_continuation_begins_after_the_space_of_its_context():
    scorer = TextScorer(load("english-small-ar"))
    how = Writing(max_new_tokens=4, top_k=1)
    found = scorer.complete([("The old", how), ("The old ", how)])
    assert found[0] == f" {found[1]}"
