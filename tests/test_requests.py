"""Requests: Python, the command line and the request objects give the same texts and bits."""

import json
import time

import pytest
import torch

import tarflowlm
from helpers import mostly_nightly, tiny_flow
from tarflowlm.cli.main import command_module
from tarflowlm.cli.options import parse
from tarflowlm.data import TEXT8_ALPHABET, CharTokenizer
from tarflowlm.editing.edits import edit
from tarflowlm.errors import UserError
from tarflowlm.evaluation.scores import score_texts
from tarflowlm.generation.texts import Samples, write_texts
from tarflowlm.requests import Edit, Evaluation, Score, Writing, as_texts

TEXT = "The King of the land gave 3 laws to the people"


@pytest.fixture(scope="module")
def flow() -> tarflowlm.Pretrained:
    return tarflowlm.load("english-mini")


@pytest.mark.slow
def test_pieces_of_an_edit_are_read_as_the_text_is(flow):
    assert flow.edit(TEXT, rewrite="King", seed=1) == flow.edit(TEXT, rewrite="king", seed=1)
    assert "lord" in flow.edit(TEXT, replace=("King", "Lord"))


def test_a_stream_stops_where_its_stop_is_read(flow):
    whole = flow.write("The King", length=26, seed=3)
    stop = whole[20:24]
    shown = "".join(flow.stream("The King", length=26, seed=3, stop=stop.upper()))
    assert shown == whole[: whole.index(stop, 8)]
    assert flow.write("The King", length=26, seed=3, stop=stop.upper()) == shown


def test_a_stop_and_words_that_are_read_differently_are_named(flow):
    samples = Samples(Writing("at", contains="Café", length=20), flow)
    assert samples.notices == ["contains read as: caf"]
    samples = Samples(Writing("At", stop=("at", "Once"), length=20), flow)
    assert samples.notices == ["read as: at", "stop read as: once"]


@pytest.mark.parametrize("kind", ["prompt", "template"])
def test_the_time_of_reading_texts_is_not_their_number_squared(flow, kind):
    def seconds(count: int) -> float:
        text = "the king" if kind == "prompt" else "the _"
        request = Writing(**{kind: [text] * count})
        begun = time.process_time()
        Samples(request, flow)
        return time.process_time() - begun

    seconds(10)
    # 8 times as many; squared it would be 64
    assert min(seconds(2000) for _ in range(3)) < 24 * min(seconds(250) for _ in range(3))


def test_the_command_of_a_text_that_looks_like_an_option():
    request = Writing(prompt="-hello", stop=("--", "b"))
    expected = ["--prompt=-hello", "--stop=--", "--stop", "b"]
    assert request.command("m") == ["tarflowlm", "sample", "m", *expected]


def test_an_array_is_a_mask_of_a_request(flow):
    mask = torch.ones(27, dtype=torch.bool)
    mask[5] = False
    options = {"length": 12, "particles": 4, "seed": 1}
    assert Writing(allowed=mask.numpy()).given() == {"allowed"}
    assert flow.write("The", allowed=mask.numpy(), **options) == flow.write(
        "The", allowed=mask, **options
    )


PARSED = {
    "one of a list": Writing(prompt=("a b",), length=8),
    "several stops": Writing(prompt="a", stop=("b c", "-d"), stop_at_end=False),
    "dashes": Writing(template="- _", blank="_", temperature=0.5),
    "replace": Edit(text="a b", replace=("a", "b c")),
    "rewrite": Edit(text="-a b", rewrite=("-a", "b")),
    "score": Score(text="a b", samples=2),
    "scores": Score(text=("a b", "-c")),
    "words": Writing(prompt="a", contains=("b", "c d"), without=("e", "-f"), sentences=2),
    "regex": Writing(matches="[a-z]+", length=8),
    "evaluation": Evaluation(data="a b\nc", split="all"),
}


@pytest.mark.parametrize("name", PARSED)
def test_the_command_of_a_request_is_read_as_the_request(name):
    request = PARSED[name]
    _, command, *words = request.command("english-mini")
    args = parse(command_module(command).Args, words, command)
    found = args if isinstance(request, Evaluation) else getattr(args, KINDS[type(request)])
    assert all(
        as_texts(theirs) == as_texts(ours)
        if tuple in (type(ours), type(theirs))
        else theirs == ours
        for theirs, ours in ((getattr(found, one), getattr(request, one)) for one in vars(request))
    )


