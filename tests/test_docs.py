"""The examples of the documents run, what they name exists, and their links lead somewhere."""

import contextlib
import doctest
import io
import re
import shlex
import shutil
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from docs_cases import (
    COMMAND,
    DOCUMENTS,
    REPRODUCTION,
    ROOT,
    anchors,
    blocks,
    codes_in,
    console_sessions,
    definitions,
    links,
    name_of,
    shell_lines,
)
from reproduction.__main__ import Args as ReproductionArgs
from reproduction.quality_command import Args as QualityArgs
from reproduction.recipes import RECIPES
from tarflowlm.cli.main import COMMANDS, main
from tarflowlm.errors import UserError
from tarflowlm.presets import PRESETS

# the log records what was true at a date; its commands may be gone
CURRENT = [document for document in DOCUMENTS if document != ROOT / "docs" / "log.md"]
FIRST_HOUR = ROOT / "examples" / "first_hour.md"
RUN = [ROOT / "README.md", ROOT / "docs" / "commands.md", ROOT / "docs" / "tour.md", FIRST_HOUR]
"""Documents whose commands are run, in their order; of the others only names and options are
checked.
"""
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def nightly_if_long(document: Path) -> object:
    """The first hour takes most of a minute, and little in it is in no other document."""
    marks = [pytest.mark.nightly] if document == FIRST_HOUR else []
    return pytest.param(document, marks=marks)


