"""OpenWebText's schema from local parquet files, through the `datasets` library."""

import builtins
import json
import lzma
import random
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from tarflowlm.data import (
    BPETokenizer,
    TokenizerConfig,
    build_tokenizer,
    cached_corpus,
    normalize_text8,
    prepare_corpus,
)
from tarflowlm.data.bpe import train_bpe
from tarflowlm.data.download import sources_dir
from tarflowlm.data.openwebtext import OPENWEBTEXT, SEPARATOR, Documents
from tarflowlm.data.stream import SPLITS, split_of_document
from tarflowlm.errors import UserError

datasets = pytest.importorskip("datasets")
NONE = {"kind": "bpe", "normalize": "none"}


def write_parquet(folder: Path, documents: list, num_files: int = 3, column: str = "text") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(documents) // num_files)
    for i in range(num_files):
        part = datasets.Dataset.from_dict({column: documents[i * size : (i + 1) * size]})
        part.to_parquet(folder / f"train-{i:05d}-of-{num_files:05d}.parquet")


def gpt2_like(text: str, vocab_size: int) -> BPETokenizer:
    """Byte-level BPE with the separator as its last token, as GPT-2's is."""
    trained = train_bpe([text], vocab_size - 1, alphabet=None, normalization="none")
    library = tokenizers.Tokenizer.from_str(json.dumps(json.loads(trained.to_json())["tokenizers"]))
    library.add_special_tokens([SEPARATOR])
    return BPETokenizer(library.to_str())


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Articles where the shared corpus is here, else made-up ones; short and long, some odd."""
    shared = Path(__file__).parents[2] / ".." / "shared" / "data" / "english_raw.txt.xz"
    if shared.exists():
        with lzma.open(shared, "rt", encoding="utf-8") as file:
            texts = file.read(400_000).split(f"\n{SEPARATOR}\n")[:-1]
        texts = [paragraph for text in texts for paragraph in text.split("\n")]
    else:
        rng = random.Random(3)
        syllables = ["ka", "lo", "mi", "Ne", "tu", "s", "r", "\u00e9", "10"]
        texts = [
            " ".join("".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 120))) + "."
            for _ in range(900)
        ]
    return ["", '"Quoted" from the start', "12 \U0001f600", "the\nend\n", *texts]


@pytest.fixture(scope="module")
def tokenizer(documents) -> BPETokenizer:
    return gpt2_like(" ".join(documents), 500)


@pytest.fixture
def corpus_files(documents) -> None:
    write_parquet(sources_dir() / "openwebtext", documents)


def by_split(documents: list[str]) -> dict[str, list[str]]:
    splits = {split: [] for split in SPLITS}
    for document in documents:
        splits[split_of_document(document, OPENWEBTEXT.percent)].append(document)
    return splits


@pytest.mark.usefixtures("corpus_files")
def test_every_document_is_in_one_split_once_and_in_order(documents, tokenizer, tmp_path):
    corpus = prepare_corpus("openwebtext", tokenizer, tmp_path / "out")
    expected = by_split(documents)
    assert len(expected["train"]) > 0.95 * len(documents)
    for split, held in expected.items():
        assert held
        ids = np.asarray(corpus.split(split))
        assert ids.dtype == np.dtype("<u2")
        # as the library encodes each document alone, and one separator
        alone = [tokenizer.encode(document).tolist() for document in held]
        assert ids.tolist() == [i for document in alone for i in [*document, 499]]
        assert corpus.num_characters(split) == sum(len(document) + len(SEPARATOR) for document in held)
        assert tokenizer.decode(ids) == "".join(document + SEPARATOR for document in held)
    corpus.verify()


@pytest.mark.usefixtures("corpus_files")
def test_the_name_prepares_into_the_cache(documents, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "gpt2.json")
    config = TokenizerConfig(kind="bpe", source=str(tmp_path / "gpt2.json"), normalize="none")
    calls = []
    corpus = cached_corpus("openwebtext", config, progress=lambda *call: calls.append(call))
    assert [Path(file.path).name for file in corpus.meta.files] == [
        f"train-0000{i}-of-00003.parquet" for i in range(3)
    ]
    total = sum(corpus.num_characters(split) for split in SPLITS)
    assert calls[-1] == ("encode", total, total)
    # the shards stand alone
    for file in (sources_dir() / "openwebtext").iterdir():
        file.unlink()
    assert cached_corpus("openwebtext", config).meta == corpus.meta


@pytest.mark.usefixtures("corpus_files")
def test_bpe_can_be_trained_on_it(documents, tmp_path):
    config = TokenizerConfig(vocab_size=300, **NONE)
    corpus = prepare_corpus("openwebtext", config, tmp_path / "out")
    train = [document + SEPARATOR for document in by_split(documents)["train"]]
    assert corpus.tokenizer.fingerprint == build_tokenizer(config, train).fingerprint


@pytest.mark.usefixtures("corpus_files")
def test_normalised_documents_are_joined_by_spaces(documents, tmp_path):
    corpus = prepare_corpus("openwebtext", TokenizerConfig(), tmp_path / "out")
    for split, held in by_split(documents).items():
        text = corpus.tokenizer.decode(np.asarray(corpus.split(split)))
        assert text == normalize_text8(SEPARATOR.join(held))


@pytest.mark.usefixtures("corpus_files")
@pytest.mark.parametrize("normalization", ["none", "text8"])
def test_every_cursor_leads_to_the_rest(normalization):
    source = Documents(replace(OPENWEBTEXT, block=20_000))
    batches = list(source.stream(normalization).batches)
    cursors = [i for i, batch in enumerate(batches) if batch.cursor is not None]
    assert len(cursors) > 5
    for i in cursors:
        cursor = json.loads(json.dumps(batches[i].cursor))
        rest = [batch[:2] for batch in Documents(source.spec).stream(normalization, cursor).batches]
        assert rest == [batch[:2] for batch in batches[i + 1 :]]


def test_another_schema_is_refused(documents, tokenizer, tmp_path):
    folder = sources_dir() / "openwebtext"
    write_parquet(folder, documents[:9], column="content")
    with pytest.raises(UserError, match=r"no column 'text' but content: .* into .*openwebtext"):
        prepare_corpus("openwebtext", tokenizer, tmp_path / "out")
    write_parquet(folder, [*documents[:9], None])
    with pytest.raises(UserError, match=r"holds None instead of a document's text"):
        prepare_corpus("openwebtext", tokenizer, tmp_path / "out")
    (folder / "train-00000-of-00003.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"cannot read openwebtext \(.*\): check the connection") as caught:
        prepare_corpus("openwebtext", tokenizer, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} <= {".out.lock"}


def test_offline_says_what_to_put_where(tokenizer, tmp_path, monkeypatch):
    def unresolved(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    message = rf"offline.*put the parquet files of .*Skylion007/openwebtext into {sources_dir() / 'openwebtext'}"
    with pytest.raises(UserError, match=message) as caught:
        prepare_corpus("openwebtext", tokenizer, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_without_the_package_the_remedy_is_named(tokenizer, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs the datasets package: pip install 'tarflowlm\[data\]'"):
        prepare_corpus("openwebtext", tokenizer, tmp_path / "out")
