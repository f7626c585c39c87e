"""The examples of the documents run, what they name exists, and their links lead somewhere.

Commands run in this process, on tiny models. What takes long or needs a network is called as written, but stopped
where its work would begin: its arguments have been read by then.
"""

import contextlib
import doctest
import importlib.util
import io
import lzma
import random
import re
import shlex
import shutil
import string
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tarflowlm.cli.bench import BENCHMARKS
from torch.distributed.run import get_args_parser

from docs_cases import (
    DOCUMENTS,
    LOG,
    ROOT,
    Block,
    anchors,
    blocks,
    commands,
    definitions,
    inline_codes,
    links,
    name_of,
    session,
)
from tarflowlm.cli.main import COMMANDS, main
from tarflowlm.data import DataConfig, TokenizerConfig
from tarflowlm.errors import UserError
from tarflowlm.flow.transformer import TransformerConfig
from tarflowlm.model import stack
from tarflowlm.presets import PRESETS, preset
from tarflowlm.reproduce import RECIPES

CURRENT = [document for document in DOCUMENTS if document != LOG]
SHELL, PYTHON = blocks(CURRENT)

SMALL = [
    "--model.trunk.width", "16", "--train.batch-size", "2", "--train.evaluate-windows", "2",
    "--train.test-windows", "2", "--device", "cpu",
]  # fmt: skip
"""Added to every training, with its length. The last of several values of an option counts."""
SMALL_AR = [*SMALL, "--model.layers", "1", "--model.context", "64"]
SMALL_FLOW = [*SMALL, *(f"--model.blocks.{i}.layers=1" for i in range(3)), "--model.context", "32"]
FLOWS = ("mini-affine", "mini-mix1", "mini-mixd", "mini-mixd-p2", "mini-mixd-p4")
TRAINED = {"mini-ar": SMALL_AR, **dict.fromkeys(FLOWS, SMALL_FLOW)}
"""Presets that are trained."""
RUNS = {
    "runs/mine": "mini-mixd",
    "runs/ar": "mini-ar",
    "runs/judge": "mini-ar",
    "runs/mini-ar": "mini-ar",
    "runs/mini-mixd": "mini-mixd",
}
"""Runs that an example finds in its folder, unless it trains them itself."""
TEXT_FILE = re.compile(r"[\w.-]+\.txt(\.xz)?")
NEEDS = {"report": "matplotlib", "--quality": "mauve"}
"""Optional packages of a command or an option."""
PLACEHOLDERS = ("DIR", "NAME", "PRESET")
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")


class Reached(Exception):
    """The arguments are read, and the work would begin."""


