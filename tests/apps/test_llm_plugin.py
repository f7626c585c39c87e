"""The models in the command line `llm`: the texts of `stream`, and its refusals."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tarflowlm
from tarflowlm.errors import UserError

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
MODULE = PROJECT["project"]["entry-points"]["llm"]["tarflowlm"]

llm = pytest.importorskip("llm")


@pytest.fixture(scope="module")
def model():
    from tarflowlm_apps.llm_plugin import register_models

    found = []
    register_models(found.append)
    return found[0]


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "the king", "length": 24},
        {"prompt": "", "length": 16, "temperature": 0.7, "top_k": 9, "top_p": 0.9},
        {"prompt": "the king", "length": 24, "contains": "a dog", "without": "z"},
        {"prompt": "", "template": "the [...3] of the land"},
    ],
)
def test_texts_are_those_of_the_package(model, options):
    response = model.prompt(**options, model="english-mini-ar", seed=3)
    how = {name: value for name, value in options.items() if value != ""}
    pieces = list(response)
    assert "".join(pieces) == tarflowlm.load("english-mini-ar").write(**how, seed=3)
    assert ("template" in options or "contains" in options) == (len(pieces) == 1)


def test_a_text_without_a_seed_can_be_written_again(model):
    how = {"model": "english-mini-ar", "length": 24}
    first, second = (model.prompt("the", **how) for _ in range(2))
    assert first.text() != second.text()
    assert model.prompt("the", **how, **first.response_json).text() == first.text()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"top_p": 3}, "top_p 3"),
        ({"length": 0}, "length 0"),
        ({"template": "the [...]"}, "template with prompt"),
        ({"model": "no-such"}, "no-such"),
        ({"system": "Be brief."}, "system"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(model, options, named):
    with pytest.raises(UserError, match=named) as refused:
        model.prompt("the", **{"model": "english-mini-ar"} | options).text()
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_llm_starts_without_torch():
    code = f"import sys, {MODULE}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
