"""Every command, in process: what it prints and what it writes."""

import io
import json
import shutil
import sys

import pytest
import torch
from command_cases import CHECKPOINT, FAMILIES, ONE_LAYER, TINY
from safetensors.torch import load_file

from tarflowlm.cli.main import main
from tarflowlm.data import TEXT8_ALPHABET
from tarflowlm.runs.released import FOLDER
from tarflowlm.terminal.streams import write_out
from tarflowlm.terminal.tables import print_json

EVAL_KEYS = {"bpc", "ppl", "nats_per_token", "bound", "samples", "stderr", "tokens", "characters", "windows"}


@pytest.mark.parametrize("name", FAMILIES)
def test_train_writes_a_complete_run_directory(models, name):
    files = {path.name for path in models[name].iterdir()}
    others = {"manifest.json", "metrics.jsonl", "summary.json", "state", "best", ".lock"}
    assert files == CHECKPOINT | others
    config = json.loads((models[name] / "config.json").read_text(encoding="utf-8"))
    assert config["name"] == name
    assert sum(config["train"]["stage_steps"]) == 6
    assert (config["model"]["context"], config["model"]["trunk"]["width"]) == (32, 32)


def test_train_prints_its_summary(run_json, run, text_file, tmp_path):
    argv = ["train", "mini-ar", "--data", text_file, "--steps", "2", *TINY, *FAMILIES["mini-ar"]]
    summary = run_json(*argv, "--out", tmp_path / "json")
    assert summary == json.loads((tmp_path / "json" / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 2
    table = run(*argv, "--out", tmp_path / "table")
    assert f"{summary['test']['bpc']:.4f} bits per character" in table.out
    assert "mini-ar" in table.out


def test_short_options_reach_their_fields(run, text_file, tmp_path):
    out = tmp_path / "run"
    argv = ["--steps", "3", "--seed", "7", "--checkpoint-every", "2", "--optim.lr", "0.01"]
    assert run("train", "mini-mixd", "--out", out, "--data", text_file, *argv, *TINY, *ONE_LAYER).status == 0
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (config["seed"], config["train"]["checkpoint_every"], config["optim"]["lr"]) == (7, 2, 0.01)
    assert config["train"]["stage_steps"] == [1, 1, 1]
    assert config["data"]["source"] == str(text_file)


def test_the_first_blocks_of_a_preset_alone(run, run_json, text_file, tmp_path):
    out = tmp_path / "one"
    argv = ["--data", text_file, "--steps", "3", *TINY, "--model.blocks.0.layers", "1", "--blocks", "1"]
    assert run("train", "mini-mixd", "--out", out, *argv).status == 0
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert [block["coupling"] for block in config["model"]["blocks"]] == ["mixd"]
    assert config["train"]["stage_steps"] == [3]
    assert run_json("eval", out, "--stride", "8", "--windows", "3")["stride"] == 8


@pytest.mark.parametrize("name", FAMILIES)
def test_eval_says_what_the_run_said(run_json, models, name):
    result = run_json("eval", models[name])
    assert result.keys() >= EVAL_KEYS
    summary = json.loads((models[name] / "summary.json").read_text(encoding="utf-8"))
    assert result["bpc"] == pytest.approx(summary["test"]["bpc"], rel=1e-5)
    assert result["bound"] == ("exact" if name == "mini-ar" else "elbo")


def test_more_samples_give_the_tighter_bound(run_json, model):
    elbo, weighted = (run_json("eval", model, "--samples", k) for k in (1, 3))
    assert (weighted["bound"], weighted["samples"]) == ("iw-3", 3)
    assert weighted["bpc"] < elbo["bpc"]


def test_eval_of_splits_windows_and_other_texts(run_json, model, text_file, tmp_path):
    whole = run_json("eval", model, "--split", "all")
    assert whole["tokens"] == 32 * (len(text_file.read_text(encoding="utf-8")) // 32)
    assert run_json("eval", model, "--split", "valid", "--windows", 3)["windows"] == 3
    other = tmp_path / "other.txt"
    other.write_text("Other Words, 1790!  " * 60, encoding="utf-8")
    result = run_json("eval", model, "--data", other, "--split", "all")
    # normalised as the run's text was: lower case, digits spelled out
    assert result["source"] == str(other)
    assert result["tokens"] > 1000


def test_eval_prints_a_table_with_bound_and_sign(run, model, models):
    bounded, exact = run("eval", model).out, run("eval", models["mini-ar"]).out
    assert "<=" in bounded
    assert "elbo" in bounded
    assert "<=" not in exact
    assert "exact" in exact


def test_eval_repeats_itself(run_json, model):
    first, second, other = (run_json("eval", model, "--seed", seed)["bpc"] for seed in (1, 1, 2))
    assert first == second != other


@pytest.mark.parametrize("name", FAMILIES)
def test_sample_repeats_itself_and_keeps_to_length_and_prompt(run_json, models, name):
    argv = ["sample", models[name], "--num", 2, "--length", 7, "--prompt", "ab c"]
    first, second, other = (run_json(*argv, "--seed", seed)["samples"] for seed in (3, 3, 4))
    assert first == second != other
    for sample in first:
        assert len(sample["text"]) == 7
        assert sample["text"].startswith("ab c")
        assert set(sample["text"]) <= set(TEXT8_ALPHABET)


def test_more_samples_leave_the_first_as_it_was(run_json, model):
    one = run_json("sample", model, "--num", 1, "--length", 9)["samples"]
    assert run_json("sample", model, "--num", 3, "--length", 9)["samples"][:1] == one


def test_passes_go_from_noise_to_text(run_json, run, model):
    sample = run_json("sample", model, "--length", 8, "--passes")["samples"][0]
    assert len(sample["passes"]) == 4
    assert sample["passes"][-1] == sample["text"]
    shown = run("sample", model, "--length", 8, "--passes").out
    for name in ("noise", "after block 3", "after block 2", "after block 1"):
        assert name in shown


def test_temperature_and_decoding_reach_the_sampler(models, run_json, refused):
    for name in ("mini-mix1", "mini-mixd"):
        argv = ["sample", models[name], "--num", 2, "--length", 8]
        usual, cold, drawn = (
            [sample["text"] for sample in run_json(*argv, *more)["samples"]]
            for more in ([], ["--temperature", 0.01], ["--decoding", "drawn"])
        )
        assert usual != cold
        assert all(len(text) == 8 for text in cold + drawn)
    refused(
        "sample", models["mini-affine"], "--temperature", 0.5, names=["temperature 0.5", "affine", "mixd or mix1"]
    )


def test_sample_fills_the_context_without_a_length(run, run_json, model):
    text = run_json("sample", model)["samples"][0]["text"]
    assert len(text) == 32
    assert text.strip() in run("sample", model).out


def test_a_prompt_is_normalised_on_request(run_json, model):
    text = run_json("sample", model, "--prompt", "The 9", "--normalize", "text8", "--length", "12")["samples"][0][
        "text"
    ]
    assert text.startswith(" the nine")


def test_data_prepares_a_directory_that_train_and_eval_take(run_json, run, model, text_file, tmp_path):
    result = run_json("data", text_file, "--out", tmp_path / "corpus")
    assert result["vocab_size"] == 27
    assert sum(result["tokens"].values()) == len(text_file.read_text(encoding="utf-8")) + 1
    direct, prepared = (run_json("eval", model, *more)["bpc"] for more in ((), ("--data", tmp_path / "corpus")))
    assert direct == prepared
    assert run_json("eval", model, "--data", tmp_path / "corpus", "--split", "all")["tokens"] > 7000
    argv = ["--data", tmp_path / "corpus", "--steps", 1, *TINY, *FAMILIES["mini-ar"]]
    assert run("train", "mini-ar", "--out", tmp_path / "run", *argv).status == 0
    assert "train" in run("data", text_file, "--out", tmp_path / "table").out
    again = run("data", tmp_path / "corpus", "--out", tmp_path / "again")
    assert again.status == 2
    assert "prepared corpus already" in again.err


def test_exported_and_sealed_models_are_named(run, run_json, refused, model, tmp_path):
    out = tmp_path / "out"
    size = sum(path.stat().st_size for path in model.iterdir() if path.name in CHECKPOINT)
    assert run_json("export", model, "--out", out)["bytes"] == pytest.approx(size, rel=0.05)
    (out / "manifest.json").unlink()
    assert run_json("seal", out) == {"out": str(out), "files": ["config.json", "tokenizer.json", "model.safetensors"]}
    assert "sealed" in run("seal", out).out
    for name in ("english-mini", FOLDER / "english-mini"):
        refused("seal", name, names=["english-mini comes with the package", "export"])


def test_names_are_not_markup(run, model, text_file, tmp_path):
    odd = tmp_path / "a [bold]b [/red]"
    odd.mkdir(parents=True)
    shutil.copy(text_file, odd / "words.txt")
    assert run("data", odd / "words.txt", "--out", odd / "corpus").status == 0
    assert run("eval", model, "--data", odd / "words.txt").status == 0
    argv = ["--data", odd / "words.txt", "--steps", 1, *TINY, *FAMILIES["mini-ar"]]
    assert run("train", "mini-ar", "--out", odd / "run", *argv).status == 0


@pytest.mark.parametrize(
    "argv", [[], ["--help"], ["train", "--help"], ["train", "mini-mixd", "--help"], ["eval", "-h"]]
)
def test_help_is_no_error(run, argv):
    result = run(*argv)
    assert result.status == 0
    assert result.err == ""
    assert len(result.out.splitlines()) > 5


def test_a_stopped_run_continues(run, run_json, model, text_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    argv = ["--data", text_file, "--steps", "6", "--train.evaluate-windows", "4", "--checkpoint-every", "2"]

    def interrupted(self, record):
        if record["step"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tarflowlm.terminal.training.ProgressReporter.record", interrupted)
        stopped = run("train", "mini-mixd", "--out", out, *argv, *TINY, *ONE_LAYER)
    assert stopped.status == 130
    assert "train --resume" in stopped.err
    assert "Traceback" not in stopped.err
    assert run_json("sample", out, "--length", "4")["samples"]
    assert run_json("train", "--resume", out, "--device", "cpu")["steps"] == 6
    ours, theirs = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_characters_that_the_output_lacks_end_nothing(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="")
    monkeypatch.setattr(sys, "stdout", out)
    main(["--version"])
    print_json({"text": "caf\u00e9"})
    write_out("\u2019")
    assert out.buffer.getvalue().endswith(b'{"text": "caf?"}\n?')
