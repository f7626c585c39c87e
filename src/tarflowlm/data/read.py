"""Plain and compressed UTF-8 text files."""

import gzip
import hashlib
import lzma
import os
import zipfile
import zlib
from pathlib import Path

from tarflowlm.errors import UserError

_BLOCK = 1 << 20


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file: `.gz`, `.xz`, `.zst` and one-member `.zip` by suffix, anything else plain.

    Line ends stay as they are; a byte-order mark at the start is dropped. UserError for a file that is
    missing, a directory, unreadable, empty, damaged or not UTF-8, and for `.zst` without the `zstandard`
    package.
    """
    source = Path(path)
    if os.path.isdir(source):  # os.path: False, not OSError, for impossible names
        raise UserError(f"{source} is a directory: give a text file in it")
    if not os.path.exists(source):
        raise UserError(f"{source} does not exist: check the path")
    try:
        data = _decompressed(source)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(
            f"{source} is not a complete {source.suffix} file ({error}): fetch or compress it again"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from None
    if not data:
        raise UserError(f"{source} is empty: give a file with text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}): convert it to "
            "UTF-8, or give a file with a suffix .txt, .gz, .xz or .zst"
        ) from None


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _decompressed(source: Path) -> bytes:
    match source.suffix.lower():
        case ".gz":
            with gzip.open(source, "rb") as file:
                return file.read()
        case ".xz":
            with lzma.open(source, "rb") as file:
                return file.read()
        case ".zst":
            return _unzstd(source)
        case ".zip":
            return _unzip(source)
        case _:
            return source.read_bytes()


def _unzstd(source: Path) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"reading {source} needs the zstandard package: pip install 'tarflowlm[data]'") from None
    # frame by frame, as the package's streaming reader takes a cut file for a complete one
    parts: list[bytes] = []
    block = source.read_bytes()
    try:
        while block:
            decompressor = zstandard.ZstdDecompressor().decompressobj()
            parts.append(decompressor.decompress(block))
            if not decompressor.eof:
                raise EOFError("it ends within a frame")
            block = decompressor.unused_data
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from None
    return b"".join(parts)


def _unzip(source: Path) -> bytes:
    with zipfile.ZipFile(source) as archive:
        members = [info for info in archive.infolist() if not info.is_dir()]
        if len(members) != 1:
            raise UserError(f"{source} holds {len(members)} files: unpack it and give one of them")
        return archive.read(members[0])