KINDS = {Writing: "writing", Edit: "edit", Score: "score"}
"""The field of the arguments of a command with its request."""


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (Writing, {"prompt": ("a b", "c")}, "prompt of 2 texts .*of each"),
        (Writing, {"template": ("_b", "c_")}, "template of 2 texts .*of each"),
        (Writing, {"prompt": ()}, "prompt of 0 texts"),
        (Evaluation, {"data": ("a", "b")}, "data of 2 texts .*of each"),
        (Writing, {"allowed": torch.ones(27, dtype=torch.bool)}, "allowed .*leave it out"),
    ],
)
def test_what_no_command_says_is_refused(kind, given, words):
    with pytest.raises(UserError, match=words):
        kind(**given).command("m")


def test_words_that_the_prompt_holds_ask_for_no_particles(flow):
    found = [
        Samples(Writing("the king", contains=words), flow).plans[0].particles
        for words in ("king", "lord", "kin")
    ]
    assert found == [1, 16, 16]


def test_a_prompt_is_continued_alike_beside_prompts_of_other_lengths():
    """Also in a stack that continues it exactly, where rows of one batch have one length."""
    model = tiny_flow(
        couplings=("mixd", "mixd"), alternate=False, vocab_size=27, context=16, channel_mix=None
    )
    lm = tarflowlm.Pretrained(model.float(), CharTokenizer(TEXT8_ALPHABET))
    both = lm.write(["the", "the king"], length=14, seed=1)
    assert both[0] == lm.write("the", length=14, seed=1)
    given = torch.tensor([[1, 2, -1], [1, -1, -1]])
    with pytest.raises(UserError, match=r"1 to 2 tokens.*call it for each"):
        tarflowlm.generate(model, num_tokens=8, num=2, prompt=given)


def test_a_function_of_tokens_sees_those_of_the_text():
    """Not the end of the document before, with which a model of documents begins."""
    tokenizer = CharTokenizer(TEXT8_ALPHABET, "none", has_end=True)
    model = tiny_flow(couplings=("mixd",), vocab_size=28, context=16).float()
    lengths = []

    def allowed(tokens):
        lengths.append(len(tokens))
        return torch.arange(28) < 27

    text = tarflowlm.Pretrained(model, tokenizer).write(length=5, allowed=allowed, particles=1)
    assert (lengths, len(text)) == ([0, 1, 2, 3, 4], 5)


CASES = {
    "prompt": (
        Writing(prompt="The King", length=16, seed=3, num=2),
        lambda lm: lm.write("The King", length=16, seed=3, num=2),
    ),
    "template": (
        Writing(template="The _ of 2 Kings", temperature=0.8, particles=4),
        lambda lm: lm.fill("The _ of 2 Kings", temperature=0.8, particles=4),
    ),
    "stop": (
        Writing(prompt="The King", length=60, stop=("TH",), seed=5),
        lambda lm: lm.write("The King", length=60, stop="TH", seed=5),
    ),
    "words": (Edit(text=TEXT, words=2, seed=4), lambda lm: lm.edit(TEXT, words=2, seed=4)),
    "rewrite": (
        Edit(text=TEXT, rewrite=("King", "Laws"), num=2, candidates=8),
        lambda lm: lm.edit(TEXT, rewrite=("King", "Laws"), num=2, candidates=8),
    ),
    "replace": (
        Edit(text=TEXT, replace=("King", "Old Queen"), seed=1),
        lambda lm: lm.edit(TEXT, replace=("King", "Old Queen"), seed=1),
    ),
    "everywhere": (
        Edit(text=TEXT, rewrite=("the",), everywhere=True, candidates=8),
        lambda lm: lm.edit(TEXT, rewrite="the", everywhere=True, candidates=8),
    ),
    "level": (
        Edit(text="3 laws", level=1, strength=0.3, seed=6),
        lambda lm: lm.edit("3 laws", level=1, strength=0.3, seed=6),
    ),
    "score": (
        Score(text=TEXT, samples=3, seed=2),
        lambda lm: lm.score(TEXT, samples=3, seed=2),
    ),
}


def shown_by_command(run, request) -> object:
    """What the command of a request prints: its texts, or its bits."""
    command = request.command("english-mini")
    result = run(*command[1:], "--json")
    assert result.status == 0, result.err
    found = json.loads(result.out.splitlines()[-1])
    if isinstance(request, Score):
        return found["bits"]
    return [one["text"] for one in found["samples" if isinstance(request, Writing) else "edits"]]


@pytest.mark.parametrize("name", mostly_nightly(CASES, "prompt", "template", "score", "level"))
def test_python_and_command_line_give_the_same(flow, run, name):
    request, call = CASES[name]
    by_python = call(flow)
    if isinstance(request, Score):
        by_request = score_texts(request, flow)
        assert by_python.total == by_request[0].total == shown_by_command(run, request)
        return
    texts = edit(request, flow).texts if isinstance(request, Edit) else write_texts(request, flow)
    by_python = [by_python] if isinstance(by_python, str) else by_python
    assert by_python == texts == shown_by_command(run, request)
