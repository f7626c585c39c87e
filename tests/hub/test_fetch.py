"""Models are fetched from a hub whole and undamaged, or one line says why not."""

import os
import subprocess
import sys

import pytest
import torch
from hub_server import Repository
from huggingface_hub import constants

from tarflowlm.errors import UserError
from tarflowlm.generation import generate
from tarflowlm.pretrained import load
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.runs.hub import fetch


def test_what_is_fetched_is_what_is_there(shared, trained):
    (ours, tokenizer), (theirs, _) = load("hf:ada/tiny"), load(trained)
    assert ours.draft is not None
    assert tokenizer.decode([1, 2, 3]) == "abc"
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    texts = [generate(m, num_tokens=16, generator=torch.Generator().manual_seed(0)).tokens for m in (ours, theirs)]
    assert torch.equal(*texts)


def test_nothing_else_is_fetched(shared):
    files = shared.repositories["ada/tiny"].files
    files |= {"pytorch_model.bin": b"", "modeling.py": b"", "state/x.pt": b"", "README.md": b"# tiny\n"}
    folder = fetch("hf:ada/tiny")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == files.keys() - {"pytorch_model.bin", "modeling.py", "state/x.pt"}


def test_a_revision_is_a_part_of_the_name(shared, trained):
    repository = shared.repositories["ada/tiny"]
    old = repository.newest
    repository.commit({name: data for name, data in repository.files.items() if not name.startswith("draft/")})
    assert load("hf:ada/tiny")[0].draft is None
    assert load(f"hf:ada/tiny@{old}")[0].draft is not None


def test_the_cache_serves_what_it_has(shared, monkeypatch):
    fetch("hf:ada/tiny")
    before = len(shared.requests)
    fetch("hf:ada/tiny")
    assert not [path for path in shared.paths("GET")[before:] if path.endswith(".safetensors")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(shared.requests)
    load("hf:ada/tiny")
    assert len(shared.requests) == before


def test_progress_counts_the_bytes(shared):
    seen = []
    load_checkpoint("hf:ada/tiny", progress=lambda done, total: seen.append((done, total)))
    done, total = seen[-1]
    # the manifest is there before
    files = shared.repositories["ada/tiny"].files
    assert done == total == sum(len(data) for name, data in files.items() if name != "manifest.json")


def test_a_cut_connection_is_resumed_where_it_ended(shared, monkeypatch):
    # what is not a whole piece of this size is asked for again
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    shared.cut += ["model.safetensors"]
    load("hf:ada/tiny")
    ranges = [part for how, path, part in shared.requests if how == "GET" and path.endswith("/model.safetensors")]
    half = len(shared.repositories["ada/tiny"].files["model.safetensors"]) // 2
    assert ranges == [None, f"bytes={half - half % 1024}-"]


def test_a_connection_that_stays_cut_costs_one_line(shared, refused, monkeypatch):
    shared.cut += ["model.safetensors"] * 20
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", shared.requests.append)
    refused("sample", "hf:ada/tiny", names=["hf:ada/tiny", "run this again"])
    shared.cut.clear()
    load("hf:ada/tiny")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "draft/draft.safetensors"])
def test_a_flipped_byte_is_refused_and_the_remedy_works(shared, refused, name):
    shared.flip.add(name)
    for _ in range(2):
        refused("sample", "hf:ada/tiny", names=["hf:ada/tiny", name, "sha256", "run this again"])
    shared.flip.clear()
    assert load("hf:ada/tiny")[0].draft is not None


def test_a_file_damaged_in_the_cache_is_fetched_again(shared, refused):
    path = fetch("hf:ada/tiny", lambda _done, _total: None) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    refused("sample", "hf:ada/tiny", names=["model.safetensors", "truncated", "run this again"])
    load("hf:ada/tiny")


def test_what_cannot_be_had_costs_one_line(shared, refused, monkeypatch):
    shared.repositories["ada/hidden"] = Repository(private=True)
    shared.repositories["ada/other"] = Repository()
    shared.repositories["ada/other"].commit({"config.json": b"{}", "model.safetensors": b"x" * 1000})
    refused("sample", "hf:ada/none", names=["hf:ada/none", "no such model", "HF_TOKEN"])
    refused("sample", "hf:ada/hidden", names=["hf:ada/hidden", "private", "hf auth login"])
    refused("sample", "hf:ada/tiny@v9", names=["hf:ada/tiny@v9", "no such revision"])
    refused("sample", "hf:ada/other", names=["hf:ada/other", "no model of tarflowlm"])
    assert "/ada/other/resolve/main/model.safetensors" not in shared.paths("GET")
    refused("eval", "hf:tiny", names=["hf:tiny", "hf:OWNER/NAME"])
    refused("edit", "hf:ada/--", "--text", "a", "--strength", "1", names=["hf:ada/--", "OWNER/NAME"])
    shared.status = 503
    refused("sample", "hf:ada/tiny", names=["hf:ada/tiny"])


def test_a_token_opens_what_is_private(shared, log_in):
    shared.repositories["ada/tiny"].private = True
    with pytest.raises(UserError, match="private"):
        load("hf:ada/tiny")
    log_in()
    load("hf:ada/tiny")


def test_without_a_network_one_line_says_so(shared, refused, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        refused("sample", "hf:ada/tiny", names=["hf:ada/tiny", "HF_HUB_OFFLINE"])
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("sample", "hf:ada/tiny", names=["hf:ada/tiny", "http://127.0.0.1:9", "cannot be reached"])


def test_a_missing_client_is_named(shared, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("sample", "hf:ada/tiny", names=["hf:ada/tiny", "tarflowlm[hub]"])


def test_a_model_of_the_hub_is_not_written_to(shared, refused):
    refused("report", "hf:ada/tiny", names=["hf:ada/tiny is on the hub", "--out tiny-report"])
    refused("draft", "hf:ada/tiny", names=["hf:ada/tiny is on the hub", "--out"])
    refused("seal", "hf:ada/tiny", names=["hf:ada/tiny is on the hub", "export"])
    assert not shared.requests


def test_the_command_line_from_start_to_end(shared, tmp_path):
    environment = {"HF_ENDPOINT": shared.url, "HF_HUB_CACHE": str(tmp_path / "own"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tarflowlm", "sample", "hf:ada/tiny", "--length", "8"],
        env=os.environ | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.strip("\n")) >= 8


def test_a_report_calls_a_model_of_the_hub_by_its_name(shared, run_json, tmp_path):
    pytest.importorskip("matplotlib")
    result = run_json("report", "hf:ada/tiny", "--out", tmp_path / "report")
    assert [run["name"] for run in result["runs"]] == ["hf:ada/tiny"]
