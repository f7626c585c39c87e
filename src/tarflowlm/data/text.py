"""From a file to pieces of normalised text, in bounded memory: reading, cutting, normalising, and
the splits that train a model, choose its weights, and test it.
"""

import gzip
import hashlib
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase, TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO, get_args

from tarflowlm.config import TEXT8_ALPHABET
from tarflowlm.errors import UserError

BLOCK = 1 << 20  # characters read at once
FIELD = "#"
"""Between a .jsonl file and the name of the field with its texts, by default "text"; or between a
folder and the suffix of its texts, such as .py."""
HUB = "hf:"
"""Prefix of the OWNER/NAME of a set of the hub."""
SEPARATOR = "<|endoftext|>"
"""The name of the token that ends every document and begins the next, as in GPT-2."""


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
                if isinstance(entry, dict) and field not in entry:
                    names = [name for name, value in entry.items() if isinstance(value, str)]
                known = [f"{path.name}{FIELD}{name}" for name in names]
                remedy = f"name the field that has one: {' or '.join(known[:4])}"
                raise UserError(f"{what}: {remedy if known else 'mend it'}") from None
            if text:
                yield text


def split_field(source: str) -> tuple[str, str]:
    """The path of a text and the field that `source` names; a path may have the sign itself."""
    whole = os.path.expanduser(source)
    if FIELD not in whole or os.path.exists(whole):
        return whole, ""
    path, _, field = whole.rpartition(FIELD)
    return path, field


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


def plain_line_ends(text: str) -> str:
    """`text` with the line ends of Windows as plain ones."""
    return text.replace("\r\n", "\n")


def unwrapped(text: str) -> str:
    """A text with the lines of every paragraph joined by a space, or by nothing after a hyphen.

    A paragraph ends before a line that is empty or indented.
    """
    joined = re.sub(r"(?<=\S)(?<!-)[ \t]*\n(?=\S)", " ", text)
    return re.sub(r"(?<=-)\n(?=\S)", "", joined)


def is_wrapped(text: str) -> bool:
    """Whether the lines of a text end where the next word would have made them too long."""
    lines = text.split("\n")
    width = sorted(map(len, lines))[len(lines) * 9 // 10]
    inner = [
        len(line) + 1 + len(following.split()[0]) > width - 4
        for line, following in pairwise(lines)
        if " " in line.strip() and following[:1].strip()
    ]
    is_full = len(inner) > max(50, len(lines) / 3) and sum(inner) > 0.8 * len(inner)
    return 40 <= width <= 100 and is_full


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


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LETTERS_OR_SPACE = bytes(code if chr(code) in TEXT8_ALPHABET else ord(" ") for code in range(256))


def normalize_text8(text: str) -> str:
    """Text in the TEXT8 alphabet, as `wikifil.pl` writes it (Mahoney 2006); idempotent.

    ASCII upper case becomes lower case and each digit its English name between spaces. Everything
    else that is not `a`-`z`, `<|endoftext|>` included, becomes a space, and runs of spaces one
    space. The result begins with one space and has none at its end; a text without letters or
    digits gives `" "`.
    """
    # on bytes, whose methods are fast; other characters than ASCII become "?", and later a space
    data = text.encode("ascii", errors="replace").replace(b"<|endoftext|>", b" ").lower()
    for digit, name in enumerate(DIGITS):
        data = data.replace(str(digit).encode(), f" {name} ".encode())
    return " " + b" ".join(data.translate(_LETTERS_OR_SPACE).split()).decode("ascii")


# splits

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
LARGEST = 40_000_000
"""Characters of validation and of test, about 10 million tokens of GPT-2."""
FEW = 4096
"""If there are at most this many documents, every split has at least one."""


class Piece(NamedTuple):
    """A stretch of normalised text that is encoded on its own, and the split it belongs to."""

    split: Split
    text: str
    ends: bool = False
    """Whether a document ends here."""


def cut_in_three(pieces: Iterable[str], total: int) -> Iterator[Piece]:
    """A text of `total` characters in pieces: 90 %, 5 % and 5 %, but at most `LARGEST` of these."""
    valid = max(total * 90 // 100, total - 2 * LARGEST)
    test = max(total * 95 // 100, total - LARGEST)
    cuts = list(pairwise([0, valid, test, total]))
    position = 0
    for piece in pieces:
        for split, (start, stop) in zip(SPLITS, cuts, strict=True):
            text = piece[max(0, start - position) : max(0, stop - position)]
            if text:
                yield Piece(split, text)
        position += len(piece)


def place_of_document(key: str) -> float:
    """A percentage by the sha256 of the `key` of a document."""
    return int(hashlib.sha256(key.encode("utf-8")).hexdigest()[:8], 16) * 100 / 2**32


def split_of_document(key: str, shares: tuple[float, float] = (90.0, 95.0)) -> Split:
    """The split of a document by the sha256 of its `key`.

    `shares` are the cumulative percentages of train and valid.
    """
    place = place_of_document(key)
    if place < shares[0]:
        return "train"
    return "valid" if place < shares[1] else "test"


def fair_shares(places: set[float], characters: int) -> tuple[float, float]:
    """The `shares` for documents that have `characters` together.

    Validation and test get 5 % each, or about `LARGEST` characters. With 3 to `FEW` documents,
    whose `places` are known, this is rounded to whole documents, at least one.
    """
    held = min(5.0, 100 * LARGEST / characters)
    if len(SPLITS) <= len(places) <= FEW:
        each = max(1, round(len(places) * held / 100))
        return sorted(places)[-2 * each], sorted(places)[-each]
    return 100 - 2 * held, 100 - held
