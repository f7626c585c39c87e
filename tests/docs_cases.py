"""The documents of the repository, Markdown and notebooks: their blocks, links, headings and
commands.
"""

import ast
import importlib.util
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "first_hour.md"]
DOCUMENTS += [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "docs").glob("*.ipynb"))]
COMMAND = re.compile(r"\btarflowlm ([a-z]+)\b((?:[^\n`|;&]|\\\n)*)")
"""A command of ours in a block or in running text, with its arguments."""

REPRODUCTION = re.compile(r"\bpython -m reproduction ([\w$-]+)([^\n`#]*)")
"""A recipe with its arguments."""


def module_at(path: str) -> ModuleType:
    """A file of the repository that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def cells(notebook: Path, kind: str) -> list[dict[str, Any]]:
    """The cells of a notebook that are of this kind: "markdown" or "code"."""
    return [
        cell
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == kind
    ]


@cache
def parsed(document: Path) -> list[Token]:
    if document.suffix == ".ipynb":
        text = "\n\n".join("".join(cell["source"]) for cell in cells(document, "markdown"))
    else:
        text = document.read_text(encoding="utf-8")
    return MarkdownIt("commonmark").enable("table").parse(text)


def blocks(document: Path, *languages: str) -> list[str]:
    """Code blocks in one of these languages, "" for none."""
    fences = (token for token in parsed(document) if token.type == "fence")
    return [token.content for token in fences if (token.info.split() or [""])[0] in languages]


def shell_lines(document: Path) -> Iterator[str]:
    """The commands in its blocks, one by one; of a block with prompts only the lines that follow
    one.
    """
    for block in blocks(document, "", "console"):
        lines = block.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines:
            yield from (
                part.strip() for part in re.sub(r"(^|\s)#.*", "", line).split("&&") if part.strip()
            )


class Session(NamedTuple):
    """A command of a console block, and what the block shows below it."""

    command: str
    output: str

    @property
    def arguments(self) -> list[str]:
        program, *arguments = shlex.split(self.command)
        assert program == "tarflowlm", self.command
        return arguments


def console_sessions(document: Path) -> list[Session]:
    """The commands of its console blocks, each with its output."""
    parts = [part for block in blocks(document, "console") for part in block.split("$ ")[1:]]
    return [
        Session(command, output) for command, _, output in (part.partition("\n") for part in parts)
    ]


def codes_in(document: Path) -> Iterator[str]:
    """Every `code` in running text."""
    for token in parsed(document):
        yield from (child.content for child in token.children or [] if child.type == "code_inline")


@dataclass(frozen=True)
class Link:
    target: str
    codes: tuple[str, ...]
    """What the text of the link says, if that is nothing but code."""
    path: Path


def links(document: Path) -> Iterator[Link]:
    """Relative links and images of a document."""
    for token in parsed(document):
        children = token.children or []
        for i, child in enumerate(children):
            target = str(child.attrs.get("src" if child.type == "image" else "href", ""))
            if not target or re.match(r"[a-z]+:", target):
                continue
            inside = itertools.takewhile(lambda c: c.type != "link_close", children[i + 1 :])
            texts = [c for c in inside if c.content.strip(", ")]
            only_code = child.type == "link_open" and all(c.type == "code_inline" for c in texts)
            path = target.partition("#")[0]
            where = (document.parent / path).resolve() if path else document
            yield Link(target, tuple(c.content for c in texts) if only_code else (), where)


@cache
def anchors(document: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    found = set()
    for token, after in itertools.pairwise(parsed(document)):
        if token.type == "heading_open":
            text = "".join(
                c.content for c in after.children or [] if c.type in ("text", "code_inline")
            )
            found.add(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return found


@cache
def definitions(path: Path) -> set[str]:
    """Functions, methods, classes, fields and constants of a module, or of all modules in a
    folder.
    """
    files = path.rglob("*.py") if path.is_dir() else [path]
    nodes = [
        node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    ]
    found = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return found | {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
