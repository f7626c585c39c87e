"""Fixtures shared by the data tests."""

import random
import socket
from pathlib import Path

import pytest

from tarflowlm.files import sources_dir


@pytest.fixture(autouse=True)
def private_places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """No test reads or fills the user's cache, or finds files in the current directory."""
    monkeypatch.setenv("TARFLOWLM_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def words() -> str:
    """20,000 characters or so of repetitive lower-case text in the TEXT8 alphabet; begins with a
    space.
    """
    rng = random.Random(5)
    vocabulary = (
        "the cat sat on a mat and saw nine old men quick dogs brown jump over lazy fox with zebra"
    )
    return " " + " ".join(rng.choice(vocabulary.split()) for _ in range(5000))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name can be resolved."""

    def unresolved(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setattr("urllib.request.getproxies", dict)


@pytest.fixture
def text_file(tmp_path: Path, words: str) -> Path:
    """A file of `words`."""
    path = tmp_path / "words.txt"
    path.write_text(words, encoding="utf-8")
    return path


@pytest.fixture
def in_parts(private_places: None) -> list[str]:
    """Documents of made-up words, in three parquet files where OpenWebText is looked for."""
    rng = random.Random(3)
    syllables = ["ka", "lo", "mi", "Ne", "tu", "s", "r", "\u00e9", "10"]
    documents = ["", '"Quoted" from the start', "12 \U0001f600", "the\nend\n"]
    for _ in range(900):
        words = ("".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(60))
        documents.append(" ".join(words) + ".")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = sources_dir() / "openwebtext"
    folder.mkdir(parents=True)
    for i in range(3):
        part = documents[i * len(documents) // 3 : (i + 1) * len(documents) // 3]
        parquet.write_table(pyarrow.table({"text": part}), folder / f"train-{i}.parquet")
    return documents