SMALL = [
    "--model.trunk.width=16",
    "--model.context=32",
    *(f"--model.blocks.{i}.layers=1" for i in range(3)),
    "--train.batch-size=2",
    "--train.evaluate-windows=2",
    "--train.test-windows=2",
    "--device=cpu",
]
"""Makes a training tiny. The last of several values of an option counts."""
ELSEWHERE = {"quickstart", "report", "studio", "serve"}
"""Commands that are slow, serve or fetch: tests of their own run them."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def call(argv: list[str]) -> str:
    """What a command prints; the test fails with its error message."""
    out, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            main(argv)
    except SystemExit as stop:
        if stop.code:
            pytest.fail(f"tarflowlm {shlex.join(argv)}: {errors.getvalue()}")
    return out.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus_file) -> Path:
    """A folder with a text and a run trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    text = str(shutil.copy(corpus_file, folder / "my_text.txt"))
    # a text is read in its own characters, and the examples use all letters
    words = Path(text).read_text(encoding="utf-8")
    Path(text).write_text(f"the quick brown fox jumps over the lazy dog {words}", encoding="utf-8")
    call(
        [
            "train",
            "mini-mixd",
            "--out",
            str(folder / "runs" / "mine"),
            "--data",
            text,
            "--steps",
            "3",
            *SMALL,
        ]
    )
    return folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch) -> Path:
    """The working folder of the examples, with `my_text.txt` and `runs/mine`."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(argv: list[str]) -> list[str]:
    """The command, done within seconds."""
    match argv:
        case ["train", "--resume", run]:
            (Path(run) / "summary.json").unlink()  # as if it had been killed before its last file
            return [*argv, "--device", "cpu"]
        case ["train", "--from", _, *options]:
            return ["train", "--from", "runs/mine", *options, "--steps", "3", "--device", "cpu"]
        case ["train", _, "--out", run, *_]:
            shutil.rmtree(run, ignore_errors=True)
            data = [] if "--data" in argv else ["--data", "my_text.txt"]
            return [
                *argv,
                *data,
                *(["--minutes", "0.01"] if "--minutes" in argv else ["--steps", "3"]),
                *SMALL,
            ]
        case ["sample", *_] if {"--num", "--length"} & {*argv} and "--template" not in argv:
            return [
                *argv,
                "--num",
                "2",
                "--length",
                "40",
                "--device",
                "cpu",
            ]  # still beyond the context of SMALL
        case ["eval" | "score" | "sample" | "edit", *_]:
            return [*argv, "--device", "cpu"]
    return argv


def check_pip(words: list[str]) -> None:
    """It installs this package with extras that exist, or PyTorch."""
    found = re.fullmatch(
        r"install (?:(?:-e \.|tarflowlm)(?:\[([\w,-]+)\])?|torch --index-url \S+)", " ".join(words)
    )
    assert found, words
    assert set((found[1] or "").split(",")) - {""} <= PROJECT["optional-dependencies"].keys(), words


@pytest.mark.slow
@pytest.mark.parametrize("document", [nightly_if_long(document) for document in RUN], ids=name_of)
def test_commands_run(document, place):
    # test_golden.py runs the sessions of the README and compares what they print
    shown = console_sessions(document) if document == ROOT / "README.md" else []
    others = {session.command for session in shown}
    for line in shell_lines(document):
        if line in others:
            continue
        program, *words = shlex.split(line)
        if program == "pip":
            check_pip(words)
        elif program == "git":
            assert words == ["clone", PROJECT["urls"]["Homepage"]], line
        elif program == "cd":
            assert words == ["tarflowlm"], line
        elif program == "python":
            assert words[:2] == ["-m", "reproduction"], line
        elif program == "pytest":
            # what a reader is told to run is what CI runs
            assert line.replace('"not nightly"', '"$tests"') in CI, line
        else:
            assert program == "tarflowlm", line
            if words[0] not in ELSEWHERE:
                call(small(words))


@pytest.mark.slow
@pytest.mark.parametrize(
    "document",
    [nightly_if_long(document) for document in CURRENT if blocks(document, "python")],
    ids=name_of,
)
def test_python_runs(document, place):
    names = {"__name__": "__main__"}
    for block in blocks(document, "python"):
        try:
            exec(compile(block, name_of(document), "exec"), names)
        except UserError as error:
            if "needs the package" not in str(error):
                raise
            pytest.skip(str(error))


@pytest.mark.parametrize(
    "document", [document for document in CURRENT if blocks(document, "pycon")], ids=name_of
)
def test_python_sessions_print_what_they_show(document):
    code = "\n".join(blocks(document, "pycon"))
    example = doctest.DocTestParser().get_doctest(code, {}, name_of(document), str(document), 0)
    found = io.StringIO()
    assert not doctest.DocTestRunner().run(example, out=found.write).failed, found.getvalue()


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """Options of every command, those of `train` with the fields of two presets."""
    pages = {name: [[name, "--help"]] for name in COMMANDS if name != "train"}
    pages["train"] = [["train", name, "--help"] for name in ("mini-ar", "mini-mixd")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        found = {
            name: {option for argv in argvs for option in re.findall(r"--[a-z][\w.-]*", call(argv))}
            for name, argvs in pages.items()
        }
    # `train` reads this before the fields of a preset, whose help it prints
    found["train"] |= {"--resume"}
    for name, args in (("reproduction", ReproductionArgs), ("quality", QualityArgs)):
        found[name] = {f"--{field.name.replace('_', '-')}" for field in fields(args)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("document", CURRENT, ids=name_of)
def test_commands_and_options_exist(document, options):
    """Commands in blocks and in running text, such as `tarflowlm eval --stride`, and single
    options: `--stride`.
    """
    # an older commit has commands of its own
    codes = [code for code in codes_in(document) if not code.startswith("git checkout")]
    for command, arguments in COMMAND.findall(
        "\n".join([*codes, *blocks(document, "", "console")])
    ):
        place = f"{name_of(document)}: tarflowlm {command}{arguments}"
        assert command in COMMANDS, place
        words = re.sub(r"\s#.*", "", arguments).split()
        given = {option.partition("=")[0] for option in words if re.match(r"--[a-z]", option)}
        assert given <= options[command] | {"--help", "--import"}, place
        if command == "train" and words and re.fullmatch(r"[a-z][a-z0-9-]+", words[0]):
            assert words[0] in PRESETS, place
    for name, arguments in REPRODUCTION.findall("\n".join([*codes, *blocks(document, "")])):
        place = f"{name_of(document)}: python -m reproduction {name}{arguments}"
        assert name in (*RECIPES, "all", "quality", "$n", "NAME"), place
        allowed = options["quality" if name == "quality" else "reproduction"]
        assert set(re.findall(r"--[a-z-]+", arguments)) <= allowed, place
    every = set().union(*options.values(), {"--help", "--version", "--import"})
    for code in codes:
        if re.match(r"--[a-z]", code):
            assert code.split()[0].partition("=")[0] in every, f"{name_of(document)}: {code}"
        if code.startswith("python "):
            assert (ROOT / code.split()[1]).is_file() or code.split()[1] == "-m", (
                f"{name_of(document)}: {code}"
            )


def test_every_command_is_documented():
    texts = "".join(document.read_text(encoding="utf-8") for document in CURRENT)
    assert not set(COMMANDS) - {name for name, _ in COMMAND.findall(texts)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    for link in links(document):
        assert link.path.exists(), link.target
        anchor = link.target.partition("#")[2]
        assert not anchor or link.path.suffix != ".md" or anchor in anchors(link.path), link.target


@pytest.mark.parametrize("document", CURRENT, ids=name_of)
def test_links_to_code_name_what_is_there(document):
    """A link `function` or `Class.method` leads to a file that defines it, a link `name` to a file
    of that name.
    """
    for link in links(document):
        for code in (
            link.codes if link.path.suffix == ".py" or (link.path / "__init__.py").exists() else ()
        ):
            name = code.partition("(")[0].rstrip("/")
            is_file = any(
                path.as_posix().endswith(f"/{name}")
                for path in (link.path, link.path.with_suffix(""))
            )
            assert is_file or set(name.split(".")) <= definitions(link.path), (
                f"{link.target} defines no {code}"
            )


def test_every_equation_has_a_number_of_its_own():
    text = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    tags = re.findall(r"\\tag\{(\w+)\}", text)
    assert len(tags) > 30
    assert len(tags) == len(set(tags))


def test_every_promise_has_its_test():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 30
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"
