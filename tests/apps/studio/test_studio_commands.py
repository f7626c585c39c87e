"""The command above a result gives that result."""

import json
import re
import shlex

import pytest
from studio_cases import shown, stages, words

from tarflowlm_apps.studio.catalogue import Catalogue
from tarflowlm_apps.studio.edit import change, rewrite
from tarflowlm_apps.studio.score import compare
from tarflowlm_apps.studio.write import infill, write

TEXT = "The King of the land gave 3 laws to the King"
REQUESTS = [
    (write, "", "The King", 24, 0.8, 0.9, 2, 3, "", ""),
    (infill, "The [...3] of 2 Kings", 2, 4, 0.9, 7),
    (rewrite, TEXT, "King, Laws", 2, 4),
    (change, TEXT, "words", 0.3, 2, 5),
    pytest.param((write, "", "", 24, 1.0, 1.0, 1, 0, "", ""), marks=pytest.mark.nightly),
    pytest.param((infill, "The ___ of 2 Kings", 2, 4, 0.9, 7), marks=pytest.mark.nightly),
    pytest.param((change, TEXT, "noise", 0.3, 2, 6), marks=pytest.mark.nightly),
]


@pytest.fixture(scope="module")
def models() -> Catalogue:
    return Catalogue(["english-mini", "english-mini-ar"])


def printed(run, html: str) -> dict:
    """What the command above a result prints with --json."""
    (command,) = re.findall(r"<code>(.*?)</code>", html)
    program, *argv = shlex.split(words(command))
    assert program == "tarflowlm"
    result = run(*argv, "--json")
    assert result.status == 0, result.err
    return json.loads(result.out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("request_", REQUESTS, ids=lambda values: values[0].__name__)
def test_command_writes_the_same_texts(models, run, request_):
    view, *values = request_
    html = shown(view, models, ["english-mini", *values])
    found = printed(run, html)
    texts = [one["text"] for one in found.get("samples") or found["edits"]]
    texts_on_page = stages(html)
    if view is infill:
        # the page merges equal texts and sorts them by weight
        assert set(texts) == set(texts_on_page)
    else:
        assert texts_on_page[-len(texts) :] == texts


def test_command_scores_the_same_bits(models, run):
    html = shown(compare, models, [["english-mini", "english-mini-ar"], TEXT])
    on_page = re.findall(r"<b>≤? ?([\d.]+)</b> bits in all", html)
    found = printed(run, html)
    bits = [found["bits"], found["baseline"]["bits"]]
    assert on_page == [f"{value:.1f}" for value in bits]
