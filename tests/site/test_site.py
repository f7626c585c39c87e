"""The site shows what GitHub shows: links, lists, the notebook, docstrings."""

import importlib.util
import json
from pathlib import PurePosixPath

import pytest

from docs_cases import ROOT

pytest.importorskip("mkdocstrings")

REPOSITORY = "https://x.org/a/b"


def part(name: str):
    """A file of the site as a module; it is in no package."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    return part("hooks")


@pytest.mark.parametrize(
    ("link", "source", "page", "expected"),
    [
        # pages and pictures of the site
        ("docs/math.md#symbols", "README.md", "index.md", "math.md#symbols"),
        ("docs/passes.png", "README.md", "index.md", "passes.png"),
        ("../reproduce.md", "docs/reproduce/fig2.md", "reproduce/fig2.md", "../reproduce.md"),
        ("fig2.png", "docs/reproduce/fig2.md", "reproduce/fig2.md", "../reproduce/fig2.png"),
        ("../CONTRIBUTING.md", "docs/log.md", "log.md", "contributing.md"),
        ("tutorial.ipynb", "docs/tour.md", "tour.md", "tutorial.md"),
        # files and folders of the repository
        (
            "../src/tarflowlm/model.py",
            "docs/math.md",
            "math.md",
            "blob/main/src/tarflowlm/model.py",
        ),
        ("../reproduction", "docs/math.md", "math.md", "tree/main/reproduction"),
        (
            "claims.py",
            "docs/reproduce/claims.md",
            "reproduce/claims.md",
            "blob/main/docs/reproduce/claims.py",
        ),
        # left as they are
        ("#symbols", "docs/math.md", "math.md", "#symbols"),
        ("https://arxiv.org", "docs/math.md", "math.md", "https://arxiv.org"),
    ],
)
def test_links(hooks, link, source, page, expected):
    if expected.startswith(("blob/", "tree/")):
        expected = f"{REPOSITORY}/{expected}"
    places = PurePosixPath(source), PurePosixPath(page)
    assert hooks.relinked(f"a [b]({link}).", *places, REPOSITORY) == f"a [b]({expected})."


def test_code_has_no_links(hooks):
    place = PurePosixPath("README.md")
    text = "`blocks[0](z)` and\n```\nblocks[0](z)\n```\n"
    assert hooks.relinked(text, place, place, REPOSITORY) == text


def test_a_link_to_nothing_is_refused(hooks):
    place = PurePosixPath("README.md")
    with pytest.raises(hooks.PluginError, match=r"nothing\.py"):
        hooks.relinked("[a](nothing.py)", place, place, REPOSITORY)


def test_lists_in_lists_are_indented(hooks):
    assert hooks.indented_lists("- a\n  - b\n    c\n") == "- a\n    - b\n    c\n"


def test_a_notebook_becomes_a_page(hooks):
    outputs = [{"text": ["3\n"]}, {"data": {"text/html": ["<b>4</b>"], "text/plain": ["4"]}}]
    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "title"]},
        {"cell_type": "code", "source": ["print(3)"], "outputs": outputs},
    ]
    page = hooks.as_markdown(json.dumps({"cells": cells}))
    assert page.split("\n\n") == [
        "# A\ntitle",
        "```python\nprint(3)\n```",
        "```text\n3\n```",
        '<div class="output"><b>4</b></div>',
    ]


def test_the_api_has_every_public_name(hooks, monkeypatch):
    pages = hooks.api_pages()
    assert "::: tarflowlm.load\n" in pages["api/texts.md"]
    monkeypatch.setitem(hooks.API, "texts", ("Models and texts", "load"))
    with pytest.raises(hooks.PluginError, match="Pretrained"):
        hooks.api_pages()


def test_docstrings_keep_their_signs_and_examples():
    page = part("docstrings").markdown(
        "p(x_<t) * 2, see `load` and `x_y` (docs/math.md).\n\n    a_b * c\n\n"
        "Example:\n    >>> a_b\n    1\n\n    >>> 2\n    2\n"
    )
    assert page == (
        "p(x\\_&lt;t) \\* 2, see [`load`][tarflowlm.load] and `x_y` ([math.md](../math.md)).\n\n"
        "    a_b * c\n\n```pycon\n>>> a_b\n1\n\n>>> 2\n2\n```\n"
    )
