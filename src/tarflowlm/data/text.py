"""From a file to pieces of normalised text: reading, cutting and normalising, in bounded memory."""

import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BufferedIOBase, TextIOWrapper
from pathlib import Path
from typing import TextIO

from tarflowlm.config import TEXT8_ALPHABET, Normalization
from tarflowlm.errors import UserError

BLOCK = 1 << 20  # characters read at once
FIELD = "#"
"""Between a .jsonl file and the name of the field with its texts, which else is "text"."""
_PACKED = (".gz", ".xz")


def text_files(path: Path) -> tuple[Path, ...]:
    """The file `path`, or the texts in the folder `path`, compressed or not, by their names."""
    if not path.is_dir():
        return (path,) if path.is_file() else ()
    texts = (
        file for file in path.iterdir() if file.is_file() and _kind(file) in (".txt", ".jsonl")
    )
    return tuple(sorted(texts))


def _kind(path: Path) -> str:
    return Path(path.stem if path.suffix.lower() in _PACKED else path.name).suffix.lower()


def file_blocks(path: Path, field: str) -> Iterator[str]:
    """The text of a file in blocks: of .jsonl the texts under `field`, each with a line end."""
    if _kind(path) != ".jsonl":
        yield from text_blocks(path)
        return
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field] + "\n"
            except (ValueError, LookupError, TypeError):
                what = f"line {number} of {path} is not an object with a text under {field!r}"
                remedy = f"name the field that has one, say {path.name}{FIELD}content"
                raise UserError(f"{what}: {remedy}") from None
            yield text


def read_text(path: str | os.PathLike[str]) -> str:
    """The whole text of a file, read as by `text_blocks`."""
    return "".join(text_blocks(path))


def text_blocks(path: str | os.PathLike[str]) -> Iterator[str]:
    """The text of a UTF-8 file in blocks of about a megabyte.

    The suffix gives the compression: `.gz` or `.xz`; any other is plain text. Line ends stay as
    they are; a byte-order mark at the start is dropped. UserError for a file that is missing,
    unreadable, empty, damaged or not UTF-8, possibly after some blocks.
    """
    with _opened(Path(path)) as file:
        block = file.read(BLOCK)
        if not block:
            raise UserError(f"{path} is empty: give a file with text")
        yield block
        yield from iter(partial(file.read, BLOCK), "")


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


# between a letter or digit and the one space or line end before the next: GPT-2-like pre-tokenizers
# attach a space to the word that follows it, and keep such a line end to itself
_CUT = re.compile(r"(?<=[^\W_])(?=[ \n][^\W_])")
# a piece of this many times the size is cut anywhere: memory must not depend on the text
_LONGEST = 16


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
            longest = start + _LONGEST * size
            match = _CUT.search(buffer, start + size, longest)
            if match is None and len(buffer) < longest:
                break
            cut = longest if match is None else match.start()
            yield buffer[start:cut]
            start = cut
        buffer = buffer[start:]
    if buffer:
        yield buffer


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LETTERS_OR_SPACE = bytes(code if chr(code) in TEXT8_ALPHABET else ord(" ") for code in range(256))


def normalize(text: str, how: Normalization) -> str:
    """`text` itself for `"none"`, `normalize_text8(text)` for `"text8"`."""
    return normalize_text8(text) if how == "text8" else text


def normalize_text8(text: str) -> str:
    """Text in the TEXT8 alphabet, as `wikifil.pl` writes it (Mahoney 2006); idempotent.

    ASCII upper case becomes lower case and each digit its English name between spaces. Everything
    else that is not `a`-`z`, `<|endoftext|>` included, becomes a space, and runs of spaces one
    space. The result begins with one space and has none at its end; a text without letters or
    digits gives `" "`.
    """
    # on bytes, whose methods are fast; what is not ASCII becomes "?", and later a space
    data = text.encode("ascii", errors="replace").replace(b"<|endoftext|>", b" ").lower()
    for digit, name in enumerate(DIGITS):
        data = data.replace(str(digit).encode(), f" {name} ".encode())
    return " " + b" ".join(data.translate(_LETTERS_OR_SPACE).split()).decode("ascii")
