"""Start without torch, and every way to end."""

import os
import pydoc
import subprocess
import sys

import pytest

import tarflowlm
from tarflowlm.cli.main import COMMANDS

pytestmark = pytest.mark.usefixtures("interruptible")
WITHOUT_TORCH = """
import sys
from tarflowlm.cli.main import main
for argv in {argvs}:
    try:
        main(argv)
    except SystemExit as stop:
        assert stop.code in (None, 0, 2), argv
    assert not {{"torch", "numpy"}} & set(sys.modules), argv
"""


@pytest.mark.slow
def test_help_and_wrong_arguments_need_no_torch():
    argvs = [[], ["--version"], ["trian"], ["train", "mini-mixd", "--help"], ["train", "--help"]]
    argvs += [[name, "--help"] for name in COMMANDS]
    argvs += [
        ["sample", "--nmu", "3"],
        ["edit", "--text", "abc", "--num", "1e3"],
    ]
    argvs += [["train", "mini-mixd", "--out", "x", "--steps", "2"], ["data", "tales"]]
    # models and files that are missing, or there already
    argvs += [[name, "no-such"] for name in ("info", "sample", "eval", "export", "runs")]
    argvs += [["edit", "no-such", "--text", "a"], ["score", "--file", "no-such"]]
    argvs += [["train", "--from", "no-such", "--data", "x", "--out", "y"]]
    argvs += [["export", "english-mini", "--out", "."], ["sample", "--out", sys.executable]]
    code = WITHOUT_TORCH.format(argvs=argvs)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there():
    for name in dir(tarflowlm):
        assert getattr(tarflowlm, name).__name__ == name
    assert {"load", "train", "preset", "generate"} <= set(dir(tarflowlm))
    # the whole help fits a screen and a half
    assert len(pydoc.plain(pydoc.render_doc(tarflowlm)).splitlines()) < 80
    with pytest.raises(AttributeError, match="no_such_name"):
        tarflowlm.no_such_name  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("argv", [("--version",), ("sample", "--help")])
def test_a_closed_pipe_is_no_error(argv):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tarflowlm", *argv]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
@pytest.mark.parametrize(("words", "status"), [("--version >&-", 0), ("nope 2>&-", 2)])
def test_closed_outputs_are_no_error(words, status):
    command = f"{sys.executable} -m tarflowlm {words}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (status, "")


def test_after_an_error_the_process_leaves_at_once():
    code = (
        "import atexit, sys\nfrom tarflowlm.cli.main import main\nsys.argv[1:] = ['trian']\n"
        "atexit.register(print, 'handled')\n"
        "class Slow:\n    def __del__(self): print('dismantled')\nslow = Slow()\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "handled\n")
    assert done.stderr.startswith("tarflowlm: command 'trian'")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; 0 of 1 samples are finished"),
        (MemoryError(), 2, "out of memory: choose"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory: choose"),
        (FloatingPointError("the loss is nan"), 2, "the loss is nan"),
        (OSError(28, "No space left on device", "a\nb"), 2, "cannot use a\\nb: No space left"),
    ],
)
def test_errors_cost_one_line(run, model, monkeypatch, error, status, said):
    def fail(*_args: object, **_more: object) -> None:
        raise error

    monkeypatch.setattr("tarflowlm.generation.texts.Writer", fail)
    done = run("sample", model)
    assert (done.status, done.err.count("\n")) == (status, 1)
    assert done.err.startswith(f"tarflowlm: {said}")


def test_a_bug_brings_its_traceback(run, model, monkeypatch):
    monkeypatch.setattr("tarflowlm.generation.texts.Writer", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("sample", model)
