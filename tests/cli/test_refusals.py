"""Mistakes of users: one line on stderr, exit status 2, and nothing on disk."""

import io
import itertools
import json
import shutil
from dataclasses import is_dataclass
from importlib.util import find_spec
from pathlib import Path
from string import ascii_lowercase
from typing import get_args, get_type_hints

import pytest
from command_cases import TINY, listing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import save_run, tiny_flow
from tarflowlm.cli import sample
from tarflowlm.cli.main import command_module
from tarflowlm.data import TEXT8_ALPHABET, CharTokenizer
from tarflowlm.options import flag
from tarflowlm.requests import Writing

COMPLETE = {
    "sample": ["sample", "flow"],
    "eval": ["eval", "flow"],
    "score": ["score", "flow", "--text", "the king"],
    "edit": ["edit", "flow", "--text", "the king"],
    "quickstart": ["quickstart", "--out", "OUT"],
}
"""A command with the words that it needs, for commands whose options hold numbers."""
WITH = {
    ("edit", "words"): ["--pick", "random"],
    ("edit", "around"): ["--replace", "king", "lord"],
}
"""Options without which an option has no effect."""


def number_options() -> list[tuple[str, str, str]]:
    """Every option that takes a number, with a number that it refuses."""
    found = []
    for command in COMPLETE:
        args = command_module(command).Args
        parts = [args, *(hint for hint in get_type_hints(args).values() if is_dataclass(hint))]
        for name, hint in itertools.chain(*(get_type_hints(part).items() for part in parts)):
            kinds = {hint, *get_args(hint)}
            if int in kinds:
                found.append((command, flag(name), "-1"))
            if float in kinds:
                found += [(command, flag(name), "nan"), (command, flag(name), "-1")]
    return found


