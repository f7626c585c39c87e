"""Documents in parquet files, of the user's own or of a set of the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from tarflowlm.data.library import SEPARATOR
from tarflowlm.data.reading import FIELD, plain_line_ends
from tarflowlm.data.source import Source, Text
from tarflowlm.data.splits import fair_shares
from tarflowlm.errors import UserError, check_package, first_line
from tarflowlm.files import sources_dir, waiting_lock


class ParquetFiles(Source):
    """The texts in the column `field` of parquet files. The hash of a text gives its split.

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

    def texts(self) -> Iterator[Text]:
        from pyarrow import parquet

        for file in self.files:
            with self._reading(file):
                for batch in parquet.ParquetFile(file).iter_batches(columns=[self.field]):
                    for document in batch.column(0).drop_null().to_pylist():
                        if not isinstance(document, str):
                            raise TypeError(f"{document!r:.40} is not a text")
                        yield Text([plain_line_ends(document)], key=document)

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, LookupError, TypeError, ValueError) as error:
            what = f"cannot read the column {self.field} of {path} ({first_line(error)})"
            remedy = f"get it again, or name a column of texts, as SOURCE{FIELD}COLUMN"
            raise UserError(f"{what}: {remedy}") from None

    @property
    def shares(self) -> tuple[float, float]:
        # compression leaves half of the characters
        return fair_shares(set(), 2 * sum(file.stat().st_size for file in self.files))


class OpenWebText(ParquetFiles):
    """About 8 million web pages, 40 GB.

    The last 100,000 are the validation split, on which MDLM and its successors give perplexities;
    they train on all others. Our test split is 1 % of these, chosen by hash.
    """

    shares = 99.0, 99.0
    num_valid: ClassVar = 100_000
    """Documents of the validation split, but at most 1 in 80."""

    def __init__(self) -> None:
        folder = sources_dir() / "openwebtext"
        super().__init__("openwebtext", folder, repository="Skylion007/openwebtext")

    def texts(self) -> Iterator[Text]:
        from pyarrow import parquet

        with self._reading(self.path):
            total = sum(parquet.read_metadata(file).num_rows for file in self.files)
        first_valid = total - min(self.num_valid, max(1, total // 80))
        for number, text in enumerate(super().texts()):
            yield text if number < first_valid else text._replace(split="valid")
