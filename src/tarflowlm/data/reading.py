"""Texts from files in bounded memory: blocks as they are read, and pieces that end with a word."""

import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase, TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from tarflowlm.errors import UserError

BLOCK = 1 << 20  # characters read at once
FIELD = "#"
"""Between a .jsonl file and the name of the field with its texts, by default "text"; or between a
folder and the suffix of its texts, such as .py."""


def read_text(path: str | os.PathLike[str]) -> str:
    """The whole text of a file, read as by `text_blocks`."""
    return "".join(text_blocks(path))


def text_blocks(path: str | os.PathLike[str]) -> Iterator[str]:
    """The text of a UTF-8 file in blocks of about a megabyte.

    The suffix gives the compression: `.gz` or `.xz`; any other is plain text. The line ends of
    Windows become plain ones; a byte-order mark at the start is dropped. UserError for a file that
    is missing, unreadable, empty, damaged or not UTF-8, possibly after some blocks.
    """
    with _opened(Path(path)) as file:
        block = file.read(BLOCK)
        if not block:
            raise UserError(f"{path} is empty: give a file with text")
        held = ""
        while block:
            block = held + block
            # it may be half of a line end
            held = "\r" if block.endswith("\r") else ""
            yield plain_line_ends(block.removesuffix(held))
            block = file.read(BLOCK)
        if held:
            yield held


def kind_of(path: Path) -> str:
    """The suffix of a text, compressed or not: in a .jsonl file each line is a document."""
    return Path(path.stem if path.suffix.lower() in (".gz", ".xz") else path.name).suffix.lower()


def json_texts(path: Path, field: str) -> Iterator[str]:
    """The texts under `field` in the objects of the lines of a file, but for empty ones."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            entry: Any = None
            try:
                entry = json.loads(line)
                found = entry[field]
                if found is None:
                    continue
                text = plain_line_ends("" + found)
                text.encode()  # half of a surrogate pair is no text
            except (ValueError, LookupError, TypeError, RecursionError):
                what = f"line {number} of {path} is not an object with a text under {field!r}"
                names = []
                if isinstance(entry, dict) and not isinstance(entry.get(field), str):
                    names = [name for name, value in entry.items() if isinstance(value, str)]
                known = [f"{path.name}{FIELD}{name}" for name in names]
                remedy = f"name the field that has one: {' or '.join(known[:4])}"
                raise UserError(f"{what}: {remedy if known else 'mend it'}") from None
            if text:
                yield text


def plain_line_ends(text: str) -> str:
    """`text` with the line ends of Windows as plain ones."""
    return text.replace("\r\n", "\n")


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    openers: dict[str, Callable[..., BufferedIOBase]] = {".gz": gzip.GzipFile, ".xz": lzma.LZMAFile}
    try:
        binary = openers.get(path.suffix.lower(), open)(path, "rb")
        with TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        what = f"{path} is not UTF-8 text (it holds byte 0x{error.object[error.start]:02x})"
        remedy = "convert it to UTF-8; a compressed file needs the suffix .gz or .xz"
        raise UserError(f"{what}: {remedy}") from None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        what = f"{path} is damaged or not a {path.suffix} file ({error})"
        raise UserError(f"{what}: get it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


# between a letter or digit and the one space or line end before the next one: pre-tokenizers like
# GPT-2's attach a space to the next word, and make such a line end a piece of its own
_CUT = re.compile(r"(?<=[^\W_])(?=[ \n][^\W_])")


def text_pieces(blocks: Iterable[str], size: int) -> Iterator[str]:
    """Consecutive pieces, of about `size` characters each, of a text given in blocks.

    No tokenizer that we train or support joins characters across a cut: each piece but the last
    ends where a word ends. Only where there is no such place for `16 * size` characters is the text
    cut anywhere. The cuts depend on the text and `size`, not on the blocks.
    """
    buffer = ""
    for block in blocks:
        buffer += block
        start = 0
        while len(buffer) - start > size:
            # memory must not depend on the text
            longest = start + 16 * size
            match = _CUT.search(buffer, start + size, longest)
            if match is None and len(buffer) < longest:
                break
            cut = longest if match is None else match.start()
            yield buffer[start:cut]
            start = cut
        buffer = buffer[start:]
    if buffer:
        yield buffer
