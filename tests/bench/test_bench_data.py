"""The data benchmark measures what it says it does."""

import pytest

from tarflowlm.bench import data as bench_data
from tarflowlm.bench import train as bench_train
from tarflowlm.bench.arguments import DataArgs
from tarflowlm.data.bpe import train_bpe


def test_speed_memory_and_loader_are_measured(tmp_path, monkeypatch):
    text = "It was the best of times, it was the worst of times \u2014 caf\u00e9.\n" * 400
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    train_bpe([text], 280, alphabet=None, normalization="none").save(tmp_path)
    monkeypatch.setattr(bench_train, "run", lambda *_: {"rows": [{"milliseconds": 50.0}]})
    args = DataArgs(text=tmp_path / "text.txt", tokenizer=str(tmp_path), rounds=1, speed_mb=1, small_mb=1, large_mb=2)
    result = bench_data.run(args)
    assert result["ratio"] == pytest.approx(result["mb_per_second"] / result["library_mb_per_second"])
    assert [row["mb"] for row in result["memory"]] == [1, 2]
    # Python and PyTorch at the least, and not this process
    assert all(50 < row["peak_mb"] < 4000 for row in result["memory"])
    assert 0 < result["loader_milliseconds"] < 50
    assert result["loader_share"] == result["loader_milliseconds"] / 50


def test_texts_are_repeated_to_their_size(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("na\u00efve \U0001f600", encoding="utf-8")
    for size in (5, 11, 13, 100, 101, 102, 103):
        bench_data._write_text(path, tmp_path / "out.txt", size)
        data = (tmp_path / "out.txt").read_bytes()
        assert size - 4 < len(data) <= size
        assert ("na\u00efve \U0001f600" * 20).startswith(data.decode("utf-8"))
