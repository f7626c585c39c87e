"""Sources of text by name: tales, stories, text8, OpenWebText, sets of the hub, and paths.

A source yields its normalised text in pieces, each with its split; `data.corpus` encodes them.
"""

import hashlib
import http.client
import io
import itertools
import os
import urllib.request
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar

from tarflowlm.config import DataConfig, Normalization
from tarflowlm.data.normalize import normalize_text8, unwrapped
from tarflowlm.data.reading import (
    BLOCK,
    FIELD,
    json_texts,
    kind_of,
    plain_line_ends,
    read_text,
    text_blocks,
    text_pieces,
)
from tarflowlm.data.splits import (
    FEW,
    SPLITS,
    Piece,
    Split,
    cut_in_three,
    fair_shares,
    place_of_document,
    split_of_document,
)
from tarflowlm.data.tokenizer import SEPARATOR
from tarflowlm.errors import SILENT, Progress, UserError, check_package, first_line
from tarflowlm.files import replacing, sources_dir, waiting_lock

HUB = "hf:"
"""Prefix of the OWNER/NAME of a set of the hub."""
Placed = Iterator[tuple[Split, Iterable[str]]]
"""Documents: the split and the text of each, in blocks."""


class Source(ABC):
    """A text. Equal settings give the same pieces every time."""

    name: str
    """The name that the user gave."""
    identity: str
    """A registered name, a set of the hub, or an absolute path, with #FIELD where it names one."""
    path: Path
    """A file, or a folder of files."""
    suffix: str = ""
    """The suffix of the files at any depth of the folder; if empty, only its own texts are read."""
    is_fixed: bool = False
    """Whether the name alone tells the text. Its files may not be on this machine yet."""
    normalization: Normalization = "none"
    unwrap: bool = False
    """Whether the lines of paragraphs are joined."""
    progress: Progress = SILENT
    has_documents: bool = True
    """Whether it holds documents; False: one text that may be cut anywhere."""
    separator: str = "\n"
    """Follows a document that is not normalised where no token can end it."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are on this machine, sorted by name."""
        if not (path := self.path).is_dir():
            return (path,) if path.is_file() else ()
        if self.suffix:
            below = [file.relative_to(path) for file in path.rglob(f"*{self.suffix}")]
            found = [path / file for file in below if "." not in {part[0] for part in file.parts}]
        else:
            found = [file for file in path.glob("[!.]*") if kind_of(file) in (".txt", ".jsonl")]
        return tuple(sorted(filter(Path.is_file, found)))

    def state(self) -> list[list[str | int]]:
        """Sizes and times that tell a changed text from this one."""
        files = () if self.is_fixed else self.files
        return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]

    def obtain(self) -> None:  # noqa: B027
        """Download and check the files that `pieces` needs."""

    def count_characters(self) -> int | None:
        """The number of characters of the normalised text; None if only reading it can tell."""
        return None

    @abstractmethod
    def placed(self) -> Placed:
        """The documents, not yet normalised."""

    def pieces(self) -> Iterator[Piece]:
        """The normalised text. Call `obtain` first."""
        for split, blocks in self.placed():
            last = ""
            for text in filter(None, self.normalized(blocks)):
                if last:
                    yield Piece(split, last)
                last = text
            if last:
                yield Piece(split, last, ends=True)

    def normalized(self, blocks: Iterable[str]) -> Iterator[str]:
        """Pieces of a document; text8 may leave some of them empty.

        In text8 they begin with a space and end without one.
        """
        if self.unwrap:
            blocks = [unwrapped("".join(blocks))]
        for piece in text_pieces(blocks, BLOCK):
            yield normalize_text8(piece).rstrip() if self.normalization == "text8" else piece


