"""What happens before torch is imported, what is imported at all, and how the command line ends when cut short."""

import os
import signal
import subprocess
import sys
from importlib import import_module

import pytest

import tarflowlm
from tarflowlm.cli import threads
from tarflowlm.cli.main import COMMANDS
from tarflowlm.cli.signals import exit_on_interrupt
from tarflowlm.config import RECIPE_NAMES
from tarflowlm.reproduce import RECIPES

pytestmark = pytest.mark.usefixtures("interruptible")

FAKE_TORCH = """
import os
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), flush=True)
if "INTERRUPT" in os.environ:
    import signal, time
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)
os._exit(0)
"""


@pytest.fixture
def start(tmp_path):
    """start(code, **environment): a Python in which `torch` says what it finds when it is imported, and ends."""

    def call(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "torch.py").write_text(FAKE_TORCH, encoding="utf-8")
        inherited = {name: value for name, value in os.environ.items() if name not in threads.CHOICES}
        inherited["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.run(
            [sys.executable, *argv], env=inherited | environment, capture_output=True, text=True, timeout=60
        )

    return call


@pytest.mark.parametrize(
    "command", [("sample", "--model", "x"), ("train", "mini-ar", "--out", "x"), ("data", "english", "--out", "x")]
)
def test_threads_are_told_to_yield_before_torch_is_imported(start, command):
    argv = ("-m", "tarflowlm", *command)
    # what it is told depends on what else runs on this machine
    assert start(*argv).stdout in ("PASSIVE None\n", "None 20000\n")
    assert start(*argv, OMP_WAIT_POLICY="ACTIVE").stdout == "ACTIVE None\n"
    assert start(*argv, GOMP_SPINCOUNT="100").stdout == "None 100\n"
    assert start(*argv, KMP_BLOCKTIME="1").stdout == "None None\n"


@pytest.mark.parametrize(
    ("busy", "cores", "asked", "expected"),
    [
        (0, 2, None, threads.SPINNING),
        (1, 2, None, threads.SLEEPING),
        (1, 2, "1", threads.SPINNING),
        (2, 2, "1", threads.SLEEPING),
        (3, 8, "6", threads.SLEEPING),
        (0, 4, "4,2", threads.SPINNING),
    ],
)
def test_threads_sleep_where_others_want_the_cores(monkeypatch, busy, cores, asked, expected):
    if asked is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads.waiting(busy, cores) == expected


def test_a_busy_neighbour_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "LOAD", tmp_path / "loadavg")
    assert threads.running_elsewhere() is None
    (tmp_path / "loadavg").write_text("0.20 0.18 0.12 3/345 678\n", encoding="ascii")
    assert threads.running_elsewhere() == 2


def test_it_is_too_late_once_torch_is_there(monkeypatch):
    for name in threads.CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", sys)
    threads.settle_threads()
    assert not any(name in os.environ for name in threads.CHOICES)


@pytest.mark.parametrize("command", [("sample", "--model", "x"), ("train", "mini-ar", "--out", "x")])
def test_an_interrupt_during_the_imports_costs_one_line(start, command):
    done = start("-m", "tarflowlm", *command, INTERRUPT="1")
    assert done.returncode == 130
    assert done.stderr == "tarflowlm: interrupted\n"


def test_the_previous_handler_comes_back():
    with exit_on_interrupt():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with exit_on_interrupt():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


IMPORTED = """
import sys
from tarflowlm.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert stop.code in (None, 0, 2), stop.code
libraries = {"torch", "numpy", "tokenizers", "safetensors", "matplotlib", "rich", "tyro"} & set(sys.modules)
print(*sorted(libraries), *sorted(name for name in sys.modules if name.split(".")[0] == "tarflowlm"))
"""
HELP = {"", ".cli", ".cli.main", ".cli.signals", ".cli.threads", ".errors"}
ARGUMENTS = {*HELP, ".choices", ".cli.arguments", ".cli.parsing"}
LIGHT = {
    "help": (["--help"], {"rich"}, {*HELP, ".terminal", ".terminal.tables"}),
    "version": (["--version"], set(), HELP),
    "unknown-command": (["trian"], set(), HELP),
    **{
        name: ([name, "--help"], {"tyro"}, ARGUMENTS)
        for name in ("quickstart", "sample", "edit", "report", "studio", "seal", "push", "export")
    },
    **{
        name: ([name, "--help"], {"tyro"}, {*ARGUMENTS, ".cli.inspect_arguments"})
        for name in ("eval", "score", "info", "runs", "harness")
    },
    "unknown-option": (["sample", "--nmu", "3"], {"tyro"}, ARGUMENTS),
    "contradiction": (["edit", "--text", "abc", "--num", "0"], {"tyro"}, ARGUMENTS),
}