@pytest.fixture(scope="module")
def text() -> str:
    """About 8,000 characters of words made up of a-z."""
    rng = random.Random(1)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 7))) for _ in range(60)]
    return " ".join(rng.choice(words) for _ in range(1600))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text) -> Path:
    """A folder with the runs that examples find, and the text that they were trained on."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.txt").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TARFLOWLM_CACHE", str(folder / "cache"))
        for name in set(RUNS.values()):
            small = ["--data", str(folder / "small.txt"), "--steps", "3", *TRAINED[name]]
            main(["train", name, "--out", str(folder / name), *small])
    torch.set_flush_denormal(False)
    return folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch) -> Path:
    """The folder in which an example runs."""
    monkeypatch.setenv("TARFLOWLM_CACHE", str(trained / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def small_quickstart(monkeypatch, trained):
    """The quickstart preset on the small text, with everything but its structure cut down."""
    run = preset("quickstart")
    blocks = stack(("mixd", "mix1", "mix1"), (1, 1, 1), (0, 2, 2))
    model = replace(run.model, context=32, latent_dim=4, head_hidden=8, blocks=blocks)
    run = replace(
        run,
        model=replace(model, trunk=TransformerConfig(width=16, num_heads=2)),
        data=DataConfig(source=str(trained / "small.txt"), tokenizer=TokenizerConfig(kind="bpe", vocab_size=150)),
        train=replace(run.train, batch_size=2, evaluate_windows=2, evaluate_every=10**6, test_windows=2),
    )
    monkeypatch.setattr("tarflowlm.cli.quickstart.preset", lambda _name: run)


def provide(words: list[str], trained: Path, text: str) -> None:
    """The runs and texts that a command names, in the current folder."""
    for word in words:
        if word in RUNS and not Path(word).exists():
            shutil.copytree(trained / RUNS[word], word)
        if TEXT_FILE.fullmatch(word) and not Path(word).exists():
            with (lzma.open if word.endswith(".xz") else open)(word, "wt", encoding="utf-8") as file:
                file.write(text)


def stand_in(argv: list[str], trained: Path) -> list[str] | None:
    """Arguments with which the command is done within seconds, or None: it is only to read those that it has."""
    match argv:
        case ["train", "--resume", directory]:
            # as if it had been killed before its last file
            (Path(directory) / "summary.json").unlink()
            return [*argv, "--device", "cpu"]
        case ["train", name, *_] if name in TRAINED:
            if "--out" in argv:
                shutil.rmtree(argv[argv.index("--out") + 1], ignore_errors=True)
            data = [] if "--data" in argv else ["--data", str(trained / "small.txt")]
            length = ["--minutes", "0.01"] if "--minutes" in argv else ["--steps", "3"]
            # the small text has no more tokens than these
            tokens = ["--data.tokenizer.vocab-size", "300"] if "--data.tokenizer.vocab-size" in argv else []
            return [*argv, *data, *length, *tokens, *TRAINED[name]]
        case ["quickstart", *_]:
            return [*argv, "--minutes", "0.01", "--device", "cpu"]
        case ["draft", *_]:
            return [*argv, "--minutes", "0.01", "--device", "cpu"]
        case ["eval", *_] if "--quality" in argv:
            return [*argv, "--num", "4", "--judge", str(trained / RUNS["runs/judge"]), "--device", "cpu"]
        case ["eval" | "sample", directory, *_] if directory.startswith("hf:"):
            return None
        case ["eval" | "score" | "sample" | "edit" | "report", *_]:
            return [*argv, "--device", "cpu"]
        case ["seal" | "export" | "info" | "runs", *_]:
            return argv
        case ["push", *_] if "--dry-run" in argv:
            return argv
        case ["push" | "train" | "data" | "reproduce" | "bench" | "studio" | "harness", *_]:
            return None
        case [name, *_] if name not in COMMANDS:
            return None  # which the command line says better
    raise AssertionError(f"say in {Path(__file__).name} how this command is tested")


def call(argv: list[str]) -> None:
    """AssertionError with what the command says, if it fails."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            main(argv)
    except SystemExit as stop:
        if stop.code:
            raise AssertionError(errors.getvalue().strip().splitlines()[-1]) from None
    finally:
        torch.set_flush_denormal(False)


def only_read(argv: list[str]) -> None:
    """The command reads its arguments and checks them as it does, and does nothing else."""

    def reached(*_args: object, **_options: object) -> None:
        raise Reached

    work = ["cli.train.train", "cli.train.resume", "cli.directories.prepare_corpus", "cli.reproduce.estimate"]
    work += ["cli.reproduce.finish", "cli.evaluate.load_checkpoint", "cli.directories.write_report"]
    work += ["cli.studio.Server", "cli.harness.run_lm_eval", *(f"bench.{name}.run" for name in BENCHMARKS)]
    work += ["cli.sample.load_checkpoint", "cli.push.load_checkpoint"]
    with pytest.MonkeyPatch.context() as patch:
        for name in work:
            patch.setattr(f"tarflowlm.{name}", reached)
        # whatever the command needs counts as installed
        patch.setattr("tarflowlm.cli.reproduce.find_spec", lambda name: name)
        patch.setattr("tarflowlm.cli.studio.check_gradio", lambda: None)
        with pytest.raises(Reached):
            call(argv)


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check_tarflowlm(argv: list[str], trained: Path) -> list[str]:
    """Runs it, or only reads its arguments; the packages whose absence is the reason."""
    absent = [NEEDS[word] for word in argv if word in NEEDS and not is_installed(NEEDS[word])]
    small = None if absent else stand_in(argv, trained)
    if small is None:
        only_read(argv)
    else:
        call(small)
    return absent


