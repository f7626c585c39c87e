"""`tarflowlm draft`, and what the other commands make of a draft."""

import shutil

import pytest

from tarflowlm.runs.released import DEFAULT

SMALL = ["--width", 16, "--hidden", 16, "--past", 2, "--ahead", 3]


@pytest.fixture
def copy(models, tmp_path):
    return shutil.copytree(models["mini-mixd"], tmp_path / "run")


def test_a_draft_is_trained_sampled_with_and_exported(run, run_json, copy, tmp_path):
    shown = run("draft", copy, "--steps", 2, *SMALL)
    assert shown.status == 0, shown.err
    assert "tokens final per pass of block 1" in shown.out
    assert run_json("draft", copy, "--resume", "--steps", 3)["steps"] == 3
    argv = ["sample", copy, "--num", 2, "--length", 8]
    slow = run_json(*argv, "--decoder", "sequential")
    fast = run_json(*argv, "--decoder", "drafted")
    assert fast["decoders"][-1] == "drafted"
    assert [s["text"] for s in slow["samples"]] == [s["text"] for s in fast["samples"]]
    assert run("export", copy, "--out", tmp_path / "out", "--half").status == 0
    assert run_json("sample", tmp_path / "out", "--length", 4, "--decoder", "drafted")["samples"]


def test_rounds_end_with_the_text(run, run_json, copy):
    assert run("draft", copy, "--steps", 1, *SMALL).status == 0
    sample = run_json("sample", copy, "--length", 8, "--rounds")["samples"][0]
    assert sample["rounds"][-1] == {"text": sample["text"], "final": 8}
    finals = [r["final"] for r in sample["rounds"]]
    assert finals == sorted(finals)
    out = run("sample", copy, "--length", 8, "--rounds", "--prompt", "ab").out
    assert "round 1" in out
    assert "of 8 became final" in out


def test_what_a_draft_cannot_serve_is_said(refused, models, copy, text_file, tmp_path):
    refused("draft", names=[f"{DEFAULT} comes with the package", "--out"])
    refused("draft", models["mini-ar"], names=["mini-ar", "baseline", "no block 1"])
    refused("draft", "english-mini", names=["english-mini", "--out"])
    refused("draft", "--model", "english-mini", names=["english-mini", "--out"])
    refused("draft", copy, "--steps", 1, "--minutes", 1, names=["--steps 1", "--minutes 1"])
    refused("draft", copy, "--minutes", 0, names=["minutes 0"])
    refused("draft", copy, "--steps", 0, names=["steps 0"])
    refused("draft", copy, "--ahead", 0, names=["ahead 0"])
    refused("draft", copy, "--ahead", 33, "--out", tmp_path / "x", names=["ahead 33", "at most 32"])
    assert not (tmp_path / "x").exists()
    refused("draft", copy, "--resume", names=["draft", "no training state"])
    refused("draft", copy, "--resume", "--out", tmp_path / "x", names=["--resume", "--out"])
    refused("draft", copy, "--out", copy, "--data", text_file, names=[str(copy), "exists"])
    (copy / "summary.json").unlink()
    refused("draft", copy, names=["not finished", "--resume"])


def test_a_decoder_that_is_not_there_is_said(refused, model):
    refused("sample", model, "--decoder", "drafted", names=["no draft", "tarflowlm draft"])
    refused("sample", model, "--rounds", names=["no draft", "tarflowlm draft"])
    refused("sample", model, "--rounds", "--decoder", "parallel", names=["--rounds", "parallel", "drafted"])
    refused("edit", "--text", "ab", model, "--level", 1, "--decoder", "drafted", names=["no draft"])
