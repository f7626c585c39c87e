"""What happens before torch is imported, and how the command line ends when cut short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tarflowlm
from tarflowlm.cli.main import COMMANDS, settle_threads

pytestmark = pytest.mark.usefixtures("interruptible")
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
FAKE_TORCH = """
import os
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), flush=True)
if "INTERRUPT" in os.environ:
    import signal, time
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)
os._exit(0)
"""
WITHOUT_TORCH = """
import sys
from tarflowlm.cli.main import main
for argv in {argvs}:
    try:
        main(argv)
    except SystemExit as stop:
        assert stop.code in (None, 0, 2), stop.code
    assert not {{"torch", "numpy"}} & set(sys.modules), argv
"""


def test_help_and_wrong_arguments_need_no_torch():
    argvs = [[], ["--version"], ["trian"], ["train", "mini-mixd", "--help"], ["train", "--help"]]
    argvs += [[name, "--help"] for name in COMMANDS]
    argvs += [["sample", "--nmu", "3"], ["edit", "--text", "abc", "--num", "0"], ["reproduce", "table9"]]
    argvs += [["train", "mini-mixd", "--out", "x", "--steps", "2"], ["data", "english"]]
    code = WITHOUT_TORCH.format(argvs=argvs)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there():
    for name in tarflowlm.__all__:
        assert getattr(tarflowlm, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        tarflowlm.no_such_name  # noqa: B018


# --- threads and signals before torch


@pytest.fixture
def start(tmp_path):
    """start(*argv, **environment): the command line, with a `torch` that prints what it finds and ends."""

    def call(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "torch.py").write_text(FAKE_TORCH, encoding="utf-8")
        inherited = {name: value for name, value in os.environ.items() if name not in CHOICES}
        inherited["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "tarflowlm", *argv]
        return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=60)

    return call


@pytest.mark.slow
def test_threads_are_settled_before_torch_is_imported(start):
    # which one depends on what else runs on this machine
    assert start("info").stdout in ("PASSIVE None\n", "None 20000\n")
    assert start("info", OMP_WAIT_POLICY="ACTIVE").stdout == "ACTIVE None\n"
    assert start("info", KMP_BLOCKTIME="1").stdout == "None None\n"


@pytest.mark.parametrize(
    ("running", "threads", "expected"),
    [
        (1, "2", "GOMP_SPINCOUNT"),
        (2, "2", "OMP_WAIT_POLICY"),
        (2, "1", "GOMP_SPINCOUNT"),
        (5, "1", "OMP_WAIT_POLICY"),
    ],
)
def test_threads_sleep_where_others_want_the_cores(monkeypatch, running, threads, expected):
    """`running` counts this process."""
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: f"0.20 0.18 0.12 {running}/345 678\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        settle_threads()
        assert [name for name in CHOICES if name in os.environ] == [expected]


# --- ends


@pytest.mark.slow
@pytest.mark.parametrize("argv", [("info", "--json"), ("sample", "--help")])
def test_a_closed_pipe_is_no_error(argv):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tarflowlm", *argv]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_costs_one_line():
    command = [sys.executable, "-m", "tarflowlm", "--version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("tarflowlm: cannot use the output: No space left")
    assert done.stderr.count("\n") == 1


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

    monkeypatch.setattr("tarflowlm.cli.sampling.generate", fail)
    done = run("sample", model)
    assert (done.status, done.err.count("\n")) == (status, 1)
    assert done.err.startswith(f"tarflowlm: {said}")


def test_a_bug_brings_its_traceback(run, model, monkeypatch):
    monkeypatch.setattr("tarflowlm.cli.sampling.generate", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("sample", model)