def check_pip(words: list[str]) -> None:
    """It installs this package, with extras that exist."""
    found = re.fullmatch(r"install (-e \.|tarflowlm)(\[([\w,-]+)\])?", " ".join(words))
    assert found, "`pip install` of something else than this package"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set((found[3] or "").split(",")) - {""} <= project["optional-dependencies"].keys(), "no such extra"


def check_pytest(words: list[str]) -> None:
    """The files exist, and -k names something in them."""
    files = [ROOT / word for word in words if word.startswith("tests")]
    for file in files:
        assert file.exists(), f"no file {file.relative_to(ROOT)}"
    if "-k" in words:
        name = words[words.index("-k") + 1]
        assert any(name in defined for file in files for defined in definitions(file)), f"-k {name} finds no test"


def check_torchrun(words: list[str]) -> None:
    try:
        args = get_args_parser().parse_args(words)
    except SystemExit:
        raise AssertionError("torchrun does not take these options") from None
    assert args.module, "torchrun without -m"
    assert args.training_script == "tarflowlm"
    only_read(args.training_script_args)


def check_sbatch(words: list[str]) -> None:
    """Its batch file exists, and turns the arguments into those of `tarflowlm train`; sbatch is not here to ask."""
    script = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
    assert (ROOT / words[script]).is_file()
    name, out, *fields = words[script + 1 :]
    only_read(["train", name, "--out", out, *fields])


CHECKS = {"pip": check_pip, "pytest": check_pytest, "torchrun": check_torchrun, "sbatch": check_sbatch}


@pytest.fixture
def run_block(place, trained, text, small_quickstart, tmp_path):
    """run_block(block): checks all of its commands; the optional packages that some of them lack."""

    def run(block: Block) -> list[str]:
        absent = []
        for program, *words in commands(block, tmp_path):
            try:
                if program == "tarflowlm":
                    provide(words, trained, text)
                    absent += check_tarflowlm(words, trained)
                else:
                    CHECKS[program](words)
            except (Exception, pytest.fail.Exception) as problem:
                problem.add_note(f"in {block.place}: {shlex.join([program, *words])}")
                raise
        return absent

    return run


@needs_bash
@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_commands_run(block, run_block):
    absent = run_block(block)
    if absent:
        pytest.skip(f"in part, without {', '.join(sorted(set(absent)))}")


@needs_bash
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("frobnicate && tarflowlm data text8 --out here", "frobnicate: command not found"),
        ("tarflowlm tarin mini-ar --out here", "command 'tarin' is unknown"),
        ("tarflowlm train mini-ar --out here --model.depth 2", "--model.depth"),
        ("for p in ar mixt; do tarflowlm train mini-$p --out runs/$p; done", "mini-mixt"),
        ("tarflowlm eval runs/elsewhere", "runs/elsewhere"),
        ("tarflowlm data text8 --output here", "--output"),
        ("tarflowlm bench numerics --repetitions 5", "--repetitions"),
        ("tarflowlm reproduce table9", "table9"),
        ("torchrun --nproc 2 -m tarflowlm train mini-ar --out here --model.depth 2", "--model.depth"),
        ("torchrun --processes 2 -m tarflowlm train mini-ar --out here", "torchrun does not take"),
        ("sbatch examples/train.sbatch mini-ar here --model.depth 2", "--model.depth"),
        ("pip install -e '.[everything]'", "no such extra"),
        ("pytest tests/test_docs.py -k test_of_nothing", "test_of_nothing"),
    ],
)
def test_mistakes_are_noticed(code, message, run_block):
    with pytest.raises(AssertionError, match=message):
        run_block(Block(ROOT / "README.md", 1, code))


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_python_runs(block, place, trained):
    for name in RUNS:
        shutil.copytree(trained / RUNS[name], name)
    code = "\n" * (block.line - 1) + block.code  # so that a traceback has the line of the document
    try:
        exec(compile(code, str(block.document), "exec"), {"__name__": "__main__"})
    except UserError as error:
        if "is not installed" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("document", [d for d in CURRENT if session(d)], ids=name_of)
