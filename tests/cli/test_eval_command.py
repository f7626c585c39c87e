"""`tarflowlm eval` in process: what it adds to the likelihood, and that what the user got wrong costs one line."""

import sys
from pathlib import Path

import pytest
import torch

from tarflowlm.config import RunConfig, TrainConfig
from tarflowlm.data import TEXT8_ALPHABET, CharTokenizer, DataConfig
from tarflowlm.pretrained import load
from tarflowlm.runs.checkpoint import save_weights, seal, write_run


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Lines of a known length."""
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_file, tiny_flow, tiny_ar) -> dict[str, Path]:
    """Untrained run directories: what they hold is random, what is said of it must be right all the same."""
    root, fields = tmp_path_factory.mktemp("runs"), {"vocab_size": 27, "context": 16}
    models = {
        "one": tiny_flow(couplings=("mixd",), **fields),
        "two": tiny_flow(**fields),
        "ar": tiny_ar(**fields),
        "patches": tiny_ar(patch=2, **fields),
    }
    for name, model in models.items():
        (root / name).mkdir()
        stages = TrainConfig(mode="joint", stage_steps=(1,))
        run = RunConfig(name=name, model=model.config, train=stages, data=DataConfig(source=str(text_file)))
        write_run(root / name, run, CharTokenizer(TEXT8_ALPHABET))
        save_weights(root / name, model.float().state_dict(), {"blocks": str(getattr(model, "num_blocks", 0))})
    return {name: root / name for name in models}


@pytest.fixture
def run(run):
    """run(*argv): of `tarflowlm eval`."""
    return lambda *argv: run("eval", *argv, "--device", "cpu")


def test_every_unit_with_bound_stride_and_what_was_left_out(run_json, run, runs):
    result = run_json(runs["two"], "--samples", 3)
    assert (result["bound"], result["context"], result["stride"]) == ("iw-3", 16, 16)
    assert result["text_tokens"] - 16 < result["tokens"] <= result["text_tokens"]
    assert result["bits_per_byte"] == result["bpc"]
    assert result["gap"] == pytest.approx(result["elbo"] - result["nats_per_token"])
    shown = run(runs["two"], "--samples", 3).out
    lines = [line for line in shown.splitlines() if any(u in line for u in ("bits per", "nats per token", "perplex"))]
    assert len(lines) >= 4
    assert all("<=" in line for line in lines if "gap" not in line)
    assert "stride 16" in shown
    assert "gap" not in run(runs["two"]).out


@pytest.mark.parametrize("name", ["one", "ar"])
def test_windows_slide(run_json, run, runs, name):
    whole = run_json(runs[name], "--stride", 4, "--split", "all")
    assert whole["text_tokens"] - whole["tokens"] < 4
    assert whole["windows"] == (whole["text_tokens"] - 16) // 4 + 1
    fresh = run_json(runs[name], "--stride", 16)
    assert {**fresh, "seconds": 0} == {**run_json(runs[name]), "seconds": 0}
    assert "12 tokens of context" in run(runs[name], "--stride", 4).out


def test_a_sliding_window_says_what_the_model_says_of_its_last_tokens(run_json, runs, tmp_path):
    model, tokenizer = load(runs["ar"])
    text = " abc def ghij kl mn"
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    tokens = torch.from_numpy(tokenizer.encode(text))[None]
    with torch.no_grad():
        nats = -model.log_prob(tokens[:, :16]) - model.token_log_prob(tokens[:, 3:19])[:, 13:].sum()
    result = run_json(runs["ar"], "--data", tmp_path / "t.txt", "--split", "all", "--stride", 3)
    assert (result["tokens"], result["windows"]) == (19, 2)
    assert result["nats_per_token"] == pytest.approx(nats.item() / 19, rel=1e-5)


def test_latents_stand_beside_the_likelihood(run_json, run, runs):
    result = run_json(runs["two"], "--latents", "--windows", 5)
    states = result["latents"]
    assert [state["block"] for state in states] == [0, 1, 2]
    assert states[0]["log_det"] is None
    assert states[-1]["nelbo"]["mean"] == pytest.approx(result["elbo"], rel=1e-4)
    assert {"norm", "cosine", "participation_ratio", "centroid_shift", "kl", "kl_gain"} <= states[1].keys()
    shown = run(runs["two"], "--latents", "--windows", 5).out
    assert "block 2" in shown
    assert f"{states[-1]['kl']['mean']:.4f}" in shown


def test_quality_is_printed_together(run_json, run, runs):
    pytest.importorskip("mauve")
    argv = ["--quality", "--judge", runs["ar"], "--num", 30, "--windows", 2, "--temperature", 0.9, "--length", 12]
    quality = run_json(runs["two"], *argv)["quality"]
    assert (quality["length"], quality["temperature"], quality["seed"], quality["dtype"]) == (12, 0.9, 0, "float32")
    assert (quality["samples"]["texts"], quality["samples"]["judge_tokens"]) == (30, 360)
    assert len(quality["remarks"]) == 3
    shown = run(runs["two"], *argv).out
    for name in (
        "perplexity",
        "MAUVE",
        "entropy",
        "distinct",
        "repeated",
        "decoder auto",
        "temperature 0.9",
        "seed 0",
    ):
        assert name in " ".join(shown.split())
    assert f"{quality['samples']['perplexity']:.3f}" in shown
    assert f"{quality['mauve']:.4f}" in shown
    assert run_json(runs["ar"], *argv)["quality"]["decoder"] == "steps"
    assert run_json(runs["two"], *argv, "--judge", "english-mini-ar")["quality"]["judge"] == "english-mini-ar"


WRONG = {
    "samples": (["--samples", "0"], ["samples 0"]),
    "windows": (["--windows", "-2"], ["windows -2"]),
    "stride-zero": (["--stride", "0"], ["stride 0", "16"]),
    "stride-long": (["--stride", "17"], ["stride 17", "16"]),
    "slides": (["--stride", "8"], ["stride 8", "2 blocks"]),
    "seed": (["--seed", "-1"], ["seed -1"]),
    "judge-alone": (["--judge", "gpt2"], ["--judge", "--quality"]),
    "num-alone": (["--num", "3"], ["--num", "--quality"]),
    "top-p-alone": (["--top-p", "0.9"], ["--top-p", "--quality"]),
    "judge": (["--quality", "--judge", "/no/such/judge"], ["/no/such/judge", "no directory"]),
    "num": (["--quality", "--num", "1"], ["num 1"]),
    "length": (["--quality", "--length", "17"], ["length 17", "16"]),
    "temperature": (["--quality", "--temperature", "0"], ["temperature 0.0"]),
}


@pytest.mark.parametrize(("wrong", "names"), WRONG.values(), ids=WRONG.keys())
def test_wrong_requests_are_named(refused, runs, wrong, names):
    refused(runs["two"], *wrong, names=names)


def test_what_the_model_cannot_do_is_said(refused, runs):
    refused(runs["ar"], "--latents", names=["baseline", "--latents"])
    refused(runs["patches"], "--stride", 3, names=["stride 3", "patch of 2"])
    for flow in (runs["one"], "english-mini"):
        refused(runs["two"], "--quality", "--judge", flow, names=[f"the judge {flow} is a flow", "mini-ar"])


def test_a_short_text_is_one_window(run_json, run, runs, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(" a few words", encoding="utf-8")
    model, tokenizer = load(runs["ar"])
    nats = -model.log_prob(torch.from_numpy(tokenizer.encode(" a few words"))[None]).item()
    result = run_json(runs["ar"], "--data", short, "--split", "all")
    assert (result["windows"], result["tokens"], result["context"]) == (1, 12, 12)
    assert result["nats_per_token"] == pytest.approx(nats / 12, rel=1e-5)
    # whole patches alone
    short.write_text(" a few word", encoding="utf-8")
    assert run_json(runs["patches"], "--data", short, "--split", "all")["tokens"] == 10
    assert "one window of 10 tokens" in run(runs["patches"], "--data", short, "--split", "all").err


def test_the_time_is_told_before(run, runs, monkeypatch):
    monkeypatch.setattr("tarflowlm.cli.evaluate.seconds_per_window", lambda _model, windows: 600 / len(windows))
    assert "about 30:00 minutes; --windows 1 takes" in run(runs["two"], "--samples", 3).err


def test_a_single_text_is_for_another_command(refused, runs):
    refused(runs["ar"], "--text", "a few words", names=["--text", "tarflowlm score"])


def test_the_training_text_does_not_come_with_a_model(run):
    result = run("english-mini", "--windows", 1)
    assert result.status == 2
    for part in ("english27.txt.xz", "english-mini", "--data english", "--data FILE"):
        assert part in result.err


def test_texts_that_cannot_be_scored(refused, runs, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words of text", encoding="utf-8")
    refused(runs["ar"], "--data", short, names=["fewer than 16", "--split all", "tarflowlm score"])
    short.write_text("a", encoding="utf-8")
    refused(runs["two"], "--data", short, "--split", "all", "--latents", names=["2 tokens", "longer text"])
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in runs["ar"].iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    CharTokenizer(TEXT8_ALPHABET, "none").save(plain / "tokenizer.json")
    seal(plain)
    short.write_text("Text of Another Alphabet, 1790!", encoding="utf-8")
    refused(plain, "--data", short, "--split", "all", names=["'T' x1", "--normalize text8"])


def test_a_missing_package_is_told_before_anything_is_evaluated(runs, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    refused(runs["two"], "--quality", "--judge", runs["ar"], names=["mauve-text", "pip install 'tarflowlm[quality]'"])
