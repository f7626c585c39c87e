"""Every command once, in process: what it prints, the keys of --json, and what it writes."""

import io
import json
import shutil
import sys
import time

import pytest
import torch
from command_cases import CHECKPOINT, TINY, TINY_AR

from helpers import save_run, tiny_flow
from tarflowlm.cli import quickstart
from tarflowlm.cli.main import COMMANDS, main
from tarflowlm.cli.train import read
from tarflowlm.data import ByteTokenizer
from tarflowlm.data.bpe import train_bpe
from tarflowlm.evaluation.scores import score
from tarflowlm.files import writer_lock
from tarflowlm.model_config import Affine, BlockConfig, MixD
from tarflowlm.pretrained import load
from tarflowlm.runs.checkpoint import export, load_checkpoint
from tarflowlm.runs.hub import released
from tarflowlm.terminal.bars import print_json
from tarflowlm.terminal.texts import write_out

EVAL = {
    "bpc",
    "ppl",
    "nats_per_token",
    "bits_per_byte",
    "bound",
    "samples",
    "stderr",
    "tokens",
    "characters",
}
EVAL |= {"windows", "source", "split", "context", "precision", "stride", "text_tokens", "seconds"}


@pytest.mark.parametrize(
    "command", [[], ["--help"], ["train", "--help"], *([name, "--help"] for name in COMMANDS)]
)
def test_help_is_no_error(run, command):
    shown = run(*command)
    assert (shown.status, shown.err) == (0, "")
    assert len(shown.out.splitlines()) > 5
    assert not any(
        noise in shown.out for noise in ("(default: None)", "(default: False)", "{None}")
    )


@pytest.mark.slow
def test_train_writes_a_complete_run_directory(run_json, trained, corpus_file, tmp_path):
    files = {path.name for path in trained.iterdir()}
    assert files >= {*CHECKPOINT, "metrics.jsonl", "summary.json", "state", "best"}
    config = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    assert config["name"] == "mini-mixd"
    assert (config["model"]["context"], sum(config["train"]["stage_steps"])) == (32, 6)
    out = tmp_path / "run"
    argv = [
        "--steps",
        3,
        "--seed",
        7,
        "--checkpoint-every",
        2,
        "--optim.lr",
        0.01,
        "--data",
        corpus_file,
    ]
    summary = run_json("train", "mini-ar", "--out", out, *argv, *TINY_AR)
    assert summary == json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 3
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (config["seed"], config["train"]["checkpoint_every"], config["optim"]["lr"]) == (
        7,
        2,
        0.01,
    )
    assert config["data"]["source"] == str(corpus_file)


def test_options_of_train_reach_the_configuration():
    stages = read(["mini-mixd", "--out", "x", "--steps", "20"]).configured().train
    assert stages.stage_steps == (16, 2, 2)
    assert read(["quickstart", "--out", "x", "--steps", "20"]).configured().train.minutes == 0.0
    assert read(["quickstart", "--out", "x", "--minutes", "0.5"]).configured().train.minutes == 0.5
    changed = read(["mini-mixd", "--out", "x", "--model.blocks.1.no-sees-channels"]).configured()
    assert [block.sees_channels for block in changed.model.blocks[1:]] == [False, True]
    argv = ["mini-mixd", "--out", "x", "--model.blocks.0.coupling", "affine"]
    changed = read([*argv, "--model.blocks.1.coupling=mixd", "--model.blocks.1.components", "3"])
    first, second, _ = changed.configured().model.blocks
    assert (first, second) == (Affine(layers=4), MixD(components=3))


def test_data_prepares_a_directory_that_eval_takes(
    run_json, run, refused, model, corpus_file, tmp_path
):
    odd = tmp_path / "a [bold]b [/red]"  # names are not markup
    odd.mkdir(parents=True)
    shutil.copy(corpus_file, odd / "words.txt")
    corpus = odd / "corpus"
    letters = ["--normalize", "text8"]
    result = run_json("data", odd / "words.txt", "--out", corpus, *letters)
    assert (result["out"], result["vocab_size"]) == (str(corpus), 27)
    assert sum(result["tokens"].values()) == len(corpus_file.read_text(encoding="utf-8")) + 1
    of_text, of_corpus = (
        run_json("eval", model, "--windows", 9, *data) for data in ([], ["--data", corpus])
    )
    assert of_text["bpc"] == of_corpus["bpc"]
    assert "27 symbols" in run("data", corpus_file, "--out", tmp_path / "table", *letters).out
    refused("data", corpus, "--out", tmp_path / "again", names=["is prepared already"])