@pytest.mark.parametrize(("argv", "libraries", "modules"), LIGHT.values(), ids=LIGHT.keys())
def test_help_and_wrong_arguments_import_little(argv, libraries, modules):
    done = subprocess.run([sys.executable, "-c", IMPORTED, *argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()[-1].split()) == libraries | {f"tarflowlm{name}" for name in modules}


WITHOUT_TORCH = {
    "version": ["--version"],
    "presets": ["train", "--help"],
    "fields": ["train", "mini-mixd", "--help"],
    "unknown-preset": ["train", "mini-mixx", "--out", "x"],
    "unknown-field": ["train", "mini-mixd", "--out", "x", "--model.depth", "3"],
    "few-steps": ["train", "mini-mixd", "--out", "x", "--steps", "2"],
    "benchmarks": ["bench", "--help"],
    "few-rounds": ["bench", "train", "--rounds", "0"],
    "unknown-recipe": ["reproduce", "table9"],
    "no-out": ["data", "english"],
    "draft": ["draft", "run", "--width", "0"],
}


@pytest.mark.parametrize("argv", WITHOUT_TORCH.values(), ids=WITHOUT_TORCH.keys())
def test_configurations_are_read_without_torch(argv):
    done = subprocess.run([sys.executable, "-c", IMPORTED, *argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "torch" not in done.stdout.splitlines()[-1].split()


def test_what_does_not_train_imports_nothing_that_shards():
    code = "import tarflowlm.cli.sample, tarflowlm.cli.evaluate, tarflowlm.cli.edit, tarflowlm.cli.directories, sys"
    code += "; print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr


def test_the_recipes_are_those_that_the_command_lists():
    assert tuple(RECIPES) == RECIPE_NAMES


def test_every_command_names_what_is_there():
    for command in COMMANDS.values():
        for reference in (command.run, command.args):
            module, name = reference.split(":")
            assert callable(getattr(import_module(f"tarflowlm.cli.{module}"), name))


def test_importing_the_package_does_not_import_torch(start):
    done = start("-c", "import tarflowlm; print(sorted(set(tarflowlm.__all__) - set(dir(tarflowlm))))")
    assert done.stdout == "[]\n"


def test_every_public_name_is_there_and_has_a_home():
    for name in tarflowlm.__all__:
        assert getattr(tarflowlm, name).__name__ == name
    assert set(tarflowlm._MODULES) == set(tarflowlm.__all__)
    assert tarflowlm.cli.threads is threads
    with pytest.raises(AttributeError, match="no_such_name"):
        tarflowlm.no_such_name  # noqa: B018


COMMAND = [sys.executable, "-m", "tarflowlm", "sample", "--model", "english-mini-ar", "--length", "20"]


@pytest.mark.parametrize("more", [(), ("--json",), ("--help",)])
def test_output_that_nobody_reads_is_no_error(more):
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([*COMMAND, *more], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_interrupted_command_that_cannot_be_resumed_does_not_say_so(run, monkeypatch):
    def interrupted(*_args: object, **_more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tarflowlm.cli.sample.generate", interrupted)
    done = run("sample", "--model", "english-mini-ar", "--length", "4")
    assert (done.status, done.err) == (130, "tarflowlm: interrupted; 0 of 1 samples are finished\n")


def test_help_lists_the_benchmarks_and_describes_every_preset(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    benchmarks = run("bench", "--help")
    assert benchmarks.status == 0
    for name in ("data", "numerics", "train", "evaluation", "generation", "infilling"):
        assert name in benchmarks.out
    presets = run("train", "--help").out
    assert "partial" not in presets
    assert "The paper's set-up on OpenWebText, at the size of GPT-2 small: three Mix-1 blocks." in presets
