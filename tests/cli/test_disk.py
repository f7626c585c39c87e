"""What lies on the disk."""

import shutil
from pathlib import Path

from tarflowlm.cli.disk import size_of


def test_places_and_their_sizes(run_json, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("TARFLOWLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "corpora" / "a").mkdir(parents=True)
    (tmp_path / "cache" / "corpora" / "a" / "text").write_bytes(b"x" * 1234)
    run = shutil.copytree(runs["progressive"], tmp_path / "runs" / "one")
    found = run_json("info", tmp_path / "runs", "--disk")
    places = {Path(place["path"]): place for place in found["places"]}
    assert places[tmp_path / "cache" / "corpora"]["bytes"] == 1234
    assert places[run]["bytes"] == size_of(run) > places[run / "state"]["bytes"] > 0
    # states are a part of their run
    whole = sum(place["bytes"] for place in found["places"]) - places[run / "state"]["bytes"]
    assert found["bytes"] == whole
    # after what it says the model still writes
    shutil.rmtree(run / "state")
    assert run_json("sample", run, "--length", 8)["samples"]
    left = {Path(place["path"]) for place in run_json("info", run, "--disk")["places"]}
    assert (run in left, run / "state" in left) == (True, False)