GIVEN = {
    "num": ["2"],
    "prompts": ["-"],
    "prompt": ["a"],
    "template": ["a_"],
    "contains": ["a"],
    "without": ["a"],
    "matches": ["a"],
    "sentences": ["2"],
    "words": ["2"],
    "out": ["OUT"],
    "particles": ["2"],
    "stop": ["a"],
    "length": ["3"],
    "max_new_tokens": ["3"],
}
"""Values of the options of `sample` that are no flags."""
PAIRS = [
    (one, other)
    for part in (sample.Args, Writing)
    for one, others in part.EXCLUSIVE.items()
    for other in others
    if other != "allowed"  # an option of Python alone
]
HAS_REGEX = find_spec("llguidance") is not None
BYTES = "\udcff\udcfe"
"""How Python keeps arguments that are not UTF-8."""
TRAIN = ["train", "mini-mixd", "--out", "OUT", "--data", "TEXT", *TINY]
SAMPLE, EVAL, EDIT = COMPLETE["sample"], COMPLETE["eval"], COMPLETE["edit"]
LINES = [
    (["trian"], ["'trian'", "train", "eval", "sample"]),
    (["train"], ["mini-mixd", "--resume"]),
    (["train", "mini-mixx", "--out", "OUT"], ["'mini-mixx'", "mini-mixd"]),
    (["train", "mini-mixd"], ["--out"]),
    (["train", "--from", "flow", "--data", "TEXT"], ["--out"]),
    (["train", "--from", "flow", "--out", "OUT"], ["--data"]),
    (["train", "--resume", "OUT"], ["OUT", "made by `tarflowlm train`"]),
    (["train", "--resume", "english-small"], ["not a run directory", "train --from english-small"]),
    (["sample", ""], [". is not a run directory", "stories"]),
    ([*TRAIN, "--seed", "-1"], ["seed -1"]),
    ([*TRAIN, "--model.patch", "3"], ["patch 3", "context 32"]),
    ([*TRAIN, "--model.blocks.1.components", "0"], ["model.blocks.1.components 0"]),
    ([*TRAIN, "--steps", "2"], ["steps 2", "3"]),
    ([*TRAIN, "--steps", "9", "--minutes", "1"], ["--steps 9", "--minutes"]),
    ([*TRAIN, "--steps", "9", "--train.minutes=1"], ["--steps with --train.minutes"]),
    ([*TRAIN, "--data.source", "x"], ["--data with --data.source"]),
    ([*TRAIN, "--optim.warmup", "0.7"], ["optim.warmup 0.7", "decay 0.4"]),
    ([*TRAIN, "--minutes", "inf"], ["minutes inf", "finite"]),
    ([*TRAIN, "--minutes", "nan"], ["minutes nan"]),
    ([*TRAIN, "--model.trunk.width", "33"], ["width 33"]),
    ([*TRAIN, "--normalize", "text8", "--model.vocab-size", "5"], ["vocab_size 5", "27"]),
    ([*TRAIN, "--normalize", "text8", "--model.context", "4096"], ["4096"]),
    ([*TRAIN, "--data", "no-such-file.txt"], ["'no-such-file.txt'", "tales"]),
    (["data", "TEXT", "--out", "OUT", "--kind", "bpe"], ["vocab_size 0"]),
    (["report"], ["report runs/mine"]),
    (["quickstart", "--out", "/proc/x/y", "--minutes", "0.1"], ["/proc/x"]),
    ([*SAMPLE, "--prompt", ""], ["prompt"]),
    ([*SAMPLE, "--prompt", "日本"], ["日本"]),
    ([*SAMPLE, "--prompt", BYTES], ["prompt", "UTF-8"]),
    ([*SAMPLE, "--prompt", "a" * 40], ["40 tokens", "16"]),
    ([*SAMPLE, "--length", "33", "--passes"], ["length 33", "16"]),
    ([*SAMPLE, "--length", "1" + "0" * 12], ["length 1000", "10,000,000"]),
    ([*SAMPLE, "--stop", "b", "--template", "a_b"], ["stop", "template"]),
    (["sample", "x", "--stop", ""], ["stop", "at least one"]),
    (["sample", "x", "--prompt", ""], ["prompt", "at least one"]),
    (["edit", "x", "--text", "abc", "--strength", "2"], ["strength 2"]),
    ([*SAMPLE, "--template", "a_" * 17], ["34", "16"]),
    ([*SAMPLE, "--template", "the end"], ["'_'"]),
    ([*SAMPLE, "--template", "a [...0] b"], ["[...0]", "at least 1"]),
    ([*SAMPLE, "--template", "the [... end"], ["[... end", "[...12]"]),
    ([*SAMPLE, "--template", "the end [...]"], ["ends in a gap", "prompt"]),
    ([*SAMPLE, "--template", "the [...20] end"], ["16"]),
    ([*SAMPLE, *(f"--without={one}" for one in ascii_lowercase)], ["without", "no letters"]),
    ([*SAMPLE, "--matches", "("], ["matches '('" if HAS_REGEX else "llguidance"]),
    (["score", "flow", "--text", "a", "--text", "b", "--baseline", "ar"], ["2 texts", "baseline"]),
    (["sample", "Once upon a time"], ["--prompt"]),
    (["train", "--resume", "flow", "--seed", "5"], ["--seed", "--from"]),
    ([*SAMPLE, "--contains", "king of the land", "--length", "9"], ["king of", "length of 9"]),
    ([*SAMPLE, "--contains", "a", "--length", "17"], ["17", "16"]),
    ([*SAMPLE, "--seed", str(2**80)], [f"seed {2**80}"]),
    (["sample", "x", "--num", "1e3"], ["--num", "1e3", "sample --help"]),
    (["sample", "x", "--top-p", "much"], ["--top-p", "much"]),
    (["sample", "x", "--decoder", "magic"], ["--decoder", "'magic'", "steps"]),
    ([*TRAIN, "--train.compile", "maybe"], ["--train.compile 'maybe'", "give True or False"]),
    ([*TRAIN, "--train.stage-steps", "1", "x"], ["stage-steps.1 'x'", "train mini-mixd --help"]),
    ([*TRAIN, "--data.tokenizer.kind", "word"], ["--data.tokenizer.kind 'word'", "char, byte"]),
    (["sample", "affine", "--temperature", "0.5"], ["temperature 0.5", "affine"]),
    (["sample", "ar", "--passes"], ["--passes", "baseline"]),
    (["sample", "no-such"], ["no-such", "stories"]),
    ([*EVAL, "--split", "foo"], ["split 'foo'", "choose one of train, valid, test, all"]),
    ([*EVAL, "--stride", "8"], ["stride 8", "2 blocks"]),
    (["eval", "patches-ar", "--stride", "3"], ["stride 3", "patch of 2"]),
    (["eval", "ar", "--latents"], ["baseline", "--latents"]),
    (["score", "flow"], ["--text", "--file"]),
    ([*EDIT[:2], "--text", "a" * 17], ["17 tokens", "context of 16", "shorten"]),
    ([*EDIT, "--decoder", "steps"], ["decoder"]),
    ([*EDIT, "--words", "1", "--strength", "0.5"], ["words", "strength"]),
    ([*EDIT, "--replace", "king", "lord", "--rewrite", "king"], ["rewrite", "replace"]),
    ([*EDIT, "--replace", "king"], ["replace ('king',)", "a list of 2"]),
    ([*EDIT, "--rewrite", "queen"], ["'queen'"]),
    ([*EDIT, "--rewrite", " "], ["piece ' ' is white space"]),
    ([*EDIT, "--replace", "king", " "], ["replacement ' ' is white space"]),
    ([*EDIT, "--level", "7"], ["level 7"]),
    (["edit", "ar", "--text", "abc", "--level", "0"], ["baseline", "leave --level out"]),
    (["edit", "patches-ar", "--text", "the king"], ["patch 2"]),
    ([*EDIT, "--rewrite", "kin"], ["'kin' is part of a word", "'king'"]),
    (["runs", "."], ["no run"]),
    (["push", "flow", "nobody"], ["nobody", "OWNER/NAME"]),
    (["studio", "--port", "70000"], ["port 70000"]),
]
BOXES = [
    (["sample", "x", "--lenght", "3"], ["--lenght", "--length"]),
    ([*TRAIN, "--seed"], ["--seed"]),
    ([*TRAIN, "stray"], ["stray"]),
    (["data", "x"], ["--out"]),
]
"""Options that tyro describes in a box."""