class TextFile(Source):
    """A text file, which is cut in three; or documents: the files of a folder in the order of their
    names, and the lines of .jsonl files. The text is read twice.

    `field` holds the texts of .jsonl files; if it begins with a dot, it is the suffix of the files.
    """

    def __init__(self, path: Path, field: str = "text") -> None:
        self.path = path.resolve()
        self.field = "text" if field.startswith(".") else field
        more = "" if field == "text" else FIELD + field
        self.name = f"{path}{more}"
        self.identity = f"{self.path}{more}"
        self.suffix = field if field.startswith(".") else ""
        self.has_fields = any(kind_of(file) == ".jsonl" for file in self.files)
        self.has_documents = len(self.files) > 1 or self.has_fields
        self._total = 0
        self._places: set[float] = set()

    def documents(self) -> Iterator[tuple[str, Iterable[str]]]:
        """The key of each document, the name of a file or a line itself, and its blocks."""
        for file in self.files:
            if kind_of(file) == ".jsonl":
                for text in json_texts(file, self.field):
                    yield text, [text]
            elif file == self.path or file.stat().st_size:
                yield file.relative_to(self.path).as_posix(), text_blocks(file)

    def blocks(self) -> Iterator[str]:
        """The text of all documents."""
        for _, blocks in self.documents():
            yield from blocks

    def count_characters(self) -> int:
        if not self._total:
            self.progress.stage(f"reading {self.name}, characters")
            for key, blocks in self.documents():
                size = 0
                for piece in self.normalized(blocks):
                    size += len(piece)
                    self.progress.advance(len(piece))
                if size and len(self._places) <= FEW:
                    self._places.add(place_of_document(key))
                self._total += size
            if not self._total:
                what = f"{self.normalization} normalisation leaves nothing of {self.name}"
                raise UserError(f"{what}: give a text with more, or another normalisation")
        return self._total

    def placed(self) -> Placed:
        total = self.count_characters()
        shares = fair_shares(self._places, total)
        for key, blocks in self.documents():
            yield split_of_document(key, shares), blocks

    def pieces(self) -> Iterator[Piece]:
        if self.has_documents:
            return super().pieces()
        total = self.count_characters()
        return cut_in_three(self.normalized(self.blocks()), total)


class BuiltIn(Source):
    """Documents in English, shipped in the package, in the folder of their `name`; its `README.md`
    tells what they are.

    A line `<|endoftext|>` stands between the documents of a file; a paragraph is a line.
    """

    separator = SEPARATOR
    suffix = ".txt.xz"

    def __init__(self) -> None:
        self.identity = self.name
        self.path = Path(__file__).parent / self.name

    def state(self) -> list[list[str | int]]:
        # an installation gives files new times
        return [[file.name, file.stat().st_size] for file in self.files]

    @abstractmethod
    def split_of(self, file: Path, document: str) -> Split:
        """The split of a document in a file."""

    def documents(self) -> list[str]:
        """The documents of all files, without the lines between them."""
        return [document for _, blocks in self.placed() for document in blocks]

    def placed(self) -> Placed:
        for file in self.files:
            text = read_text(file).removesuffix(f"{SEPARATOR}\n").removesuffix("\n")
            for document in text.split(f"\n{SEPARATOR}\n"):
                yield self.split_of(file, document), [document]


class Tales(BuiltIn):
    """Fairy tales and children's stories in English, in the public domain.

    2,783 documents, 25 million characters, each a tale, a short story or a chapter, whose first
    line is its title. The hash of that line gives the split, so one tale in several translations
    under one title is in one split. `data/tales/README.md` tells how they were made, and
    `data/tales/books.tsv` names every book.
    """

    name = "tales"

    def split_of(self, file: Path, document: str) -> Split:
        return split_of_document(document.partition("\n")[0])


class Stories(BuiltIn):
    """Short stories in the words of a four-year-old: about 2 % of TinyStories (Eldan and Li 2023),
    under the licence CDLA-Sharing-1.0.

    48,731 documents, 39 million characters, in one file for each split: the stories of validation
    and test come from the validation part of TinyStories. A figure on them is not one on
    TinyStories.
    """

    name = "stories"

    def split_of(self, file: Path, document: str) -> Split:
        return next(split for split in SPLITS if file.name == f"{self.name}_{split}{self.suffix}")


