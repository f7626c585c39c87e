"""The documents of the repository: their code blocks, links and headings, and the commands of a block.

They are Markdown files and, as far as their prose goes, notebooks.
"""

import ast
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
LOG = ROOT / "docs" / "log.md"
"""Records what was true at a date; its commands may be gone."""
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "docs").glob("*.ipynb")),
    *sorted((ROOT / "examples").glob("*.md")),
]
PROGRAMS = ("tarflowlm", "pip", "pytest", "torchrun", "sbatch")
"""Programs that the documents may call."""
SHELLS = ("sh", "bash", "shell", "console")
"""Languages of code blocks with commands."""

_SHELL_WORDS = "|".join([*PROGRAMS, "python3?", "uv", "git", "curl", "wget", "make", "cd", "srun", "export"])
_STARTS_A_COMMAND = re.compile(rf"(^|[;&|]|\bdo)\s*(\$ )?(\w+=\S* )*({_SHELL_WORDS})\s", re.MULTILINE)


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A code block: fenced, or indented by four spaces."""

    document: Path
    line: int
    """Of its first line of code."""
    code: str

    @property
    def place(self) -> str:
        return f"{name_of(self.document)}:{self.line}"


def cells(notebook: Path, kind: str) -> list[dict[str, Any]]:
    """The cells of a notebook that are of this kind: "markdown" or "code"."""
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def parsed(document: Path) -> list[Token]:
    """Lines of a notebook count from its first cell of prose on, without code."""
    if document.suffix == ".ipynb":
        text = "\n\n".join("".join(cell["source"]) for cell in cells(document, "markdown"))
    else:
        text = document.read_text(encoding="utf-8")
    return MarkdownIt("commonmark").enable("table").parse(text)


def blocks(documents: list[Path]) -> tuple[list[Block], list[Block]]:
    """Shell blocks, and Python blocks. A block without a language is one for a shell if a command starts in it."""
    shell, python = [], []
    for document in documents:
        for token in parsed(document):
            if token.type not in ("fence", "code_block"):
                continue
            assert token.map is not None
            fenced = token.type == "fence"
            language = token.info.split()[0] if token.info.strip() else ""
            block = Block(document, token.map[0] + 1 + fenced, token.content)
            if language == "python":
                python.append(block)
            elif language in SHELLS or (not language and _STARTS_A_COMMAND.search(token.content)):
                shell.append(block)
    return shell, python


def session(document: Path) -> str:
    """All of its Python sessions (`pycon`), one after the other."""
    return "\n".join(token.content for token in parsed(document) if token.type == "fence" and token.info == "pycon")


def commands(block: Block, folder: Path) -> list[list[str]]:
    """The words of every command of a block, as bash calls it: loops run, variables and quotes are replaced.

    Nothing else happens: the programs are functions that write down how they were called, and no other is found.
    AssertionError for one that is not among PROGRAMS. Of a block with prompts only what follows them is run.
    """
    code = block.code
    if re.search(r"^\$ ", code, re.MULTILINE):
        code = "\n".join(line[2:] if line.startswith("$ ") else "" for line in code.splitlines())
    functions = [f'{name}() {{ printf "%s\\0" "$#" {name} "$@" >> "$CALLS"; }}\n' for name in PROGRAMS]
    (folder / "functions.sh").write_text("".join(functions), encoding="utf-8")
    (folder / "block.sh").write_text(code, encoding="utf-8")
    (folder / "empty").mkdir()
    calls = folder / "calls"
    calls.touch()
    bash = shutil.which("bash")
    assert bash is not None
    environment = {"BASH_ENV": str(folder / "functions.sh"), "CALLS": str(calls), "PATH": str(folder / "empty")}
    shell = subprocess.Popen(
        [bash, "-u", "block.sh"],
        cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = shell.communicate(timeout=20)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(shell.pid, signal.SIGKILL)
    errors = "\n".join(line for line in errors.splitlines() if "Terminated" not in line)
    assert shell.returncode == 0, f"{block.place}: bash ends with {shell.returncode}: {errors}"
    assert not errors, f"{block.place}: {errors}; commands may start with {', '.join(PROGRAMS)}"
    words = iter(calls.read_text(encoding="utf-8").split("\0")[:-1])
    found = [[next(words) for _ in range(int(count) + 1)] for count in words]
    assert found, f"{block.place}: no command was called"
    return found


@dataclass(frozen=True)
class Link:
    document: Path
    line: int
    target: str
    codes: tuple[str, ...]
    """Text of the link, if nothing but code."""
    text: str

    @property
    def path(self) -> Path:
        """What it points to."""
        path = self.target.partition("#")[0]
        return (self.document.parent / path).resolve() if path else self.document


def links(document: Path) -> Iterator[Link]:
    """Relative links and images of a document."""
    for token in parsed(document):
        if token.type != "inline":
            continue
        children = token.children or []
        assert token.map is not None
        line = token.map[0] + 1
        for i, child in enumerate(children):
            if child.type == "image":
                yield Link(document, line, str(child.attrs["src"]), (), child.content)
            if child.type != "link_open":
                continue
            end = next(j for j in range(i, len(children)) if children[j].type == "link_close")
            inside = [c for c in children[i + 1 : end] if c.content.strip(", ")]
            codes = tuple(c.content for c in inside) if all(c.type == "code_inline" for c in inside) else ()
            target = str(child.attrs["href"])
            if not re.match(r"[a-z]+:", target):
                yield Link(document, line, target, codes, "".join(c.content for c in inside))


def anchors(document: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    tokens = parsed(document)
    found: set[str] = set()
    for token, after in itertools.pairwise(tokens):
        if token.type == "heading_open":
            text = "".join(c.content for c in after.children or [] if c.type in ("text", "code_inline"))
            found.add(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return found


def inline_codes(document: Path) -> Iterator[tuple[int, str]]:
    """Line of the paragraph, and text, of every `code` in running text."""
    for token in parsed(document):
        for child in token.children or []:
            if child.type == "code_inline":
                assert token.map is not None
                yield token.map[0] + 1, child.content


@cache
def definitions(path: Path) -> frozenset[str]:
    """Functions, classes, constants and members (`Class.member`) of a module, or of all modules in a folder.

    A class also has the members of its bases in the same file.
    """
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return frozenset(name for file in files for name in _defined(ast.parse(file.read_text(encoding="utf-8")).body))


def _defined(body: list[ast.stmt]) -> list[str]:
    found: list[str] = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        if isinstance(node, ast.ClassDef):
            bases = tuple(f"{base.id}." for base in node.bases if isinstance(base, ast.Name))
            inherited = [name.partition(".")[2] for name in found if name.startswith(bases)]
            found += [f"{node.name}.{name}" for name in (*_defined(node.body), *inherited)]
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found += [target.id for target in targets if isinstance(target, ast.Name)]
    return found