@pytest.fixture
def complete(models, corpus_file, tmp_path, monkeypatch):
    """complete(argv): the words with the paths that the tables leave open.

    Works in an empty folder.
    """
    monkeypatch.chdir(tmp_path)
    places = {"OUT": str(Path("deep") / "run"), "TEXT": str(corpus_file)}
    places |= {name: str(path) for name, path in models.items()}
    return lambda argv: [places.get(word, word) for word in argv]


@pytest.mark.parametrize(("command", "option", "value"), number_options())
def test_every_number_out_of_range_is_named(refused, complete, tmp_path, command, option, value):
    more = WITH.get((command, option[2:]), [])
    refused(*complete([*COMPLETE[command], *more, option, value]), names=[value])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_options_that_exclude_each_other_are_named(refused, complete, one, other):
    words = [word for name in (one, other) for word in (flag(name), *GIVEN.get(name, []))]
    labels = [Writing.NAMES.get(name, name) for name in (one, other)]
    refused(*complete([*SAMPLE, *words]), names=labels)


@pytest.mark.slow
@pytest.mark.parametrize(("argv", "names"), LINES, ids=[" ".join(argv)[-40:] for argv, _ in LINES])
def test_wrong_requests_cost_one_line(refused, complete, tmp_path, argv, names):
    refused(*complete(argv), names=["deep" if name == "OUT" else name for name in names])
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]


@pytest.mark.parametrize(("argv", "names"), BOXES, ids=[" ".join(argv)[-40:] for argv, _ in BOXES])
def test_options_that_do_not_parse_cost_a_box(run, complete, tmp_path, argv, names):
    done = run(*complete(argv))
    assert (done.status, done.out) == (2, "")
    assert [name for name in names if name not in done.err] == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv", [["sample", "flow", "--prompts", "-"], ["score", "flow", "--file", "-"]]
)
def test_closed_standard_input_costs_one_line(refused, complete, monkeypatch, argv):
    monkeypatch.setattr("sys.stdin", None)
    refused(*complete(argv), names=["standard input"])


def test_a_file_without_texts_costs_one_line(refused, model, tmp_path):
    (tmp_path / "spaces.txt").write_text(" \n\n", encoding="utf-8")
    refused("score", model, "--texts", tmp_path / "spaces.txt", names=["spaces.txt", "no text"])


def test_a_table_is_no_text(refused, complete, tmp_path):
    (tmp_path / "texts.csv").write_text("id,text\n" + "1,a cat\n" * 99, encoding="utf-8")
    for argv in ([*EVAL, "--data", "texts.csv"], ["data", "texts.csv", "--out", "OUT"]):
        refused(*complete(argv), names=["texts.csv is a table", ".jsonl"])


def test_a_line_that_cannot_be_scored_is_named(refused, model, tmp_path):
    (tmp_path / "lines.txt").write_text("the cat\n\n…\n", encoding="utf-8")
    refused("score", model, "--texts", tmp_path / "lines.txt", names=["line 3 of", "lines.txt"])


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"", "is empty"), (b"\xff\xfe\x00\x01" * 50, "not UTF-8"), (b"a few words", "longer text")],
)
def test_texts_that_cannot_be_used(refused, complete, tmp_path, content, name):
    (tmp_path / "bad.txt").write_bytes(content)
    for argv in ([*EVAL, "--split", "test"], TRAIN):
        refused(*complete(argv), "--data", "bad.txt", "--normalize", "text8", names=[name])
    if len(content) != 11:
        refused("data", "bad.txt", "--out", "corpus", names=[name])
    assert {path.suffix for path in tmp_path.iterdir()} <= {".txt", ".lock"}


def test_unknown_characters_are_counted_and_shown(refused, run_json, tmp_path):
    plain = CharTokenizer(TEXT8_ALPHABET, "none")
    model = save_run(tmp_path / "plain", tiny_flow(vocab_size=27, context=16), tokenizer=plain)
    (tmp_path / "upper.txt").write_text("Hello World, 1790! " * 100, encoding="utf-8")
    argv = ["eval", model, "--data", tmp_path / "upper.txt", "--split", "all"]
    refused(*argv, names=["'1' x100", "--normalize text8"])
    refused("sample", model, "--prompt", "the 17", names=["'1' x1", "--normalize text8"])
    assert run_json(*argv, "--normalize", "text8")["tokens"] > 1000


