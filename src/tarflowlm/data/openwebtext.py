"""OpenWebText: documents streamed with the `datasets` library, from local parquet files or the hub."""

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tarflowlm.config import Normalization
from tarflowlm.data.download import check_hub_reachable, quiet_hub, sources_dir
from tarflowlm.data.stream import (
    SPLITS,
    Batch,
    CorpusProgress,
    Cursor,
    Notice,
    Source,
    Split,
    Stream,
    split_of_document,
)
from tarflowlm.data.text import normalize
from tarflowlm.errors import UserError, first_line

SEPARATOR = "<|endoftext|>"
"""Follows every document. One token if the tokenizer has it, as GPT-2's does."""


@dataclass(frozen=True)
class DocumentsSpec:
    """A data set of documents on the hub, and how it is split."""

    name: str
    """Name of the corpus."""
    repository: str
    """Name on the hub. Only its split `train` is read."""
    column: str = "text"
    """Column that holds the documents."""
    percent: dict[Split, int] = field(default_factory=lambda: {"train": 98, "valid": 1, "test": 1})
    """Shares of the splits. A document's split is decided by the sha256 of its text."""
    block: int = 1 << 20
    """Characters between two cursors, from which reading can be resumed."""


OPENWEBTEXT = DocumentsSpec(name="openwebtext", repository="Skylion007/openwebtext")
"""About 8 million documents, 40 GB of text. One percent each for validation and test makes 80,000 documents each,
close to the customary 100,000."""


class Documents(Source):
    """A corpus of documents, each encoded on its own and followed by `SEPARATOR`.

    Read from the parquet files in `<cache>/sources/<name>` if there are any, else streamed from the hub; only the
    tokens are kept. Under text8 normalisation a separator is a space.
    """

    def __init__(self, spec: DocumentsSpec = OPENWEBTEXT) -> None:
        self.name = self.identity = spec.name
        self.spec = spec
        self.folder = sources_dir() / spec.name

    @property
    def files(self) -> tuple[Path, ...] | None:
        return tuple(sorted(self.folder.glob("*.parquet"))) or None

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self.spec)

    def obtain(self, progress: CorpusProgress | None = None, notice: Notice | None = None) -> tuple[Path, ...]:
        try:
            import datasets  # noqa: F401
        except ImportError:
            raise UserError(f"{self.name} needs the datasets package: pip install 'tarflowlm[data]'") from None
        if self.files is None:
            try:
                check_hub_reachable()
            except ConnectionError as error:
                raise self._failure(error) from None
        return self.files or ()

    def stream(
        self, normalization: Normalization, cursor: Cursor | None = None, progress: CorpusProgress | None = None
    ) -> Stream:
        try:
            with quiet_hub():
                dataset = self._load()
                if cursor is not None:
                    dataset.load_state_dict(cursor)
        except Exception as error:  # hub, network and library errors share no base class
            raise self._failure(error) from None
        columns = dataset.column_names
        if columns is not None and self.spec.column not in columns:
            found = ", ".join(columns)
            raise UserError(f"{self.name} has no column {self.spec.column!r} but {found}: {self._remedy}")
        split = (dataset.info.splits or {}).get("train")
        # bytes, but it only serves to show progress
        return Stream(self._batches(dataset, normalization), split.num_bytes if split is not None else None)

    def _load(self) -> Any:
        import datasets

        files = self.files
        if files is None:
            return datasets.load_dataset(self.spec.repository, split="train", streaming=True)
        names = [str(file) for file in files]
        return datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)

    def _batches(self, dataset: Any, normalization: Normalization) -> Iterator[Batch]:
        texts: dict[Split, list[str]] = {split: [] for split in SPLITS}
        size = 0
        with contextlib.closing(self._documents(dataset)) as documents:
            for document in documents:
                if normalization == "text8":
                    text = normalize(document, normalization)
                    text = "" if text == " " else text
                else:
                    text = document + SEPARATOR
                texts[split_of_document(document, self.spec.percent)].append(text)
                size += len(text)
                if size >= self.spec.block:
                    yield from _flush(texts, dataset.state_dict())
                    size = 0
            yield from _flush(texts, dataset.state_dict())

    def _documents(self, dataset: Any) -> Generator[str, None, None]:
        rows = iter(dataset)
        try:
            for row in rows:
                document = row[self.spec.column]
                if not isinstance(document, str):
                    raise UserError(f"{self.name} holds {document!r} instead of a document's text: {self._remedy}")
                yield document
        except UserError:
            raise
        except Exception as error:
            raise self._failure(error) from None
        finally:
            rows.close()

    def _failure(self, error: Exception) -> UserError:
        return UserError(f"cannot read {self.name} ({first_line(error)}): {self._remedy}")

    @property
    def _remedy(self) -> str:
        return (
            f"check the connection and run the same command again, or put the parquet files of the hub's data set "
            f"{self.spec.repository} into {self.folder}"
        )


def _flush(texts: dict[Split, list[str]], cursor: Cursor) -> Iterator[Batch]:
    """Yields the gathered texts, one batch per split, and empties `texts`. Only the last batch has the cursor."""
    full = [split for split in SPLITS if texts[split]]
    for split in full:
        yield Batch(split, texts[split], cursor if split == full[-1] else None)
        texts[split] = []