def test_python_sessions_print_what_they_show(document):
    example = doctest.DocTestParser().get_doctest(session(document), {}, name_of(document), str(document), 0)
    found = io.StringIO()
    assert not doctest.DocTestRunner().run(example, out=found.write).failed, found.getvalue()


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """Options of every command, of `train PRESET` and of `bench NAME`, from their help pages."""
    names = [[name] for name in COMMANDS if name not in ("train", "bench")]
    names += [["train", name] for name in ("mini-ar", "mini-mixd")] + [["bench", name] for name in BENCHMARKS]
    found: dict[str, set[str]] = {"train": {"--resume"}, "bench": set(), "": set()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        for words in names:
            page = io.StringIO()
            with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
                main([*words, "--help"])
            names_of_options = set(re.findall(r"--[a-z][\w.-]*", page.getvalue()))
            for key in ("", words[0], " ".join(words)):
                found.setdefault(key, set()).update(names_of_options)
    found[""] |= found["train"]
    torch.set_flush_denormal(False)
    return found


@pytest.mark.parametrize("document", CURRENT, ids=name_of)
def test_options_in_the_text_exist(document, options):
    """Of commands and single options in running text, such as `tarflowlm eval --stride` or `--stride`."""
    for line, code in inline_codes(document):
        place = f"{name_of(document)}:{line}: `{code}`"
        words = code.split()
        given = {option.partition("=")[0] for option in words if re.match(r"--[a-z]", option)}
        if words[0].startswith("--"):
            assert given <= options[""], place
        elif words[0] == "pip":
            check_pip(shlex.split(code)[1:])
        elif words[0] == "pytest":
            check_pytest(words[1:])
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), place
        elif words[0] == "tarflowlm" or "tarflowlm" in words or (words[0] in COMMANDS and len(words) > 1):
            command, *rest = words[words.index("tarflowlm") + 1 :] if "tarflowlm" in words else words
            assert command in COMMANDS, place
            name = rest[0] if rest and not rest[0].startswith("-") else "NAME"
            if command == "bench" and name not in PLACEHOLDERS:
                assert name in BENCHMARKS, place
                command = f"bench {name}"
            known = {"train": PRESETS, "reproduce": (*RECIPES, "all")}.get(command)
            assert known is None or name in (*known, *PLACEHOLDERS, "..."), place
            after = {option for option in given if option in rest}
            assert after <= options[command] | {"--help"}, place


def test_every_command_is_documented():
    """As `tarflowlm NAME ...`, in a block or in running text."""
    codes = [block.code for block in SHELL] + [code for document in CURRENT for _, code in inline_codes(document)]
    found = {name for code in codes for name in re.findall(r"\btarflowlm ([a-z]+)\b", code)}
    missing = COMMANDS.keys() - found
    assert not missing, f"neither the README nor a page in docs/ shows {', '.join(sorted(missing))}"


def test_variables_of_the_environment_exist():
    files = [file for folder in ("src", "tests") for file in (ROOT / folder).rglob("*.py")]
    code = "".join(file.read_text(encoding="utf-8") for file in files)
    for document in CURRENT:
        for name in re.findall(r"\bTARFLOWLM_\w+", document.read_text(encoding="utf-8")):
            assert f'"{name}"' in code, f"{name_of(document)}: {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    for link in links(document):
        place = f"{name_of(document)}:{link.line}: {link.target}"
        assert link.path.exists(), place
        anchor = link.target.partition("#")[2]
        if anchor and link.path.suffix == ".md":
            assert anchor in anchors(link.path), place


@pytest.mark.parametrize("document", CURRENT, ids=name_of)
def test_links_to_code_name_what_is_there(document):
    """A link `function` is to a file in which the function is defined, `Class.method` likewise."""
    for link in links(document):
        if link.path.suffix != ".py" and not (link.path / "__init__.py").exists():
            continue
        assert link.codes, f"{name_of(document)}:{link.line}: [{link.text}] is not the name of something"
        for code in link.codes:
            name = code.partition("(")[0].rstrip("/")
            is_file = any(path.as_posix().endswith(f"/{name}") for path in (link.path, link.path.with_suffix("")))
            assert is_file or name in definitions(link.path), (
                f"{name_of(document)}:{link.line}: {link.target} defines no {code}"
            )
