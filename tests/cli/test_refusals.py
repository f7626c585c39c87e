"""What the user got wrong costs one line and nothing else."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from command_cases import CHECKPOINT, FAMILIES, ONE_LAYER, TINY, listing, put_config
from safetensors.torch import load_file, save_file
from tarflowlm.cli.arguments import SampleArgs

from tarflowlm.cli.parsing import parse
from tarflowlm.errors import UserError
from tarflowlm.runs.manifest import write_manifest


def test_unknown_commands_and_presets_are_listed(refused):
    refused("trian", names=["'trian'", "train", "eval", "sample"])
    refused("train", "mini-mixx", "--out", "x", names=["'mini-mixx'", "mini-mixd"])
    refused("train", names=["preset", "--resume"])
    refused("bench", "nothing", names=["'nothing'", "numerics"])


def test_what_does_not_parse_is_said_in_words(refused):
    refused("sample", "x", "--num", "1.5", names=["--num: '1.5' is not a whole number; see"])
    refused("sample", "x", "--length", "abc", names=["--length: 'abc' is not a whole number; see"])
    refused("train", "mini-ar", "--out", "x", "--minutes", "1:30", names=["--minutes: '1:30' is not a number; see"])
    refused("edit", "x", "--text", "a", "--replace", "a", names=["'--replace'. Expected 2 values"])
    error = refused("edit", "x", "--text", "a", "--decoder", "auto", names=["--decoder has no effect"])
    assert error.count("edit --help") == 1


def test_a_name_that_is_empty_is_not_the_current_folder(refused):
    refused("sample", "--out", "", names=["--out: the name is empty"])
    refused("train", "mini-ar", "--out", "", names=["--out: the name is empty"])
    refused("export", "english-mini", "--out", "", names=["--out: the name is empty"])
    refused("info", "", names=["the name is empty"])


def test_help_says_what_an_option_takes_and_a_flag_does(run):
    sample = run("sample", "--help").out
    assert "--prompt STR" in sample
    assert "{None}" not in sample
    assert "[bold]" not in sample
    assert "--memory, --no-memory" in run("bench", "train", "--help").out
    assert "sees-channels, --model.blocks.0.no-sees-channels" in run("train", "mini-mixd", "--help").out


def test_the_word_none_is_a_text_but_no_number():
    args = parse(SampleArgs, ["None", "--prompt", "None", "--length", "None"], "tarflowlm sample")
    assert (args.directory, args.prompt, args.length) == (Path("None"), "None", None)


def test_a_message_is_one_line_without_utf8_too(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(UserError) as raised:
        parse(SampleArgs, ["--num", "x"], "tarflowlm sample")
    assert "---" not in str(raised.value)
    assert "--num" in str(raised.value)


WRONG_FIELDS = {
    "unknown": (["--model.widht", "3"], ["--model.widht", "--help"]),
    "type": (["--seed", "x"], ["--seed", "'x'"]),
    "negative-seed": (["--seed", "-1"], ["seed -1"]),
    "large-seed": (["--seed", str(2**70)], [f"seed {2**70}"]),
    "patch": (["--model.patch", "3"], ["patch 3", "context 32"]),
    "no-steps": (["--steps", "0"], ["steps 0"]),
    "few-steps": (["--steps", "2"], ["steps 2", "3 stages"]),
    "no-blocks": (["--blocks", "0"], ["blocks 0", "3"]),
    "many-blocks": (["--blocks", "4"], ["blocks 4", "3"]),
    "coupling": (["--model.blocks.1.coupling", "mixx"], ["'mixx'", "mix1"]),
    "layers": (["--model.blocks.1.layers", "0"], ["model.blocks.1.layers 0"]),
    "width": (["--model.trunk.width", "33"], ["width 33", "multiple"]),
    "rate": (["--optim.lr", "-1"], ["tarflowlm: optim.lr -1.0"]),
    "decay": (["--optim.weight-decay", "-1"], ["optim.weight_decay -1.0"]),
    "batch": (["--train.batch-size", "0"], ["train.batch_size 0"]),
    "test": (["--train.test-windows", "-1"], ["train.test_windows -1"]),
    "device": (["--device", "tpu"], ["'tpu'", "cpu"]),
    "vocabulary": (["--model.vocab-size", "5"], ["vocab_size 5", "27"]),
    "context": (["--model.context", "4096"], ["4096", "longer text"]),
    "no-value": (["--seed"], ["--seed"]),
    "stray": (["stray"], ["stray"]),
    "file": (["--data", "no-such-file.txt"], ["'no-such-file.txt'", "english"]),
    "empty-name": (["--data", ""], ["''", "english"]),
}


@pytest.mark.parametrize(("wrong", "names"), WRONG_FIELDS.values(), ids=WRONG_FIELDS.keys())
def test_wrong_fields_are_named_and_nothing_is_written(refused, text_file, tmp_path, wrong, names):
    out = tmp_path / "deep" / "run"
    refused("train", "mini-mixd", "--out", out, "--data", text_file, *TINY, *ONE_LAYER, *wrong, names=names)
    assert not out.parent.exists()


def test_out_is_needed(refused):
    refused("train", "mini-mixd", names=["--out"])
    refused("data", "x", names=["--out"])


def test_an_existing_directory_is_left_alone(refused, model, text_file):
    before = listing(model)
    refused("train", "mini-mixd", "--out", model, "--data", text_file, names=[str(model), "--out"])
    refused("data", text_file, "--out", model, names=[str(model), "--out"])
    assert listing(model) == before


def test_only_what_can_be_resumed_is_said_to(refused, model, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    shutil.copytree(model, tmp_path / "export", ignore=shutil.ignore_patterns("state", "*.jsonl", "summary.json"))
    shutil.copytree(model, tmp_path / "stopped", ignore=shutil.ignore_patterns("summary.json"))
    for out in (model, tmp_path / "file", tmp_path / "export"):
        error = refused("train", "mini-mixd", "--out", out, names=[f"{out} exists already: choose another --out"])
        assert "--resume" not in error
    refused("train", "mini-mixd", "--out", tmp_path / "stopped", names=[f"`train --resume {tmp_path / 'stopped'}`"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(refused, model, tmp_path):
    refused("eval", model, "--device", "cuda", names=["cuda", "cpu"])
    refused("sample", model, "--device", "cuda", names=["cuda", "cpu"])
    refused("train", "mini-ar", "--out", tmp_path / "run", "--device", "cuda", names=["cuda", "cpu"])
    assert not (tmp_path / "run").exists()


BAD_TEXTS = {
    "empty": (b"", ["is empty"]),
    "binary": (b"\xff\xfe\x00\x01" * 50, ["not UTF-8"]),
    "short": (b"just a few words", ["longer text"]),
}


@pytest.mark.parametrize(("content", "names"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_texts_that_cannot_be_used(refused, model, tmp_path, content, names):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    refused("eval", model, "--data", path, names=names)
    refused("train", "mini-mixd", "--out", tmp_path / "run", "--data", path, *TINY, *ONE_LAYER, names=names)
    if content != BAD_TEXTS["short"][0]:
        refused("data", path, "--out", tmp_path / "corpus", names=names)
    assert {p.name for p in tmp_path.iterdir()} - {".corpus.lock"} == {"bad.txt"}


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["sample", "--prompt", "\udcff\udcfe"], "the prompt is not UTF-8 (character 0 is byte 0xff)"),
        (["sample", "--prompt", "a\udc80", "--normalize", "text8"], "the prompt is not UTF-8"),
        (["sample", "--template", "a_\udcff"], "the template is not UTF-8"),
        (["sample", "--stop", "\udcff"], "the stop is not UTF-8"),
        (["score", "--text", "a\udcff"], "the text is not UTF-8 (character 1 is byte 0xff)"),
        (["edit", "--text", "ab", "--toward", "\udcff"], "the other text is not UTF-8"),
        (["edit", "--text", "ab", "--replace", "a", "\udcff"], "the replacement is not UTF-8"),
    ],
)
def test_words_that_are_not_utf8(refused, model, argv, name):
    refused(argv[0], model, *argv[1:], names=[name, "convert it"])


def test_missing_texts_are_named(refused, model, tmp_path):
    for argv in (["eval", model, "--data"], ["train", "mini-ar", "--out", tmp_path / "x", "--data"]):
        refused(*argv, tmp_path / "missing.txt", names=["missing.txt", "english"])
    refused("data", tmp_path / "missing.txt", "--out", tmp_path / "x", names=["missing.txt"])
    refused("eval", model, "--data", tmp_path, names=[str(tmp_path)])
    refused("eval", model, "--data", "", names=["''"])
    assert not list(tmp_path.iterdir())


def test_unknown_characters_are_counted_and_shown(refused, run, run_json, model, tmp_path, text_file):
    text = tmp_path / "upper.txt"
    text.write_text("Hello World " * 100, encoding="utf-8")
    argv = ["--data", text, "--data.tokenizer.normalize", "none", *TINY, *ONE_LAYER]
    refused("train", "mini-mixd", "--out", tmp_path / "run", *argv, names=["'H' x", "'W' x", "--normalize text8"])
    assert not (tmp_path / "run").exists()
    # and in a run that was trained without normalisation
    plain = tmp_path / "plain"
    shutil.copytree(model, plain, ignore=shutil.ignore_patterns("state"))
    tokenizer = json.loads((plain / "tokenizer.json").read_text(encoding="utf-8"))
    (plain / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalize": "none"}), encoding="utf-8")
    refused("eval", plain, names=["tokenizer.json is damaged", "tarflowlm seal"])
    assert run("seal", plain).status == 0
    refused("eval", plain, "--data", text, "--split", "all", names=["'H' x", "--normalize text8"])
    assert run_json("eval", plain, "--data", text, "--split", "all", "--normalize", "text8")["tokens"] > 1000


WRONG_SAMPLES = {
    "empty-prompt": (["--prompt", ""], ["empty", "--prompt"]),
    "empty-prompt-normalised": (["--prompt", "", "--normalize", "text8"], ["empty", "--prompt"]),
    "unknown-characters": (["--prompt", "ab C!"], ["'!'", "--normalize text8"]),
    "long-prompt": (["--prompt", "a" * 40], ["40 tokens", "32"]),
    "prompt-of-the-length": (["--prompt", "abcd", "--length", "4"], ["4 tokens", "shorten"]),
    "none": (["--num", "0"], ["num 0"]),
    "no-length": (["--length", "0"], ["length 0"]),
    "negative-length": (["--length", "-3"], ["length -3"]),
    "long-passes": (["--length", "33", "--passes"], ["length 33", "32"]),
    "long-particles": (["--length", "33", "--prompt", "a", "--particles", "2"], ["particles 2", "32"]),
    "long-template": (["--template", "a_" * 17], ["length 34", "template", "32"]),
    "cold": (["--temperature", "0"], ["temperature 0.0"]),
    "nan": (["--temperature", "nan"], ["temperature nan"]),
    "hot": (["--temperature", "inf"], ["temperature inf", "finite"]),
    "top-k": (["--top-k", "0"], ["top-k 0"]),
    "top-p": (["--top-p", "1.5"], ["top-p 1.5"]),
    "seed": (["--seed", str(2**80)], [f"seed {2**80}"]),
    "decoder": (["--decoder", "magic"], ["'magic'", "steps"]),
    "decoding": (["--decoding", "magic"], ["'magic'", "drawn"]),
    "word": (["--num", "two"], ["--num", "'two'"]),
}


@pytest.mark.parametrize(("wrong", "names"), WRONG_SAMPLES.values(), ids=WRONG_SAMPLES.keys())
def test_wrong_requests_for_samples_are_named(refused, model, wrong, names):
    refused("sample", model, *wrong, names=names)


WRONG_EVALS = {
    "samples": (["--samples", "0"], ["samples 0"]),
    "windows": (["--windows", "0"], ["windows 0"]),
    "seed": (["--seed", "-1"], ["seed -1"]),
    "split": (["--split", "trian"], ["'trian'", "train"]),
}


@pytest.mark.parametrize(("wrong", "names"), WRONG_EVALS.values(), ids=WRONG_EVALS.keys())
def test_wrong_requests_for_likelihood_are_named(refused, model, wrong, names):
    refused("eval", model, *wrong, names=names)


def truncate(run: Path) -> None:
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def reshape(run: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    save_file(tensors | {"codebook.mean": torch.zeros(3, 3)}, run / "model.safetensors", metadata={"blocks": "3"})
    write_manifest(run, CHECKPOINT)


def rename(run: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    tensors["other"] = tensors.pop("codebook.mean")
    save_file(tensors, run / "model.safetensors", metadata={"blocks": "3"})
    write_manifest(run, CHECKPOINT)


DAMAGES = {
    "broken-config": (lambda run: put_config(run, "{broken"), "config.json"),
    "config-of-another": (lambda run: put_config(run, '{"lr": 1}'), "lr"),
    "no-config": (lambda run: (run / "config.json").unlink(), "config.json"),
    "truncated": (truncate, "model.safetensors is damaged"),
    "reshaped": (reshape, "codebook.mean has shape [3, 3]"),
    "renamed": (rename, "no tensor codebook.mean"),
    "no-weights": (lambda run: (run / "model.safetensors").unlink(), "model.safetensors"),
    "no-tokenizer": (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json"),
    "no-manifest": (lambda run: (run / "manifest.json").unlink(), "manifest.json"),
    "foreign": (lambda run: [path.unlink() for path in run.glob("*") if path.is_file()], "config.json"),
}


@pytest.mark.parametrize(("damage", "name"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_runs_are_named_and_left_alone(refused, damaged, damage, name):
    damage(damaged)
    before = listing(damaged)
    refused("eval", damaged, names=[name])
    refused("sample", damaged, names=[name])
    assert listing(damaged) == before


def test_directories_that_are_none_or_foreign(refused, tmp_path):
    for command in ("eval", "sample"):
        refused(command, tmp_path / "missing", names=["missing", "tarflowlm train"])
        refused(command, tmp_path, names=["config.json"])
        refused(command, tmp_path, "--model", "english-mini", names=["english-mini", "one of them"])
        refused(command, "x" * 5000, names=["name too long"])
    refused("train", "--resume", tmp_path / "missing", names=["missing"])
    refused("train", "--resume", names=["--resume"])
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_not_resumed(refused, model):
    before = listing(model)
    refused("train", "--resume", model, names=["is finished"])
    assert listing(model) == before


def test_an_out_that_cannot_be_written_costs_one_line(refused, text_file, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    argv = ["--data", text_file, "--steps", 1, *TINY, *FAMILIES["mini-ar"]]
    refused("train", "mini-ar", "--out", tmp_path / "file" / "run", *argv, names=["file"])
    refused("data", text_file, "--out", tmp_path / "file" / "corpus", names=["file"])
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
