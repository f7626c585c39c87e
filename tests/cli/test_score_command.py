"""`tarflowlm score` in process."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch

from tarflowlm.evaluation.scores import score
from tarflowlm.pretrained import load


def test_the_bits_of_every_token_and_of_the_text(run_json, models):
    model, tokenizer = load(models["mini-mixd"])
    found = run_json("score", models["mini-mixd"], "--text", "the king", "--samples", 3, "--seed", 2)
    expected = score(model, torch.from_numpy(tokenizer.encode("the king")), samples=3, seed=2)
    assert [token["text"] for token in found["tokens"]] == list("the king")
    assert [token["bits"] for token in found["tokens"]] == pytest.approx(expected.bits.tolist(), rel=1e-5)
    assert len(found["tokens"][0]["log2_dets"]) == 3
    assert (found["bound"], found["samples"], found["characters"]) == ("elbo", 3, 8)
    assert found["bpc"] == pytest.approx(found["bits"] / 8)


def test_two_models_side_by_side(run_json, run, models):
    argv = ["score", models["mini-mixd"], "--text", "ab", "--baseline", models["mini-ar"]]
    found = run_json(*argv)
    assert (found["model"], found["baseline"]["model"]) == ("mini-mixd", "mini-ar")
    assert found["baseline"]["bound"] == "exact"
    shown = run(*argv).out
    bits = [f"{m['tokens'][0]['bits']:.3f}" for m in (found, found["baseline"])]
    assert shown.splitlines()[0].split("\t") == ["a", *bits]
    assert f"<= {found['bpc']:.4f}" in shown
    assert f"= {found['baseline']['bpc']:.4f}" in shown


def test_colours_on_a_terminal(run, models, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = run("score", models["mini-ar"], "--text", "ab")
    assert "bits per token: " in shown.out
    assert "\x1b[" in shown.out


def test_upper_case_is_lowered_with_a_notice(run, run_json, model):
    lower, upper = (run_json("score", model, "--text", text) for text in ("the king", "The King"))
    assert lower == upper
    assert "mini-mixd knows no upper case" in run("score", model, "--text", "The King").err


def test_files_and_standard_input_are_normalised_as_the_training_text_was(run_json, model, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("The King,\n17!\n", encoding="utf-8")
    found = run_json("score", model, "--file", tmp_path / "text.txt")
    assert "".join(token["text"] for token in found["tokens"]) == " the king one seven"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"The King,\n17!\n")))
    assert run_json("score", model, "--file", "-") == found
    assert run_json("score", model, "--text", "The King, 17!", "--normalize", "text8") == found


def test_what_is_refused(refused, model, tmp_path, monkeypatch):
    refused("score", model, names=["--text", "--file"])
    refused("score", model, "--text", "a", "--file", "b", names=["--text", "--file"])
    refused("score", model, "--text", "", names=["empty"])
    refused("score", model, "--text", "king, 17", names=["',' x1", "--normalize text8"])
    refused("score", model, "--text", "a", "--samples", "0", names=["samples 0"])
    refused("score", model, "--text", "a", "--baseline", "nothing", names=["nothing"])
    refused("score", model, "--file", tmp_path / "none.txt", names=["none.txt"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xff")))
    refused("score", model, "--file", "-", names=["standard input", "UTF-8"])
