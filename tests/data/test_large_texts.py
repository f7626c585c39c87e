"""Texts of many files: sets of the hub, token shards."""

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from helpers import prepared
from tarflowlm.data import DataConfig, TokenizerConfig
from tarflowlm.data.bpe import train_bpe
from tarflowlm.data.sources import resolve_source
from tarflowlm.data.splits import SPLITS, cut_in_three, fair_shares, split_of_document
from tarflowlm.errors import UserError
from tarflowlm.files import sources_dir

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

BYTES = TokenizerConfig(kind="byte", normalize="none")


def rows(number: int) -> dict[str, list[object]]:
    """Documents in the columns of FineWeb-Edu."""
    rng = random.Random(number)
    texts = [" ".join(rng.choices(["red", "blue", "\u00e9t\u00e9"], k=9)) for _ in range(60)]
    return {
        "text": [*texts, None],
        "id": [f"<urn:uuid:{number}-{i}>" for i in range(61)],
        "dump": ["CC-MAIN-2024-10"] * 61,
        "url": ["https://example.org"] * 61,
        "file_path": ["s3://commoncrawl/a.warc.gz"] * 61,
        "language": ["en"] * 61,
        "language_score": [0.9] * 61,
        "token_count": [9] * 61,
        "score": [2.9] * 61,
        "int_score": [3] * 61,
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of parquet files as the hub has them."""
    found = tmp_path / "edu" / "sample"
    found.mkdir(parents=True)
    for number in range(3):
        parquet.write_table(pyarrow.table(rows(number)), found / f"{number:03d}.parquet")
    return found.parent


def texts_of(corpus) -> dict[str, str]:
    return {split: corpus.tokenizer.decode(np.asarray(corpus.split(split))) for split in SPLITS}


def test_documents_of_parquet_files_are_each_in_one_split(folder, tmp_path):
    corpus = prepared(str(folder), BYTES, tmp_path / "out")
    documents = [text for number in range(3) for text in rows(number)["text"] if text]
    for split, text in texts_of(corpus).items():
        own = [one for one in documents if split_of_document(one) == split]
        assert own
        assert text == "".join(one + "\n\n" for one in own)
    one = prepared(str(folder / "sample" / "002.parquet"), BYTES, tmp_path / "one")
    assert texts_of(corpus)["train"].endswith(texts_of(one)["train"])
    names = prepared(f"{folder}#id", BYTES, tmp_path / "names")
    assert "<urn:uuid:2-60>" in "".join(texts_of(names).values())


def test_files_that_hold_no_such_texts_are_named(folder, tmp_path):
    for field in ("body", "score"):
        with pytest.raises(UserError, match=rf"column {field} of .*000\.parquet.*SOURCE#COLUMN"):
            prepared(f"{folder}#{field}", BYTES, tmp_path / "out")
    (folder / "a.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot read") as caught:
        prepared(str(folder), BYTES, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_set_of_the_hub_is_fetched_once(folder, tmp_path, monkeypatch):
    ours = prepared(str(folder), BYTES, tmp_path / "ours")
    asked = []

    def snapshot_download(name, *, repo_type, revision, allow_patterns, local_dir):
        assert revision == "abc"
        asked.append((name, repo_type, allow_patterns))
        local_dir.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(local_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    info = SimpleNamespace(sha="abc")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda api, name: info)
    name = "hf:HuggingFaceFW/fineweb-edu/sample/10BT#text"
    for out in ("first", "second"):
        found = prepared(name, BYTES, tmp_path / out)
        assert found.fingerprint == ours.fingerprint
    assert asked == [("HuggingFaceFW/fineweb-edu", "dataset", "sample/10BT/*.parquet")]
    assert (sources_dir() / "HuggingFaceFW--fineweb-edu--sample--10BT").is_dir()


def test_a_set_without_parquet_is_refused_each_time(tmp_path, monkeypatch):
    info = SimpleNamespace(sha="abc")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda api, name: info)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *names, local_dir, **how: local_dir.mkdir(parents=True, exist_ok=True),
    )
    for _ in range(2):
        with pytest.raises(UserError, match=r"cannot fetch hf:a/b \(.*\*\.parquet"):
            prepared("hf:a/b", BYTES, tmp_path / "out")


@pytest.mark.parametrize("name", ["hf:nobody/nothing", "hf:", "hf:/", "hf:one"])
def test_a_set_that_cannot_be_fetched_costs_one_line(name, tmp_path, no_network):
    with pytest.raises(UserError, match=r"cannot fetch hf:|OWNER/NAME") as caught:
        prepared(name, BYTES, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_corpus_may_be_put_into_the_folder_where_one_is(folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert prepared(str(folder), BYTES, ".").num_tokens("train") > 0


# splits of large texts


def test_splits_of_large_texts_are_capped(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tarflowlm.data.splits.MOST_HELD_OUT", 30)
    text = "".join(map(chr, range(100, 1100)))
    sizes = [len(piece.text) for piece in cut_in_three([text], 1000)]
    assert sizes == [940, 30, 30]
    assert [len(piece.text) for piece in cut_in_three([text[:600]], 600)] == [540, 30, 30]
    assert [len(piece.text) for piece in cut_in_three([text[:599]], 599)] == [539, 30, 30]
    # so are those of a few documents
    places = {float(place) for place in range(100)}
    assert fair_shares(places, 300) == (90.0, 95.0)
    assert fair_shares(places, 3000) == (98.0, 99.0)
    monkeypatch.setattr("tarflowlm.data.splits.MOST_HELD_OUT", 300)
    shares = resolve_source(DataConfig(source=str(folder))).shares
    found = [split_of_document(str(number), shares) for number in range(4000)]
    share = 0.5 * 300 / sum(file.stat().st_size for file in folder.rglob("*.parquet"))
    for name in ("valid", "test"):
        assert 0 < found.count(name) / 4000 < 2 * share


# token shards


@pytest.fixture
def token_shards(monkeypatch):
    """The module examples/token_shards.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import token_shards

    yield token_shards
    del sys.modules["token_shards"]


def write_shard(path: Path, tokens: np.ndarray, count: int | None = None) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def test_token_shards_are_taken_over(token_shards, tmp_path):
    text = "the cat sat on a mat " * 99
    tokenizer = train_bpe([text], 262, alphabet=None, normalization="none")
    tokenizer.save(tmp_path / "tokenizer.json")
    shards = tmp_path / "shards"
    shards.mkdir()
    tokens = tokenizer.encode(text)
    for name, some in (("val_000000", tokens[:101]), ("train_000001", tokens[101:])):
        write_shard(shards / f"edu_{name}.bin", some)
    argv = (shards, tmp_path / "out", str(tmp_path / "tokenizer.json"))
    corpus = token_shards.take_over(*argv)
    assert [corpus.num_tokens(split) for split in SPLITS] == [len(tokens) - 101, 50, 51]
    found = texts_of(corpus)
    assert found["valid"] + found["test"] + found["train"] == text
    assert [corpus.num_characters(split) for split in SPLITS] == [len(found[s]) for s in SPLITS]
    config = TokenizerConfig(kind="bpe", source=argv[2], normalize="none")
    assert corpus.meta["tokenizer_config"]["source"] == config.source
    write_shard(shards / "edu_train_000002.bin", np.array([3, 262]))
    with pytest.raises(UserError, match="has token 262, and the tokenizer has 262 symbols"):
        token_shards.take_over(*argv[:1], tmp_path / "other", argv[2])
    write_shard(shards / "edu_train_000002.bin", np.array([3, 4]), count=3)
    with pytest.raises(UserError, match="not a whole token shard"):
        token_shards.take_over(*argv[:1], tmp_path / "other", argv[2])
    assert not (tmp_path / "other").exists()
