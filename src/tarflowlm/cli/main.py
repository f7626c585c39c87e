"""The command line: `tarflowlm COMMAND`. Nothing in the package imports it.

Exit status: 0 on success, 2 for user errors (one line on stderr), 75 when a run was asked to stop and has saved
itself, 130 when interrupted otherwise (docs/reliability.md).
"""

import contextlib
import io
import logging
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import tarflowlm
from tarflowlm.cli.signals import INTERRUPTED, exit_on_interrupt
from tarflowlm.errors import Stopped, UnknownCharacters, UserError

STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: try again."""
CLOSED_PIPE = 141
"""The status a shell reports for a program killed by SIGPIPE: 128 plus its number."""
AFTER_INTERRUPT = {
    "train": "a training run continues with `tarflowlm train --resume DIR`",
    "reproduce": "the same command goes on from the last checkpoint",
}
"""Added to the message of an interrupt in commands that save on the way."""

COMMANDS = ["quickstart", "data", "train", "eval", "score", "sample", "info", "runs", "edit", "report", "studio"]
COMMANDS += ["export", "push", "reproduce", "harness"]
"""Modules below `cli` (`evaluate` for eval). Each has `run(args)` and the dataclass `Args`, whose docstring
summarises the command, and where its options depend on the words `read(argv)`. None imports torch at its top."""


def main(argv: list[str] | None = None) -> None:
    """Entry point: runs a command and exits."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a character that the output's encoding lacks is printed as ?
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            _dispatch(argv)
        finally:
            # inside this `try`, which catches a closed pipe
            sys.stdout.flush()
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich exits on it
            _end_quietly()
        raise
    except BrokenPipeError:
        _end_quietly()
    except (UserError, FloatingPointError) as error:
        hint = ", or pass --normalize text8" if isinstance(error, UnknownCharacters) else ""
        _end(2, f"{error}{hint}")
    except OSError as error:
        place = f"cannot use {error.filename or 'the output'}: {error.strerror or error}"
        _end(2, f"{place}; check the path, its permissions and the disk", everywhere=True)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        remedy = "choose a smaller model, context, batch size, or number of samples or particles"
        _end(2, f"out of memory: {remedy}", everywhere=True)
    except Stopped as stopped:
        _end(STOPPED, str(stopped))
    except KeyboardInterrupt as interrupt:
        more = str(interrupt) or AFTER_INTERRUPT.get(argv[0] if argv else "", "")
        _end(INTERRUPTED, f"interrupted; {more}" if more else "interrupted")


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        from tarflowlm.terminal.bars import print_table

        rows = [(name, " ".join(command_module(name).Args.__doc__.split())) for name in COMMANDS]
        print_table("tarflowlm COMMAND --help   or   tarflowlm --version", rows)
        return
    if argv[0] == "--version":
        sys.stdout.write(f"tarflowlm {tarflowlm.__version__}\n")
        return
    name, *rest = argv
    if name not in COMMANDS:
        raise UserError(f"command {name!r} is unknown: choose one of {', '.join(COMMANDS)}")
    command = command_module(name)
    if hasattr(command, "read"):
        args = command.read(rest)
    else:
        from tarflowlm.cli.options import parse

        args = parse(command.Args, rest, f"tarflowlm {name}")
    settle_threads()
    with exit_on_interrupt():
        import torch
    # denormal numbers make these densities many times slower on CPUs
    torch.set_flush_denormal(True)
    _print_notices()
    command.run(args)


def command_module(name: str) -> Any:
    """The module of a command."""
    return import_module(f"tarflowlm.cli.{'evaluate' if name == 'eval' else name}")


def settle_threads() -> None:
    """Choose how idle OpenMP threads wait, before torch is imported, unless the environment already does.

    If other programs want the cores they sleep: a spinning thread takes the core from the thread it waits for, which
    costs up to two thirds of the speed. On an idle machine sleeping costs one third, so there they spin, briefly
    (docs/log.md). The load average would count work that has just ended, so this counts what runs now: the minimum of
    five looks, without this process.
    """
    choices = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    load = Path("/proc/loadavg")  # Linux alone has it: "0.20 0.18 0.12 2/345 678" means two runnable threads
    if not load.exists() or "torch" in sys.modules or any(name in os.environ for name in choices):
        return
    looks = []
    for _ in range(5):
        looks.append(int(load.read_text(encoding="ascii").split()[3].split("/")[0]) - 1)
        time.sleep(0.002)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(limit) if limit.isdigit() else len(os.sched_getaffinity(0))
    busy = min(looks) + threads > (os.cpu_count() or 1)
    os.environ.update({"OMP_WAIT_POLICY": "PASSIVE"} if busy else {"GOMP_SPINCOUNT": "20000"})


def _print_notices() -> None:
    """Print what the package logs, one line each on stderr; under torchrun from the first process of a machine."""
    from tarflowlm.terminal.bars import NoticeHandler

    logger = logging.getLogger("tarflowlm")
    if os.environ.get("LOCAL_RANK", "0") == "0" and not logger.handlers:
        logger.addHandler(NoticeHandler())
        logger.setLevel(logging.INFO)


def _end(status: int, message: str, *, everywhere: bool = False) -> NoReturn:
    """Exit with one line on stderr, also where names in it hold line ends.

    Under torchrun it comes from the first process of every machine, or with `everywhere` from every process.
    """
    line = message.replace("\r", "\\r").replace("\n", "\\n")
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):
            sys.stderr.write(f"tarflowlm: {line}\n")
    sys.exit(status)


def _end_quietly() -> NoReturn:
    """Exit without a message: the reader of the output has closed it, which is no error."""
    with contextlib.suppress(OSError, ValueError):
        # Python flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(CLOSED_PIPE)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    import torch

    # PyTorch's CPU allocator raises a plain RuntimeError
    messages = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)