def test_wrong_prompts_are_named_by_their_line(refused, model, tmp_path, monkeypatch):
    path, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    argv = ["sample", model, "--out", out, "--prompts"]
    path.write_text("abc\n\n日本\n", encoding="utf-8")
    refused(*argv, path, names=[f"line 3 of {path}", "日本"])
    path.write_text("Abc\n" + 40 * "a" + "\n", encoding="utf-8")
    refused(*argv, path, names=[f"line 2 of {path}", "40 tokens", "length"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n\n")))
    refused(*argv, "-", names=["no prompt"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    refused(*argv, "-", names=["standard input", "UTF-8"])
    assert not out.exists()


def test_existing_files_are_left_alone(refused, copied, corpus_file, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    before = listing(tmp_path)
    argv = ["--data", corpus_file, "--normalize", "text8", *TINY]
    for out in (copied, tmp_path / "file", tmp_path / "file" / "run"):
        refused("train", "mini-mixd", "--out", out, *argv, names=[str(tmp_path)])
        refused("data", corpus_file, "--normalize", "text8", "--out", out, names=[str(tmp_path)])
        refused("sample", copied, "--length", 4, "--out", out, names=[str(tmp_path)])
    refused("export", copied, "--out", copied, names=["exists"])
    refused(
        "train",
        "mini-mixd",
        "--out",
        copied,
        *argv,
        "--seed",
        "1",
        names=[f"train --resume {copied}`"],
    )
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "options",
    [
        ["--windows", "0"],
        ["--stride", "-1"],
        ["--samples", "0"],
        ["--seed", "-1"],
    ],
)
def test_numbers_are_refused_before_a_model_is_loaded(refused, options):
    refused("eval", "no-such-run", *options, names=[options[0].strip("-"), options[1]])


def test_a_page_has_an_address(refused):
    refused("studio", "--host", "", names=["host ''", "127.0.0.1"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_damaged_runs_are_named_and_left_alone(refused, copied, name):
    path = copied / name
    path.write_bytes(path.read_bytes()[:-100])
    before = listing(copied)
    refused("eval", copied, names=[name])
    refused("sample", copied, names=[name])
    assert listing(copied) == before


CHECKS = [HealthCheck.function_scoped_fixture]
few = settings(
    max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=CHECKS
)
# an argument of a process holds no NUL
words = st.text(st.characters(exclude_characters="\0"), max_size=60)
FIELDS = [
    "seed",
    "steps",
    "data",
    "model.context",
    "model.patch",
    "model.latent-dim",
    "model.blocks.0.coupling",
    "model.blocks.1.components",
    "model.vocab-size",
    "model.trunk.width",
    "optim.lr",
    "optim.warmup",
    "train.stage-steps",
    "train.batch-size",
    "train.precision",
    "data.tokenizer.kind",
    "data.tokenizer.alphabet",
    "",
]
VALUES = [
    "",
    "-",
    "--",
    "0",
    "-1",
    "nan",
    "inf",
    "1e400",
    "None",
    "[]",
    "mix1",
    "bpe",
    "9" * 25,
    "0x10",
    "①",
]


@pytest.mark.slow
@settings(few, max_examples=20)
@given(field=st.sampled_from(FIELDS), value=st.one_of(st.sampled_from(VALUES), words))
def test_no_field_brings_a_traceback(run, monkeypatch, field, value):
    # what would be trained is not
    monkeypatch.setattr("tarflowlm.training.train.train", lambda *args, **options: pytest.skip())
    try:
        done = run("train", "mini-mixd", "--out", "x", *TINY[:-9], f"--{field}", value)
    except pytest.skip.Exception:
        return
    assert done.status in (0, 2)


json_values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([{}])
)


@pytest.mark.slow
@few
@given(
    key=st.sampled_from(["context", "patch", "blocks", "trunk", "vocab_size", "family"]),
    value=json_values,
)
def test_no_configuration_brings_a_traceback(run, models, tmp_path_factory, key, value):
    broken = Path(shutil.copytree(models["flow"], tmp_path_factory.mktemp("broken") / "run"))
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    config["model"][key] = value
    (broken / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert run("sample", broken, "--length", 4).status in (0, 2)


@pytest.mark.parametrize(
    ("argv", "package"),
    [
        (["studio"], "gradio"),
        (["report", "english-mini", "--out", "OUT"], "matplotlib"),
    ],
)
def test_a_missing_extra_is_named(refused, monkeypatch, tmp_path, argv, package):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(*argv, names=[f"{argv[0]} needs the package {package}: pip install"])
