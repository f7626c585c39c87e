"""Docstrings as Markdown, for the pages of the API."""

import re
import textwrap
from typing import Any

from griffe import Extension, Object

import tarflowlm

NAMES = frozenset(dir(tarflowlm))
EXAMPLE = re.compile(r"(?ms)^Example:\n(?P<code>(?: .*\n?|\n)+)")
PAGE = re.compile(r"docs/([a-z]+)\.md")


class Docstrings(Extension):
    """Examples become blocks of code, and signs that Markdown would read stay as they are."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """The docstring with its examples as blocks, and links to the pages that it cites."""

    def block(found: re.Match[str]) -> str:
        code = textwrap.dedent(found["code"]).strip()
        return f"```pycon\n{code}\n```\n"

    # every second part is a block
    parts = re.split(r"(?s)(```.*?```)", EXAMPLE.sub(block, docstring))
    return "".join(part if i % 2 else prose(part) for i, part in enumerate(parts))


def prose(text: str) -> str:
    lines = []
    for line in text.splitlines(keepends=True):
        # indented: a formula
        lines.append(line if line.startswith("    ") else escaped(line))
    return "".join(lines)


def escaped(line: str) -> str:
    """A line in which signs outside of `code` mean themselves, with its links."""
    # every second part is code
    parts = line.split("`")
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"[`{part}`][tarflowlm.{part}]" if part in NAMES else f"`{part}`"
        else:
            words = re.sub(r"[*_]", r"\\\g<0>", part.replace("<", "&lt;"))
            parts[i] = PAGE.sub(r"[\1.md](../\1.md)", words)
    return "".join(parts)
