"""TEXT8 (Mahoney 2006): the first 10^8 characters of a cleaned English Wikipedia; fetched once, and checked."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tarflowlm.data.fetch import fetch
from tarflowlm.data.normalize import TEXT8_ALPHABET, Normalization
from tarflowlm.data.read import text_blocks
from tarflowlm.data.sources import CorpusProgress, Cursor, Notice, Stream, TextFile, sources_dir
from tarflowlm.errors import UserError


@dataclass(frozen=True)
class TextSpec:
    """Where a text in the TEXT8 alphabet comes from, and what it must be."""

    url: str
    """Of a zip archive that holds the text as its only member."""
    size: int
    """Characters."""
    prefix_size: int
    prefix_sha256: str
    """Of the first `prefix_size` characters; another text is refused."""
    known_size: int
    known_sha256: str
    """Of the first `known_size` characters, which come from one source only; another text is warned of."""


TEXT8 = TextSpec(
    url="http://mattmahoney.net/dc/text8.zip",
    size=100_000_000,
    prefix_size=16_384,
    prefix_sha256="eaa5fcd1274856642d8adbdbbb56ee4a329f893bb1eda45760a3001f7e000286",
    known_size=3_010_294,
    known_sha256="f3413b8d00bc41ef9dda3f92d1c7d028545d385ed476e518fdb0491f57e5a137",
)


class Text8(TextFile):
    """The corpus `text8`, cut 90M/5M/5M as is customary.

    Taken from `text8` or `text8.zip` in the current directory, ./data or the cache; fetched into the cache where it
    is in none of them. It is in its alphabet already, so no normalisation changes it.
    """

    def __init__(self, spec: TextSpec = TEXT8) -> None:
        super().__init__(_place() or sources_dir() / "text8.zip")
        self.name = self.identity = "text8"
        self.spec = spec

    @property
    def files(self) -> tuple[Path, ...] | None:
        return (self.path,) if self.path.is_file() else None

    def obtain(self, progress: CorpusProgress | None = None, notice: Notice | None = None) -> tuple[Path, ...]:
        url = self.spec.url
        if self.path.is_file():
            self._check(self.path, str(self.path), f"put text8 or text8.zip from {url} in its place", notice)
            return (self.path,)
        where = f"into {self.path.parent}"

        def check(path: Path) -> None:
            self._check(path, f"what {url} sends", f"put text8 or text8.zip from another place {where}", notice)

        def report(done: int, total: int | None) -> None:
            if progress is not None:
                progress("fetch", done, total)

        try:
            fetch(url, self.path, check=check, progress=report)
        except OSError as error:
            raise UserError(f"cannot fetch {url} ({error}): put text8 or text8.zip from there {where}") from None
        return (self.path,)

    def stream(
        self, normalization: Normalization, cursor: Cursor | None = None, progress: CorpusProgress | None = None
    ) -> Stream:
        return super().stream("none", cursor, progress)

    def _check(self, path: Path, name: str, remedy: str, notice: Notice | None) -> None:
        """UserError unless `path` holds what `spec` describes; a notice where only its later part differs."""
        spec = self.spec
        prefix, known = hashlib.sha256(), hashlib.sha256()
        size = 0
        for block in text_blocks(path):
            data = block.encode("utf-8")
            if foreign := data.translate(None, TEXT8_ALPHABET.encode()):
                found = foreign.decode("utf-8")[0]
                raise UserError(f"{name} is not text8, it holds {found!r} beside a-z and spaces: {remedy}")
            prefix.update(data[: max(0, spec.prefix_size - size)])
            known.update(data[: max(0, spec.known_size - size)])
            size += len(data)
        if size != spec.size:
            raise UserError(f"{name} is not text8, it has {size:,} characters instead of {spec.size:,}: {remedy}")
        if prefix.hexdigest() != spec.prefix_sha256:
            raise UserError(f"{name} is not text8, its first {spec.prefix_size:,} characters differ: {remedy}")
        if known.hexdigest() != spec.known_sha256 and notice is not None:
            notice(
                f"{name} differs from the text8 that this program knows between characters {spec.prefix_size:,} and "
                f"{spec.known_size:,}: results may not be comparable with published ones"
            )


def _place() -> Path | None:
    """Where text8 lies, if it does."""
    folders = (Path(), Path("data"), sources_dir())
    files = (folder / name for folder in folders for name in ("text8", "text8.zip"))
    return next((file for file in files if file.is_file()), None)
