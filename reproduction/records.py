"""Records of finished trainings, a line each, in records.jsonl.

A page is printed without weights if all its measurements are on record. So its trainings may come
from several machines, and anyone can print the page again.
"""

import json
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from tarflowlm.config import RunConfig
from tarflowlm.errors import UserError
from tarflowlm.files import read_json, replacing, sha256_of, waiting_lock
from tarflowlm.runs import CONFIG, SUMMARY, WEIGHTS
from tarflowlm.schema import flatten, from_dict, to_dict
from tarflowlm.training.configure import settled

RECORDS = "records.jsonl"

T = TypeVar("T")


@dataclass
class Record:
    """A finished training."""

    name: str
    config: dict[str, Any]
    """The configuration that was asked for, without the folders of its files."""
    summary: dict[str, Any]
    """The run's own results."""
    machine: str
    """The processor that trained it, and the versions."""
    hashes: dict[str, str]
    """The first 12 digits of the sha256 of its configuration and its weights."""
    measured: dict[str, Any] = field(default_factory=dict)
    """Measurement -> its numbers, as JSON values."""
    files: dict[str, str] = field(default_factory=dict)
    """`digests` of the configuration: they tell files of one name apart."""


class Records:
    """The records in a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RECORDS
        self._by_name = self._read()

    def _read(self) -> dict[str, Record]:
        """The records in the file, by their names."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        try:
            records = [Record(**json.loads(line)) for line in lines]
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path} is damaged ({error}): restore or remove it") from None
        return {record.name: record for record in records}

    def __iter__(self) -> Iterator[Record]:
        """All records, by their names."""
        return (record for _, record in sorted(self._by_name.items()))

    def find(self, name: str, run: RunConfig) -> Record | None:
        """The record of a training, or None.

        A field that is younger than the record had its default value. UserError if the record has
        another configuration, or another file under one of its names, with the first field that
        differs.
        """
        record = self._by_name.get(name)
        if record is None:
            return None
        ours = flatten(portable(run))
        theirs = flatten(from_dict(RunConfig, record.config, where=f"{self.path}, {name}."))
        for key in ours | theirs:
            if ours.get(key) != theirs.get(key):
                raise UserError(
                    f"{key} {ours.get(key)}: {name} in {self.path} has {theirs.get(key)}; "
                    "choose another --out"
                )
        for key, digest in (digests(run) if record.files else {}).items():
            if record.files.get(key, digest) != digest:
                raise UserError(
                    f"{key} {ours[key]}: {name} in {self.path} has another file of this name; "
                    "choose another --out"
                )
        return record

    def add(self, name: str, run: RunConfig, directory: Path, device: torch.device) -> Record:
        """Record the finished run in `directory`."""
        record = Record(
            name=name,
            config=to_dict(portable(run)),
            summary=read_json(directory / SUMMARY),
            machine=machine(device),
            hashes={file: sha256_of(directory / file)[:12] for file in (CONFIG, WEIGHTS)},
            files=digests(run),
        )
        self._by_name[name] = record
        self.save()
        return record

    def measured(self, record: Record, what: str, measure: Callable[[], T]) -> T:
        """The result of the measurement `what`, JSON values; it is made only once."""
        if what not in record.measured:
            record.measured[what] = measure()
            self.save()
        return record.measured[what]

    def save(self) -> None:
        """Write the records, beside those that another command has written since."""
        with waiting_lock(self.path):
            for name, theirs in self._read().items():
                ours = self._by_name.setdefault(name, theirs)
                if ours.hashes == theirs.hashes:
                    ours.measured = theirs.measured | ours.measured
            lines = [json.dumps(vars(record)) for record in self]
            with replacing(self.path) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def portable(run: RunConfig) -> RunConfig:
    """`run` settled, but with the names of its files instead of their paths on this machine."""
    data = settled(run).data
    text, tokenizer = (
        Path(source).name if Path(source).is_absolute() else source
        for source in (data.source, data.tokenizer.source)
    )
    named = replace(data.tokenizer, source=tokenizer)
    return replace(run, data=replace(data, source=text, tokenizer=named))


def digests(run: RunConfig) -> dict[str, str]:
    """Field of `run` -> the first 12 digits of the sha256 of its file, if that is here."""
    data = settled(run).data
    paths = {"data.source": data.source, "data.tokenizer.source": data.tokenizer.source}
    found = {key: Path(path) for key, path in paths.items()}
    return {
        key: sha256_of(path)[:12]
        for key, path in found.items()
        if path.is_absolute() and path.is_file()
    }


def machine(device: torch.device) -> str:
    """The processor in use, and the versions that affect numbers."""
    versions = [
        f"tarflowlm {version('tarflowlm')}",
        f"PyTorch {torch.__version__}",
        f"Python {platform.python_version()}",
    ]
    return f"{_hardware(device)}; {', '.join(versions)}"


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")  # of Linux
    text = cpus.read_text(encoding="utf-8") if cpus.exists() else ""
    found = re.search(r"^model name\s*: *(.*)", text, re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} {'thread' if threads == 1 else 'threads'}, {device.type}"
