"""From a file to pieces of normalised text: reading, cutting and normalising, in bounded memory."""

import codecs
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BufferedIOBase
from itertools import chain
from pathlib import Path

from tarflowlm.config import TEXT8_ALPHABET, Normalization
from tarflowlm.errors import UserError

_BLOCK = 1 << 20  # bytes read at once
FIELD = "#"
"""Between a .jsonl file and the name of the field with its texts, which else is "text"."""
TEXTS = (".txt", ".jsonl")
_PACKED = (".gz", ".xz", ".zst")


def text_files(path: Path) -> tuple[Path, ...]:
    """The file `path`, or the texts in the folder `path`, compressed or not, by their names."""
    if not path.is_dir():
        return (path,) if path.is_file() else ()
    return tuple(sorted(file for file in path.iterdir() if file.is_file() and _kind(file) in TEXTS))


def _kind(path: Path) -> str:
    return Path(path.stem if path.suffix.lower() in _PACKED else path.name).suffix.lower()


def file_blocks(path: Path, field: str) -> Iterator[str]:
    """The text of a file in blocks: of .jsonl the texts under `field`, each with a line end."""
    if _kind(path) != ".jsonl":
        yield from text_blocks(path)
        return
    count = 0
    rest = ""
    for block in chain(text_blocks(path), "\n"):
        *lines, rest = (rest + block).split("\n")
        texts = []
        for line in lines:
            count += 1
            try:
                texts.append(json.loads(line)[field] + "\n" if line.strip() else "")
            except (ValueError, LookupError, TypeError):
                what = f"line {count} of {path} is not an object with a text under {field!r}"
                remedy = f"name the field that has one, say {path.name}{FIELD}content"
                raise UserError(f"{what}: {remedy}") from None
        yield "".join(texts)


def read_text(path: str | os.PathLike[str]) -> str:
    """The whole text of a file, read as by `text_blocks`."""
    return "".join(text_blocks(path))


def text_blocks(path: str | os.PathLike[str]) -> Iterator[str]:
    """The text of a UTF-8 file in blocks of about a megabyte.

    The suffix gives the compression: `.gz`, `.xz` or `.zst`; any other is plain text. Line ends
    stay as they are; a byte-order mark at the start is dropped. UserError for a file that is
    missing, unreadable, empty, damaged or not UTF-8, possibly after some blocks.
    """
    source = Path(path)
    is_empty = True
    try:
        for block in codecs.iterdecode(_byte_blocks(source), "utf-8-sig"):
            is_empty = False
            yield block
    except UnicodeDecodeError as error:
        what = f"{source} is not UTF-8 text (it holds byte 0x{error.object[error.start]:02x})"
        remedy = "convert it to UTF-8; a compressed file needs the suffix .gz, .xz or .zst"
        raise UserError(f"{what}: {remedy}") from None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        what = f"{source} is damaged or not a {source.suffix} file ({error})"
        raise UserError(f"{what}: get it again") from None
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from None
    if is_empty:
        raise UserError(f"{source} is empty: give a file with text")


def _byte_blocks(source: Path) -> Iterator[bytes]:
    suffix = source.suffix.lower()
    if suffix == ".zst":
        yield from _zst_blocks(source)
        return
    openers: dict[str, Callable[..., BufferedIOBase]] = {".gz": gzip.GzipFile, ".xz": lzma.LZMAFile}
    with openers.get(suffix, open)(source, "rb") as file:
        yield from iter(partial(file.read, _BLOCK), b"")


def _zst_blocks(source: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        remedy = "pip install 'tarflowlm[data]'"
        raise UserError(f"reading {source} needs the zstandard package: {remedy}") from None
    # frame by frame: the package's streaming reader accepts a truncated file as complete
    frame = None
    try:
        with source.open("rb") as file:
            # it has no bound on what a block decompresses to
            while block := file.read(_BLOCK // 16):
                while block:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(block)
                    block = b""
                    if frame.eof:
                        block = frame.unused_data
                        frame = None
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from None
    if frame is not None:
        raise EOFError("it ends within a frame")


# between a letter or digit and the one space or line end before the next: GPT-2-like pre-tokenizers
# attach a space to the word that follows it, and keep such a line end to itself
_CUT = re.compile(r"(?<=[^\W_])(?=[ \n][^\W_])")
# a piece of this many times the size is cut anywhere: memory must not depend on the text
_LONGEST = 16


def text_pieces(text: str | Iterable[str], size: int) -> Iterator[str]:
    """Consecutive pieces, of about `size` characters each, of a text given whole or in blocks.

    No tokenizer that we train or support joins characters across a cut: each piece but the last
    ends where a word ends. Only where there is no such place for `16 * size` characters is the text
    cut anywhere. The cuts depend on the text and `size`, not on the blocks.
    """
    buffer = ""
    searched = size
    for block in [text] if isinstance(text, str) else text:
        buffer += block
        start = 0
        while len(buffer) - start > size:
            match = _CUT.search(buffer, searched, start + _LONGEST * size + 2)
            if match is not None:
                cut = match.start()
            elif len(buffer) - start > _LONGEST * size + 2:
                cut = start + _LONGEST * size
            else:
                searched = max(searched, len(buffer) - 2)
                break
            yield buffer[start:cut]
            start = cut
            searched = cut + size
        buffer = buffer[start:]
        searched -= start
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
