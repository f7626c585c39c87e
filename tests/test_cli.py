"""The command line, in process: what it prints, and that what the user got wrong costs one line and nothing else."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tarflowlm.cli.main import main
from tarflowlm.runs.manifest import write_manifest

TINY = ["--model.context", "32", "--model.trunk.width", "32", "--train.batch-size", "4", "--device", "cpu"]
ONE_LAYER = ["--model.layers", "1", "1", "1"]
FAMILIES = {
    "mini-ar": ["--model.layers", "1"],
    "mini-affine": ONE_LAYER,
    "mini-mix1": ONE_LAYER,
    "mini-mixd": ONE_LAYER,
    "mini-mixd-p2": ONE_LAYER,
}
EVAL_KEYS = {"bpc", "ppl", "nats_per_token", "bound", "samples", "stderr", "tokens", "characters", "windows"}
ALPHABET = " abcdefghijklmnopqrstuvwxyz"
CHECKPOINT = {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture(autouse=True, scope="module")
def private_places(tmp_path_factory):
    """A cache of its own, and lines of a known length."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TARFLOWLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("COLUMNS", "100")
        yield


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    """About 8,000 characters of words made up of a-z."""
    rng = random.Random(1)
    words = ["".join(rng.choices(ALPHABET[1:], k=rng.randint(1, 7))) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(rng.choice(words) for _ in range(1600)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory, text_file) -> dict[str, Path]:
    """One tiny run of every family, made by the command line."""
    root = tmp_path_factory.mktemp("runs")
    for name, layers in FAMILIES.items():
        steps = ["--steps", "6", "--train.evaluate-windows", "4"]
        main(["train", name, "--out", str(root / name), "--data", str(text_file), *steps, *TINY, *layers])
    torch.set_flush_denormal(False)
    return {name: root / name for name in FAMILIES}


@pytest.fixture
def model(models) -> Path:
    return models["mini-mixd"]


@pytest.fixture
def damaged(models, tmp_path) -> Path:
    """A copy of a run to be damaged."""
    return Path(shutil.copytree(models["mini-mixd"], tmp_path / "damaged", ignore=shutil.ignore_patterns("state")))


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# what works


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
        assert set(sample["text"]) <= set(ALPHABET)


def test_more_samples_leave_the_first_as_it_was(run_json, model):
    one = run_json("sample", model, "--num", 1, "--length", 9)["samples"]
    assert run_json("sample", model, "--num", 3, "--length", 9)["samples"][:1] == one


def test_passes_go_from_noise_to_text(run_json, run, model):
    sample = run_json("sample", model, "--length", 8, "--passes")["samples"][0]
    assert len(sample["passes"]) == 4
    assert sample["passes"][-1] == sample["text"]
    shown = run("sample", model, "--length", 8, "--passes").out
    for name in ("noise", "after block 3", "after block 2", "text"):
        assert name in shown


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
        patch.setattr("tarflowlm.terminal.console.ProgressReporter.record", interrupted)
        stopped = run("train", "mini-mixd", "--out", out, *argv, *TINY, *ONE_LAYER)
    assert stopped.status == 130
    assert "train --resume" in stopped.err
    assert "Traceback" not in stopped.err
    assert run_json("sample", out, "--length", "4")["samples"]
    assert run_json("train", "--resume", out, "--device", "cpu")["steps"] == 6
    ours, theirs = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# what the user got wrong


def test_unknown_commands_and_presets_are_listed(refused):
    refused("trian", names=["'trian'", "train", "eval", "sample"])
    refused("train", "mini-mixx", "--out", "x", names=["'mini-mixx'", "mini-mixd"])
    refused("train", names=["preset", "--resume"])
    refused("bench", "nothing", names=["'nothing'", "numerics"])


WRONG_FIELDS = {
    "unknown": (["--model.widht", "3"], ["--model.widht", "--help"]),
    "type": (["--seed", "x"], ["--seed", "'x'"]),
    "negative-seed": (["--seed", "-1"], ["seed -1"]),
    "large-seed": (["--seed", str(2**70)], [f"seed {2**70}"]),
    "patch": (["--model.patch", "3"], ["patch 3", "context 32"]),
    "no-steps": (["--steps", "0"], ["steps 0"]),
    "few-steps": (["--steps", "2"], ["steps 2", "3 stages"]),
    "coupling": (["--model.couplings", "mixd", "mixx", "mix1"], ["'mixx'", "mix1"]),
    "layers": (["--model.layers", "1", "2"], ["(1, 2)"]),
    "width": (["--model.trunk.width", "33"], ["width 33", "multiple"]),
    "rate": (["--optim.lr", "-1"], ["optim.lr -1.0"]),
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
    refused("train", "mini-mixd", "--out", model, "--data", text_file, names=[str(model), "--resume", "--out"])
    refused("data", text_file, "--out", model, names=[str(model), "--out"])
    assert listing(model) == before


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
    "unknown-characters": (["--prompt", "ab C!"], ["'C'", "'!'", "--normalize text8"]),
    "long-prompt": (["--prompt", "a" * 40], ["40 tokens", "32"]),
    "prompt-of-the-length": (["--prompt", "abcd", "--length", "4"], ["4 tokens", "shorten"]),
    "none": (["--num", "0"], ["num 0"]),
    "no-length": (["--length", "0"], ["length 0"]),
    "negative-length": (["--length", "-3"], ["length -3"]),
    "long": (["--length", "33"], ["length 33", "32"]),
    "cold": (["--temperature", "0"], ["temperature 0.0"]),
    "nan": (["--temperature", "nan"], ["temperature nan"]),
    "top-k": (["--top-k", "0"], ["top-k 0"]),
    "top-p": (["--top-p", "1.5"], ["top-p 1.5"]),
    "seed": (["--seed", str(2**80)], [f"seed {2**80}"]),
    "decoder": (["--decoder", "magic"], ["'magic'", "sequential"]),
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


def put_config(run: Path, text: str) -> None:
    (run / "config.json").write_text(text, encoding="utf-8")
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
        refused(command, names=["run directory", "--model"])
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


# what nobody thought of

few = settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
# an argument of a process holds neither NUL nor, from a terminal, anything that is not the encoding's
words = st.text(st.characters(exclude_characters="\0"), max_size=60)


def assert_no_traceback(result: SimpleNamespace) -> None:
    assert result.status in (0, 2), result.err
    if result.status == 2:
        assert result.err.count("\n") == 1, result.err


@few
@given(prompt=words, normalize=st.booleans(), length=st.integers(-2, 40))
def test_no_prompt_breaks_sampling(run, models, prompt, normalize, length):
    more = ["--normalize", "text8"] if normalize else []
    assert_no_traceback(
        run("sample", models["mini-mixd-p2"], f"--prompt={prompt}", "--length", length, *more, "--json")
    )


@few
@given(prompt=st.text(ALPHABET, max_size=34), temperature=st.floats(), top_k=st.integers(), top_p=st.floats())
def test_no_sampler_setting_breaks_sampling(run, model, prompt, temperature, top_k, top_p):
    argv = [f"--prompt={prompt}", f"--temperature={temperature}", f"--top-k={top_k}", f"--top-p={top_p}"]
    assert_no_traceback(run("sample", model, "--length", 6, *argv))


FIELDS = [
    "seed", "steps", "checkpoint-every", "name", "data", "device", "model.context", "model.patch", "model.latent-dim",
    "model.head-hidden", "model.couplings", "model.layers", "model.components", "model.in-patch", "model.vocab-size",
    "model.family", "model.trunk.width", "model.trunk.num-heads", "model.trunk.mlp-ratio", "model.trunk.rotary-base",
    "optim.optimizer", "optim.lr", "optim.beta1", "optim.beta2", "optim.weight-decay", "optim.grad-clip",
    "optim.warmup", "optim.decay", "optim.schedule", "optim.codebook-lr-scale", "train.stage-steps", "train.mode",
    "train.advance", "train.batch-size", "train.precision", "train.stall-tolerance", "data.tokenizer.kind",
    "data.tokenizer.alphabet", "data.tokenizer.vocab-size", "data.tokenizer.source", "data.tokenizer.normalize", "",
]  # fmt: skip
values = st.one_of(
    st.sampled_from(
        ["", "-", "--", "0", "-1", "1", "2", "3", "nan", "inf", "-inf", "1e400", "1e-9", "None", "True", "[]"]
    ),
    st.sampled_from(["mixd", "mix1", "affine", "joint", "bpe", "byte", "cpu", "auto", "9" * 25, "0x10", "1_0", "①"]),
    words,
)


@settings(few, max_examples=120)
@given(field=st.sampled_from(FIELDS), value=values)
def test_no_field_value_breaks_training(run, text_file, tmp_path, field, value):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    argv = ["--data", text_file, "--steps", 3, "--train.evaluate-windows", 1, *TINY, *ONE_LAYER]
    result = run("train", "mini-mixd", "--out", tmp_path / "run", *argv, f"--{field}", value)
    assert_no_traceback(result)


@few
@given(
    argv=st.lists(
        st.one_of(words, st.sampled_from(["train", "mini-ar", "--out", "--resume", "eval", "--json"])), max_size=5
    )
)
def test_no_command_line_breaks(run, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    assert_no_traceback(run("train", *argv))
    assert_no_traceback(run("eval", *argv))
    assert not list(tmp_path.iterdir())


@few
@given(content=st.one_of(st.binary(max_size=200), words.map(lambda s: s.encode("utf-8", "surrogatepass"))))
def test_no_text_breaks_evaluation(run, model, tmp_path, content):
    (tmp_path / "text.txt").write_bytes(content)
    assert_no_traceback(run("eval", model, "--data", tmp_path / "text.txt", "--split", "all"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
paths = [("seed",), ("name",), ("model",), ("model", "context"), ("model", "patch"), ("model", "layers"),
         ("model", "trunk", "width"), ("model", "trunk", "num_heads"), ("model", "components"), ("model", "family"),
         ("optim", "lr"), ("train", "stage_steps"), ("data", "source"), ("data", "tokenizer")]  # fmt: skip


@few
@given(path=st.sampled_from(paths), value=json_values)
def test_no_config_breaks_sampling(run, models, path, value, tmp_path_factory):
    broken = Path(shutil.copytree(models["mini-mixd"], tmp_path_factory.mktemp("broken") / "run"))
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    put_config(broken, json.dumps(config))
    assert_no_traceback(run("sample", broken, "--length", 4))
