"""From the name that a user gives to a source: a text by its name, a set of the hub, or a path."""

import os
from collections.abc import Callable
from pathlib import Path

from tarflowlm.config import DataConfig, Normalization
from tarflowlm.data.built_in import Stories, Tales
from tarflowlm.data.parquet import OpenWebText, ParquetFiles
from tarflowlm.data.reading import FIELD
from tarflowlm.data.source import Source
from tarflowlm.data.text_files import Text8, TextFiles
from tarflowlm.errors import SILENT, Progress, UserError
from tarflowlm.files import sources_dir

HUB = "hf:"
"""Prefix of the OWNER/NAME of a set of the hub."""
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
    path, field = split_field(source)
    if source in _REGISTRY:
        found = _REGISTRY[source]()
    elif path.startswith(HUB):
        repository = path.removeprefix(HUB)
        if "/" not in repository:
            raise UserError(f"{source}: name a set of the hub as {HUB}OWNER/NAME{FIELD}FIELD")
        folder = sources_dir() / repository.replace("/", "--")
        found = ParquetFiles(source, folder, field or "text", repository)
    elif not os.path.exists(path):  # os.path: False, not OSError, for impossible names
        remedy = f"give a text file, a folder of them, or one of {', '.join(_REGISTRY)}"
        raise UserError(f"{source!r} is neither a file nor the name of a corpus: {remedy}")
    else:
        found = _at_path(source, path, field)
    found.normalization = normalization
    found.unwrap = text.unwrap
    found.progress = progress
    return found


def _at_path(source: str, path: str, named: str) -> Source:
    """The file or folder `path` that `source` names, with a field or suffix if one is `named`."""
    field = named or "text"
    texts = TextFiles(Path(path), field)
    tables = ParquetFiles(source, Path(path), field)
    is_folder = os.path.isdir(path)
    by_suffix = is_folder and field.startswith(".")
    is_parquet = path.endswith(".parquet") or (is_folder and not by_suffix and not texts.files)
    if named and not is_parquet and not by_suffix and not texts.has_fields:
        raise UserError(f"{source}: {path} has no fields, leave {FIELD}{named} out")
    if is_folder and not by_suffix and texts.files and tables.files:
        rule = f"name the suffix of its texts, say {path}{FIELD}.txt, or one of those"
        raise UserError(f"the folder {path} holds .parquet files beside texts: {rule}")
    if Path(path).suffix.lower() in (".csv", ".tsv") and not is_folder:
        rule = "write its column of texts as lines of a .jsonl file, or a column of .parquet"
        raise UserError(f"{path} is a table: {rule}; named .txt it is read with its commas")
    found = tables if is_parquet else texts
    if not found.files and not is_folder:
        raise UserError(f"{path} is no regular file: give a text file, or a folder of them")
    if not found.files:
        kind = next(iter(found.skipped.most_common(1)), (".py", 0))[0]
        kinds = f"{field} files" if by_suffix else ".txt, .jsonl or .parquet files"
        remedy = f"name the suffix of its texts, say {path}{FIELD}{kind}"
        raise UserError(f"the folder {path} holds no {kinds}: {remedy}")
    for file in (Path(path).resolve(), *found.files):
        if os.fsencode(file) != str(file).encode(errors="ignore"):
            raise UserError(f"the name {str(file)!a} is not UTF-8: rename it")
    return found