class Text8(TextFile):
    """TEXT8 (Mahoney 2006), the first 10^8 characters of a cleaned English Wikipedia.

    Cut 90M/5M/5M as is customary. Downloaded into the cache. It is in its alphabet already, so no
    normalisation is applied.
    """

    is_fixed = True
    url: ClassVar = "http://mattmahoney.net/dc/text8.zip"
    md5: ClassVar = "3bea1919949baf155f99411df5fada7e"

    def __init__(self) -> None:
        super().__init__(sources_dir() / "text8")
        self.name = self.identity = "text8"

    def obtain(self) -> None:
        if not self.path.is_file():
            self.progress.stage(f"fetching {self.url}, 31 MB")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with urllib.request.urlopen(self.url, timeout=30) as response:
                    archive = zipfile.ZipFile(io.BytesIO(response.read()))
                text = archive.read("text8")
            except (OSError, http.client.HTTPException, zipfile.BadZipFile, KeyError) as error:
                what = f"cannot fetch {self.url} ({first_line(error)})"
                remedy = f"put text8, unpacked, into {self.path.parent}"
                raise UserError(f"{what}: {remedy}") from None
            with replacing(self.path) as temporary:
                temporary.write_bytes(text)
        if hashlib.md5(self.path.read_bytes()).hexdigest() != self.md5:
            raise UserError(f"{self.path} is not text8, whose md5 is {self.md5}: remove it")

    def normalized(self, blocks: Iterable[str]) -> Iterator[str]:
        return text_pieces(blocks, BLOCK)


class Documents(Source):
    """Documents in parquet files. The hash of a document gives its split.

    With a `repository`, OWNER/NAME or a folder in it, the files of that set of the hub are
    downloaded.
    """

    separator = SEPARATOR
    suffix = ".parquet"

    def __init__(self, name: str, path: Path, field: str = "text", repository: str = "") -> None:
        self.name = name
        self.identity = name if repository else f"{path.resolve()}{FIELD}{field}"
        self.path = path
        self.field = field
        self.repository = repository
        self.is_fixed = bool(repository)

    def obtain(self) -> None:
        check_package("pyarrow", "data", self.name)
        if self.files:
            return
        import huggingface_hub

        # another name until it is complete; the client continues a download that a kill left there
        incomplete = self.path.with_name(f"{self.path.name}.partial")
        owner, name, *inner = self.repository.split("/")
        files = "/".join([*inner, "*.parquet"])
        try:
            with waiting_lock(self.path):
                if self.files:
                    return  # another process had the lock
                # with a commit, the client checks that all of its files are there
                commit = huggingface_hub.HfApi().dataset_info(f"{owner}/{name}").sha
                huggingface_hub.snapshot_download(
                    f"{owner}/{name}",
                    repo_type="dataset",
                    revision=commit,
                    allow_patterns=files,
                    local_dir=incomplete,
                )
                if not any(incomplete.rglob("*.parquet")):
                    raise ValueError(f"it has no {files}")
                incomplete.rename(self.path)
        except Exception as error:  # hub, network and library errors share no base class
            what = f"cannot fetch {self.name} ({first_line(error)})"
            remedy = f"run this again, or put the hub's {self.repository} into {self.path}"
            raise UserError(f"{what}: {remedy}") from None

    def placed(self) -> Placed:
        from pyarrow import parquet

        path = self.path
        try:
            split = self.splitter()
            for path in self.files:
                for batch in parquet.ParquetFile(path).iter_batches(columns=[self.field]):
                    for document in batch.column(0).drop_null().to_pylist():
                        if not isinstance(document, str):
                            raise TypeError(f"{document!r:.40} is not a text")
                        yield split(document), [plain_line_ends(document)]
        except (OSError, LookupError, TypeError, ValueError) as error:
            what = f"cannot read the column {self.field} of {path} ({first_line(error)})"
            remedy = f"get it again, or name a column of texts, as SOURCE{FIELD}COLUMN"
            raise UserError(f"{what}: {remedy}") from None

    def splitter(self) -> Callable[[str], Split]:
        """The split of each document in turn, by `fair_shares`."""
        # compression leaves half of the characters
        characters = 2 * sum(file.stat().st_size for file in self.files)
        return partial(split_of_document, shares=fair_shares(set(), characters))