def test_a_text_shorter_than_the_context_is_evaluated_whole(run_json, model, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the cat", encoding="utf-8")
    found = run_json("eval", model, "--data", short)
    # a text8 reading ends with a space
    assert (found["tokens"], found["windows"]) == (8, 1)


def test_a_trained_run_is_evaluated_scored_sampled_and_edited(run_json, trained, corpus_file):
    """The way of a first hour, from one end to the other."""
    found = run_json("eval", trained, "--windows", 2)
    assert found["bound"] == "elbo"
    assert 0 < found["bpc"] < 10
    assert run_json("score", trained, "--text", "the cat sat")["bits"] > 0
    (sample,) = run_json("sample", trained, "--prompt", "the ", "--length", 12)["samples"]
    assert sample["text"].startswith("the ")
    (edit,) = run_json("edit", trained, "--text", "the cat sat", "--words", 1)["edits"]
    assert len(edit["text"]) == len("the cat sat")


TINY_QUICKSTART = [
    *("--model.context", "64", "--model.trunk.width", "32", "--model.blocks.0.layers", "1"),
    *("--train.batch-size", "4", "--train.evaluate-windows", "4", "--train.test-windows", "20"),
]


@pytest.mark.slow
def test_quickstart_trains_evaluates_and_samples(run_json, run, tmp_path, monkeypatch):
    argv = ["quickstart", "--out", "x", *TINY_QUICKSTART, "--data.tokenizer.vocab-size", "280"]
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time, there was a dog who liked to run. One day it ran. " * 200)
    small = read([*argv, "--data", str(text)]).configured()
    monkeypatch.setattr(quickstart, "preset", lambda name: small)
    measured = quickstart.baselines_on
    monkeypatch.setattr(quickstart, "baselines_on", lambda text: (time.sleep(1), measured(text))[1])
    result = run_json("quickstart", "--out", tmp_path / "run", "--minutes", "0.03")
    asked = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    # the other figures take of the same time
    assert asked["train"]["minutes"] < 0.03 - 1 / 60
    assert {"bpc", "bz2_bpc", "trigram_bpc", "unigram_bpc"} <= result.keys()
    assert (len(result["samples"]), result["bound"]) == (3, "elbo")
    assert result["filled"][0]["text"].startswith("Once upon a time, there was a ")
    assert result["valid_bpc"][0] > result["valid_bpc"][-1]
    assert run("sample", tmp_path / "run", "--length", 4).status == 0


def test_a_sparkline_has_a_bar_for_every_value():
    assert quickstart.sparkline([3.0, 1.0, 2.0]) == "\u2588\u2581\u2585"
    assert quickstart.sparkline([1.0]) == "\u2581"


@pytest.mark.slow
@pytest.mark.nightly
def test_quickstart_learns_stories(run_json, tmp_path, monkeypatch):
    small = read(["quickstart", "--out", "x", *TINY_QUICKSTART]).configured()
    monkeypatch.setattr(quickstart, "preset", lambda name: small)
    result = run_json(
        "quickstart", "--out", tmp_path / "run", "--minutes", "0.1", "--device", "cpu"
    )
    # a few seconds teach a model little; the others are known of this text
    assert 1.2 < result["bpc"] < 3.2
    assert 1.5 < result["bz2_bpc"] < result["trigram_bpc"] < 2.5
    assert 4.3 < result["unigram_bpc"] < 4.5
    assert (len(result["samples"]), result["out"]) == (3, str(tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["test"]["bpc"] == result["bpc"]


def test_eval_of_samples_windows_and_other_texts(run_json, run, model, tmp_path):
    few = ["--windows", 5]
    elbo, weighted = (run_json("eval", model, *few, "--samples", k) for k in (1, 3))
    assert (weighted["bound"], weighted["samples"]) == ("iw-3", 3)
    assert weighted["bpc"] < elbo["bpc"]
    assert "gap" in run("eval", model, *few, "--samples", 3).out
    assert run_json("eval", model, *few, "--seed", 1)["bpc"] != elbo["bpc"]
    other = tmp_path / "other.txt"
    other.write_text("Other Words, 1790!  " * 60, encoding="utf-8")
    # normalised as the run's text was: lower case, digits spelled out
    assert (
        run_json("eval", model, "--data", other, "--split", "all", "--samples", 1)["tokens"] > 1000
    )


def test_eval_says_that_the_text_has_changed(run, run_json, corpus_file, tmp_path):
    text = shutil.copy(corpus_file, tmp_path / "text.txt")
    out, few = tmp_path / "run", ("--windows", 4)
    run_json("train", "mini-ar", "--out", out, "--steps", 2, "--data", text, *TINY_AR)
    assert "has changed since training" not in run("eval", out, *few).err
    with text.open("a", encoding="utf-8") as file:
        file.write("more words " * 99)
    for directory in (out, out / "best"):
        assert "has changed since training" in run("eval", directory, *few).err


def test_modules_of_one_s_own_are_imported(
    run, run_json, refused, corpus_file, tmp_path, monkeypatch
):
    (tmp_path / "my_bends.py").write_text(
        "import tarflowlm\nfrom tarflowlm.flow.channelwise import AffineCoupling\n"
        "@tarflowlm.coupling('bent')\nclass Bent(AffineCoupling):\n    pass\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    argv = [
        "train",
        "mini-affine",
        "--out",
        tmp_path / "run",
        "--data",
        corpus_file,
        "--steps",
        2,
        *TINY,
    ]
    argv += ["--model.blocks.1.coupling", "bent"]
    refused(*argv, names=["coupling 'bent': choose one of affine", "--import MODULE"])
    refused(*argv, "--import", "my_bend", names=["--import my_bend: No module named 'my_bend'"])
    done = run(*argv, "--import", "my_bends")
    assert f"next: tarflowlm sample {tmp_path / 'run'} --import my_bends" in done.err
    with_it = run_json("info", tmp_path / "run", "--import", "my_bends")
    assert with_it["blocks"][1] == "block 2 bent"
    # without the module a run is shown, but not built
    monkeypatch.delitem(BlockConfig.KINDS, "bent")
    assert run_json("info", tmp_path / "run") == with_it
    (row,) = run_json("runs", tmp_path)["runs"]
    assert row["bpc"] > 0
    for command in ("sample", "eval"):
        names = ["'bent'", "my_bends", "--import my_bends"]
        refused(command, tmp_path / "run", names=names)


def test_eval_reports_the_latents_after_the_likelihood(run_json, run, models):
    argv = ["eval", models["flow"], "--latents", "--windows", 5]
    result = run_json(*argv)
    states = result["latents"]
    assert [state["block"] for state in states] == [0, 1, 2]
    assert states[-1]["nelbo"]["mean"] == pytest.approx(result["nats_per_token"], rel=1e-4)
    assert f"{states[-1]['kl']['mean']:.4f}" in run(*argv).out


def test_score_gives_the_bits_of_every_token(run_json, run, models, monkeypatch):
    model, tokenizer = load(models["flow"])
    argv = ["score", models["flow"], "--text", "the king", "--samples", 3, "--seed", 2]
    found = run_json(*argv, "--baseline", models["ar"])
    expected = score(model, torch.from_numpy(tokenizer.encode("the king")), samples=3, seed=2)
    assert [token["text"] for token in found["tokens"]] == list("the king")
    assert [token["bits"] for token in found["tokens"]] == pytest.approx(
        expected.bits.tolist(), rel=1e-5
    )
    assert len(found["tokens"][0]["log2_dets"]) == 2
    assert (found["model"], found["bound"], found["samples"], found["characters"]) == (
        "flow",
        "elbo",
        3,
        8,
    )
    assert (found["baseline"]["model"], found["baseline"]["bound"]) == ("ar", "exact")
    assert found["bpc"] == pytest.approx(found["bits"] / 8)
    shown = run(*argv, "--baseline", models["ar"]).out
    bits = [f"{one['tokens'][0]['bits']:.3f}" for one in (found, found["baseline"])]
    assert [line.split("\t") for line in shown.splitlines()[:2]] == [
        ["", "flow", "ar"],
        ["t", *bits],
    ]
    assert f"<= {found['bpc']:.4f}" in shown
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in run(*argv).out


def test_several_texts_are_compared(run_json, run, models, monkeypatch):
    argv = ["score", models["ar"], "--text", "the king", "--text", "a cat"]
    found = run_json(*argv)["texts"]
    for one, text in zip(found, ("the king", "a cat"), strict=True):
        assert "".join(token["text"] for token in one["tokens"]) == text
        assert one == run_json(*argv[:2], "--text", text)
    shown = run(*argv).out
    assert "\tthe king\n" in shown
    assert all(f"= {one['bits']:,.2f}" in shown for one in found)
    monkeypatch.setattr("tarflowlm.cli.score.MOST_TOKENS", 4)
    done = run(*argv)
    assert "the king\n" not in done.out
    assert "--json" in done.err


def test_a_character_of_several_tokens_is_shown_whole(run, run_json):
    argv = ["score", "stories-ar", "--text", "The müller"]
    lines = dict(line.split("\t") for line in run(*argv).out.splitlines()[1:] if "\t" in line)
    tokens = run_json(*argv)["tokens"]
    last = [one["text"] for one in tokens].index("ü")
    assert tokens[last - 1]["text"] == ""
    parts = [one["bits"] for one in tokens[last - 1 : last + 1]]
    assert float(lines["ü"]) == pytest.approx(sum(parts), abs=1e-3)


def test_option_file_and_standard_input_give_one_score(run, run_json, model, tmp_path, monkeypatch):
    text = "The King,\n17!"
    argv = ["score", model, "--samples", 1]
    found = run_json(*argv, "--text", text)
    assert "".join(token["text"] for token in found["tokens"]) == "the king one seven"
    assert "read as: the king one seven" in run(*argv, "--text", text).err
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    assert run_json(*argv, "--file", tmp_path / "text.txt") == found
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert run_json(*argv, "--file", "-") == found


@pytest.mark.slow
def test_info_lists_and_describes_models(run_json, run, trained, models):
    shown = run("info").out
    assert all(name in shown for name in released())
    flow = run_json("info", "english-mini")
    assert (flow["family"], len(flow["blocks"]), flow["layers"]) == ("flow", 1, [6])
    assert (flow["parameters"], flow["trunk_parameters"]) == (1_208_590, 1_182_592)
    assert "public domain" in flow["card"]
    found = run_json("info", trained)
    summary = json.loads((trained / "summary.json").read_text(encoding="utf-8"))
    assert (found["bpc"], found["steps"], found["tokens"]) == (
        summary["test"]["bpc"],
        6,
        summary["tokens"],
    )
    assert f"{found['bpc']:.4f} bits per character" in run("info", trained).out
    assert "2 per position" in run("info", models["patches"]).out
    several = run_json("info", "english-mini-ar", models["flow"])["models"]
    assert [model["name"] for model in several] == ["english-mini-ar", "flow"]


def test_runs_are_compared(run_json, run, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "a" / "finished")
    shutil.copytree(trained, tmp_path / "stopped")
    (tmp_path / "stopped" / "summary.json").unlink()
    shutil.copytree(trained, tmp_path / "other")
    config = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    config["data"]["unwrap"] = True
    (tmp_path / "other" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    export(load_checkpoint(trained), tmp_path / "exported")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{", encoding="utf-8")
    compared = run_json("runs", tmp_path)
    assert run_json("info", tmp_path) == compared
    rows = {row["name"]: row for row in compared["runs"]}
    assert list(rows)[-1] == "broken"
    assert len({tuple(row) for row in rows.values()}) == 1
    assert rows["a/finished"]["split"] == "test"
    assert (rows["stopped"]["split"], rows["stopped"]["tokens"]) == ("valid", 6 * 4 * 32)
    states = {name: row["state"] for name, row in rows.items()}
    assert "config.json" in states.pop("broken")
    # an exported model is not a run
    assert states == {
        "a/finished": "finished",
        "other": "finished",
        "stopped": "stopped, step 6 of 6",
    }
    # of two on one text, the one with a test is compared
    assert [name for name, row in rows.items() if row["best"]] == ["a/finished"]
    shown = run("runs", tmp_path)
    assert f"<= {rows['a/finished']['bpc']:.4f} *" in shown.out
    assert shown.out.count("(bpc) and more") == 2
    assert "broken: config.json" in shown.out
    assert rows["stopped"]["settings"] == {}
    other = json.loads((tmp_path / "stopped" / "config.json").read_text(encoding="utf-8"))
    other["seed"], other["optim"]["lr"] = 1, 0.5
    (tmp_path / "stopped" / "config.json").write_text(json.dumps(other), encoding="utf-8")
    rows = {row["name"]: row for row in run_json("runs", tmp_path)["runs"]}
    assert rows["stopped"]["settings"] == {"optim.lr": 0.5, "seed": 1}
    other["optim"]["lr"] = config["optim"]["lr"]
    shutil.copytree(trained, tmp_path / "again")
    (tmp_path / "again" / "config.json").write_text(json.dumps(other), encoding="utf-8")
    shown = run("runs", tmp_path)
    assert "lr" in shown.out
    assert "± 0.0000 (test) over 2 seeds: a/finished, again" in shown.err + shown.out
    monkeypatch.setenv("COLUMNS", "56")
    assert f"<= {rows['a/finished']['bpc']:.4f} *" in run("runs", tmp_path).out
    # a run that is ahead before its test is compared by validations
    log = tmp_path / "stopped" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["bpc"] /= 2
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    rows = run_json("runs", tmp_path / "a", tmp_path / "again", tmp_path / "stopped")["runs"]
    assert [row["name"] for row in rows if row["best"]] == ["stopped"]
    with writer_lock(tmp_path / "stopped"):
        assert run_json("runs", tmp_path / "stopped")["runs"][0]["state"].startswith("training now")


@pytest.mark.slow
def test_report_writes_a_page(run_json, trained, tmp_path):
    pytest.importorskip("matplotlib")
    found = run_json("report", trained, "--out", tmp_path / "report")
    assert found.keys() >= {"page", "figures", "runs"}
    assert "mine" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_an_exported_model_is_half_the_size(run_json, trained, tmp_path):
    whole, half = (
        run_json("export", trained, "--out", tmp_path / out, *more)["bytes"]
        for out, more in (("a", []), ("b", ["--half"]))
    )
    assert half < 0.8 * whole
    assert {path.name for path in (tmp_path / "a").iterdir()} >= CHECKPOINT


TEXT = "the king of land"
EDITS = {
    "words": (["--words", 1, "--candidates", 2], lambda text: len(text) == 16),
    "strength": (["--strength", 0], lambda text: text == TEXT),
    "rewrite": (
        ["--rewrite", "king", "--candidates", 2],
        lambda text: text[:4] + text[8:] == "the  of land",
    ),
    "replace": (["--replace", "king", "lord"], lambda text: text[4:8] == "lord"),
    "level": (["--level", 1, "--strength", 0], lambda text: text == TEXT),
    "level, words": (["--level", 1, "--words", 1, "--strength", 0], lambda text: text == TEXT),
}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "holds"), EDITS.values(), ids=EDITS.keys())
def test_edits(run_json, run, model, options, holds):
    argv = ["edit", model, "--text", TEXT, "--num", 2, *options]
    found = run_json(*argv)
    assert found.keys() == {"before", "edits", "advice"}
    assert (found["before"], len(found["edits"])) == (TEXT, 2)
    for edit in found["edits"]:
        assert edit.keys() - {"pareto_k"} == {"text", "changed", "bpc_before", "bpc"}
        assert len(edit["text"]) == len(edit["changed"]) == 16
        assert holds(edit["text"]), edit
    done = run(*argv)
    assert len(done.out.split("\n\n")) == 2
    assert "edit 2: " in done.err


@pytest.mark.slow
def test_edits_of_word_pieces(run_json, refused, tmp_path):
    """Their tokens begin with a space."""
    text = "The king saw the other King"
    tokenizer = train_bpe(
        [f"{text} The Queen saw the queen. " * 9], 280, alphabet=None, normalization="none"
    )
    model = tiny_flow(couplings=("mixd", "mix1"), vocab_size=280, context=16)
    argv = ["edit", save_run(tmp_path / "bpe", model, tokenizer=tokenizer), "--text", text]
    replaced = run_json(*argv, "--replace", "king", "zzz", "--around", 0)["edits"][0]["text"]
    assert replaced == text.replace("king", "zzz")
    refused(*argv, "--replace", "dog", "queen", names=["'dog' does not occur"])


def test_an_edit_is_plain_text_elsewhere_than_on_a_terminal(run, tmp_path):
    model = tiny_flow(couplings=("mixd",), vocab_size=256, context=32)
    argv = ["edit", save_run(tmp_path / "bytes", model, tokenizer=ByteTokenizer()), "--text"]
    text = "the king\nof\tthe land"
    assert run(*argv, text, "--strength", 0, "--num", 2).out == f"{text}\n\n{text}\n"
    assert run(*argv, "a\x1b[2J", "--strength", 0).out == "a\ufffd[2J\n"


def test_characters_outside_the_output_encoding_are_replaced(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="")
    monkeypatch.setattr(sys, "stdout", out)
    main(["--version"])
    print_json({"text": "caf\u00e9"})
    write_out("\u2019")
    assert out.buffer.getvalue().endswith(b'{"text": "caf?"}\n?')
