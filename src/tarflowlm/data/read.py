"""Plain and compressed UTF-8 text files, read block by block."""

import codecs
import gzip
import hashlib
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tarflowlm.errors import UserError

_BLOCK = 1 << 20
_ZST_BLOCK = 1 << 16  # compressed: what comes out of it has no bound of its own


def read_text(path: str | os.PathLike[str]) -> str:
    """The whole text of a file; as `text_blocks`."""
    return "".join(text_blocks(path))


def text_blocks(path: str | os.PathLike[str]) -> Iterator[str]:
    """The text of a UTF-8 file in blocks of about a megabyte: `.gz`, `.xz`, `.zst` and one-member `.zip` by suffix,
    anything else plain.

    Line ends stay as they are; a byte-order mark at the start is dropped. UserError for a file that is
    missing, a directory, unreadable, empty, damaged or not UTF-8 (possibly after some blocks), and for `.zst` without
    the `zstandard` package.
    """
    source = Path(path)
    if os.path.isdir(source):  # os.path: False, not OSError, for impossible names
        raise UserError(f"{source} is a directory: give a text file in it")
    if not os.path.exists(source):
        raise UserError(f"{source} does not exist: check the path")
    try:
        yield from _decoded(source)
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


def _decoded(source: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    for block in _byte_blocks(source):
        yield from _decode(decoder, block, position, source)
        position += len(block)
    if position == 0:
        raise UserError(f"{source} is empty: give a file with text")
    yield from _decode(decoder, b"", position, source)


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, position: int, source: Path) -> Iterator[str]:
    """Text of the `block` that begins at byte `position` of `source`; an empty one is the end."""
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
                yield from _blocks_of(file.read)
        case ".xz":
            with lzma.open(source, "rb") as file:
                yield from _blocks_of(file.read)
        case ".zst":
            yield from _unzstd(source)
        case ".zip":
            with zipfile.ZipFile(source) as archive:
                members = [info for info in archive.infolist() if not info.is_dir()]
                if len(members) != 1:
                    raise UserError(f"{source} holds {len(members)} files: unpack it and give one of them")
                with archive.open(members[0]) as file:
                    yield from _blocks_of(file.read)
        case _:
            with source.open("rb") as file:
                yield from _blocks_of(file.read)


def _blocks_of(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while block := read(_BLOCK):
        yield block


def _unzstd(source: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"reading {source} needs the zstandard package: pip install 'tarflowlm[data]'") from None
    # frame by frame, as the package's streaming reader takes a cut file for a complete one
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
