"""The site shows what GitHub shows: links, lists, the notebook, docstrings."""

import json
import re
from pathlib import PurePosixPath

import pytest

from docs_cases import ROOT, module_at

pytest.importorskip("mkdocstrings")
pytest.importorskip("math_core")

REPOSITORY = "https://x.org/a/b"


@pytest.fixture(scope="module")
def hooks():
    return module_at("site/hooks.py")


@pytest.mark.parametrize(
    ("link", "source", "page", "expected"),
    [
        # pages and pictures of the site
        ("docs/math.md#symbols", "README.md", "index.md", "math.md#symbols"),
        ("docs/stories.png", "README.md", "index.md", "stories.png"),
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


def test_formulas_need_no_network(hooks):
    """All formulas of the documents become MathML at the build."""
    html = hooks.on_page_content(
        '<p><span class="arithmatex">\\(p(x) &lt; 1\\)</span></p>'
        '<div class="arithmatex">\\[\n\\begin{aligned} a &amp;= b \\cr c \\end{aligned}'
        " \\tag{9}\\]</div>"
    )
    assert html.count("<math") == 2
    assert '</math><span class="tag">(9)</span></div>' in html
    assert "\\" not in html
    pages = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), *ROOT.glob("examples/*.md")]
    for page in pages:
        # every second part is code
        text = "".join(hooks.CODE.split(page.read_text(encoding="utf-8"))[::2])
        for formula in re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL):
            assert "<math" in hooks.mathml(formula, True), page
        for formula in re.findall(r"(?<!\$)\$([^$\n]+)\$", re.sub(r"(?s)\$\$.+?\$\$", "", text)):
            assert "<math" in hooks.mathml(formula, False), page
    for file in (ROOT / "site").rglob("*.*"):
        if file.suffix in {".js", ".css", ".html"}:
            assert not re.search(r"(src|href|url|import)\W+https?:(?!//github)", file.read_text())


def test_blocks_of_code_fit_the_page(hooks):
    long = f"tarflowlm train mini --out runs/{60 * 'x'}"
    page = f"```python\na  # b\n```\ntext\n```\n{long}   # why\ntarflowlm info  # short\n```\n"
    assert hooks.comments_above(page) == (
        f"```python\na  # b\n```\ntext\n```bash\n# why\n{long}\ntarflowlm info  # short\n```\n"
    )
    line = "a word " * 19
    cut = f"```text\nThe title\n{line}\nand the end\n```\n"
    assert hooks.uncut(cut) == f"```text\nThe title\n{line} and the end\n```\n"


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
    page = module_at("site/docstrings.py").markdown(
        "p(x_<t) * 2, see `load` and `x_y` (docs/math.md).\n\n    a_b * c\n\n"
        "Example:\n    >>> a_b\n    1\n\n    >>> 2\n    2\n"
    )
    assert page == (
        "p(x\\_&lt;t) \\* 2, see [`load`][tarflowlm.load] and `x_y` ([math.md](../math.md)).\n\n"
        "    a_b * c\n\n```pycon\n>>> a_b\n1\n\n>>> 2\n2\n```\n"
    )