class OpenWebText(Documents):
    """About 8 million web pages, 40 GB.

    The last 100,000 are the validation split, on which MDLM and its successors give perplexities;
    they train on all others. Our test split is 1 % of these, chosen by hash.
    """

    num_valid: ClassVar = 100_000
    """Documents of the validation split, but at most 1 in 80."""
    shares: ClassVar = (99.0, 99.0)
    """Cumulative percentages of train and valid among the other documents."""

    def __init__(self) -> None:
        folder = sources_dir() / "openwebtext"
        super().__init__("openwebtext", folder, repository="Skylion007/openwebtext")

    def splitter(self) -> Callable[[str], Split]:
        from pyarrow import parquet

        total = sum(parquet.read_metadata(file).num_rows for file in self.files)
        first_valid = total - min(self.num_valid, max(1, total // 80))
        numbers = itertools.count()

        def split(document: str) -> Split:
            is_valid = next(numbers) >= first_valid
            return "valid" if is_valid else split_of_document(document, self.shares)

        return split


_REGISTRY: dict[str, Callable[[], Source]] = {
    "tales": Tales,
    "stories": Stories,
    "text8": Text8,
    "openwebtext": OpenWebText,
}
SOURCE_NAMES = tuple(_REGISTRY)


def split_field(source: str) -> tuple[str, str]:
    """The path of a text and the field that `source` names; a path may have the sign itself."""
    whole = os.path.expanduser(source)
    if FIELD not in whole or os.path.exists(whole):
        return whole, ""
    path, _, field = whole.rpartition(FIELD)
    return path, field


def resolve_source(
    text: DataConfig, normalization: Normalization = "none", *, progress: Progress = SILENT
) -> Source:
    """The registered source of that name, or the text at that path; nothing is downloaded yet."""
    source = text.source
    path, named = split_field(source)
    field = named or "text"
    if source in _REGISTRY:
        found: Source = _REGISTRY[source]()
    elif path.startswith(HUB):
        repository = path.removeprefix(HUB)
        if "/" not in repository:
            raise UserError(f"{source}: name a set of the hub as {HUB}OWNER/NAME{FIELD}FIELD")
        folder = sources_dir() / repository.replace("/", "--")
        found = Documents(source, folder, field, repository)
    elif not os.path.exists(path):  # os.path: False, not OSError, for impossible names
        remedy = f"give a text file, a folder of them, or one of {', '.join(_REGISTRY)}"
        raise UserError(f"{source!r} is neither a file nor the name of a corpus: {remedy}")
    else:
        texts = TextFile(Path(path), field)
        is_folder = os.path.isdir(path)
        by_suffix = is_folder and field.startswith(".")
        is_parquet = path.endswith(".parquet") or (is_folder and not by_suffix and not texts.files)
        if named and not is_parquet and not by_suffix and not texts.has_fields:
            raise UserError(f"{source}: {path} has no fields, leave {FIELD}{named} out")
        found = Documents(source, Path(path), field) if is_parquet else texts
        if is_folder and not by_suffix and texts.files and Documents("", Path(path), field).files:
            rule = f"name the suffix of its texts, say {path}{FIELD}.txt, or one of those"
            raise UserError(f"the folder {path} holds .parquet files beside texts: {rule}")
        if not found.files and not is_folder:
            raise UserError(f"{path} is no regular file: give a text file, or a folder of them")
        if not found.files:
            others = Counter(file.suffix for file in Path(path).rglob("?*.?*") if file.is_file())
            kind = next(iter(others.most_common(1)), (".py", 0))[0]
            kinds = f"{field} files" if by_suffix else ".txt, .jsonl or .parquet files"
            remedy = f"name the suffix of its texts, say {path}{FIELD}{kind}"
            raise UserError(f"the folder {path} holds no {kinds}: {remedy}")
        for file in (Path(path).resolve(), *found.files):
            if os.fsencode(file) != str(file).encode(errors="ignore"):
                raise UserError(f"the name {str(file)!a} is not UTF-8: rename it")
    found.normalization = normalization
    found.unwrap = text.unwrap
    found.progress = progress
    return found
