"""From a file to pieces of normalised text: reading, cutting and normalising, all in bounded memory."""

import codecs
import gzip
import hashlib
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from tarflowlm.config import Normalization
from tarflowlm.errors import UserError

_BLOCK = 1 << 20  # bytes read at once
_ZST_BLOCK = 1 << 16  # compressed bytes: what they decompress to has no bound of its own


# reading


def read_text(path: str | os.PathLike[str]) -> str:
    """The whole text of a file, read as by `text_blocks`."""
    return "".join(text_blocks(path))


def text_blocks(path: str | os.PathLike[str]) -> Iterator[str]:
    """The text of a UTF-8 file in blocks of about a megabyte.

    The suffix tells the compression: `.gz`, `.xz`, `.zst`, or `.zip` with one member; any other is plain text. Line
    ends stay as they are; a byte-order mark at the start is dropped.

    UserError for a file that is missing, a directory, unreadable, empty, damaged or not UTF-8 (possibly after some
    blocks), and for `.zst` without the `zstandard` package.
    """
    source = Path(path)
    if os.path.isdir(source):  # os.path: False, not OSError, for impossible names
        raise UserError(f"{source} is a directory: give a text file in it")
    if not os.path.exists(source):
        raise UserError(f"{source} does not exist: check the path")
    try:
        yield from _decoded_blocks(source)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(
            f"{source} is not a complete {source.suffix} file ({error}): fetch or compress it again"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from None


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _decoded_blocks(source: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    for block in _byte_blocks(source):
        yield from _decode(decoder, block, position, source)
        position += len(block)
    if position == 0:
        raise UserError(f"{source} is empty: give a file with text")
    yield from _decode(decoder, b"", position, source)


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, position: int, source: Path) -> Iterator[str]:
    """Text of the `block` that starts at byte `position` of `source`; an empty block marks the end."""
    pending = decoder.getstate()[0]
    try:
        text = decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not UTF-8 text (byte {position - len(pending) + error.start} is "
            f"0x{error.object[error.start]:02x}): convert it to UTF-8, or give a file with a suffix .txt, .gz, .xz "
            "or .zst"
        ) from None
    if position - len(pending) == 0:
        text = text.removeprefix("\ufeff")
    if text:
        yield text


def _byte_blocks(source: Path) -> Iterator[bytes]:
    match source.suffix.lower():
        case ".gz":
            with gzip.open(source, "rb") as file:
                yield from _read_blocks(file.read)
        case ".xz":
            with lzma.open(source, "rb") as file:
                yield from _read_blocks(file.read)
        case ".zst":
            yield from _zst_blocks(source)
        case ".zip":
            with zipfile.ZipFile(source) as archive:
                members = [info for info in archive.infolist() if not info.is_dir()]
                if len(members) != 1:
                    raise UserError(f"{source} holds {len(members)} files: unpack it and give one of them")
                with archive.open(members[0]) as file:
                    yield from _read_blocks(file.read)
        case _:
            with source.open("rb") as file:
                yield from _read_blocks(file.read)


def _read_blocks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while block := read(_BLOCK):
        yield block


def _zst_blocks(source: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"reading {source} needs the zstandard package: pip install 'tarflowlm[data]'") from None
    # frame by frame: the package's streaming reader accepts a truncated file as complete
    frame = None
    try:
        with source.open("rb") as file:
            while block := file.read(_ZST_BLOCK):
                while block:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(block)
                    block = b""
                    if frame.eof:
                        block, frame = frame.unused_data, None
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from None
    if frame is not None:
        raise EOFError("it ends within a frame")


# cutting

# between a letter or digit and the one space or line end before the next: GPT-2-like pre-tokenizers attach a space
# to the word that follows it, never join a letter to a space after it, and keep such a line end to itself
_CUT = re.compile(r"(?<=[^\W_])(?=[ \n][^\W_])")
_LONGEST = 16
"""A piece of this many times the requested size is cut anywhere: memory must not depend on the text."""


def text_pieces(text: str | Iterable[str], size: int) -> Iterator[str]:
    """Consecutive pieces, of about `size` characters each, of a text that is given whole or in blocks.

    No tokenizer that we train or support joins characters across a cut: each piece but the last ends where a word
    ends, and the next begins with the space or line end that follows. Only where there is no such place for
    `16 * size` characters is the text cut anywhere. The cuts depend on the text and `size`, not on the blocks.
    """
    assert size > 0, size
    buffer, searched = "", size
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
            start, searched = cut, cut + size
        buffer, searched = buffer[start:], searched - start
    if buffer:
        yield buffer


# normalising

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _text8_byte_table() -> bytes:
    table = bytearray(b" " * 256)
    for code in range(ord("a"), ord("z") + 1):
        table[code] = code
        table[code - 32] = code
    for code in range(ord("0"), ord("9") + 1):
        table[code] = code
    return bytes(table)


_TEXT8_TABLE = _text8_byte_table()


def normalize(text: str, how: Normalization) -> str:
    """`text` itself for `"none"`, `normalize_text8(text)` for `"text8"`."""
    return normalize_text8(text) if how == "text8" else text


def normalize_text8(text: str) -> str:
    """Text in the TEXT8 alphabet, as `wikifil.pl` writes it (Mahoney 2006).

    ASCII upper case becomes lower case and each digit its English name between spaces. Everything else that is not
    `a`-`z` (non-ASCII letters and `<|endoftext|>` separators, too) becomes a space, and runs of spaces one space. The
    result begins with one space and has none at its end; a text without letters or digits gives `" "`. Idempotent.
    """
    # On UTF-8 bytes: every byte of a non-ASCII character becomes a space, and runs collapse.
    # errors="replace": a lone surrogate has no UTF-8 form; its "?" becomes a space like any other symbol.
    data = text.encode("utf-8", errors="replace").replace(b"<|endoftext|>", b" ").translate(_TEXT8_TABLE)
    for digit, name in enumerate(_DIGITS):
        data = data.replace(str(digit).encode(), f" {name} ".encode())
    codes = np.frombuffer(b" " + data, dtype=np.uint8)
    is_letter = codes != ord(" ")
    if not is_letter.any():
        return " "
    keep = is_letter.copy()
    keep[:-1] |= is_letter[1:]  # of a run of spaces only the last stays, and only before a letter
    return codes[keep].tobytes().decode("ascii")
