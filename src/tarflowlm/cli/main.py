"""The command line `tarflowlm COMMAND`: its exit status (docs/reliability.md), threads, signals."""

import atexit
import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import tarflowlm
from tarflowlm.cli.environment import keep_freed_memory, settle_threads
from tarflowlm.cli.signals import INTERRUPTED, exit_on_interrupt
from tarflowlm.config import TEXT8_ALPHABET
from tarflowlm.errors import (
    SMALLER,
    Stopped,
    UnknownCharacters,
    UserError,
    about_file,
    is_first_process,
    lacks_memory,
    unknown,
)

COMMANDS = {
    "quickstart": "tarflowlm.cli.quickstart",
    "data": "tarflowlm.cli.data",
    "train": "tarflowlm.cli.train",
    "eval": "tarflowlm.cli.evaluate",
    "score": "tarflowlm.cli.score",
    "sample": "tarflowlm.cli.sample",
    "info": "tarflowlm.cli.info",
    "runs": "tarflowlm.cli.info --compare",
    "edit": "tarflowlm.cli.edit",
    "report": "tarflowlm_apps.report.command",
    "studio": "tarflowlm_apps.studio.command",
    "serve": "tarflowlm_apps.serve.command",
    "export": "tarflowlm.cli.export",
    "push": "tarflowlm_apps.hub.command",
}
"""The module of every command, and words that are put before the user's words.

A module has `run(args)` and the dataclass `Args`, or `read(argv)` if its options depend on the
words. The docstring of `Args` summarises the command; the docstring below an option is its help. No
module imports torch at its top.
"""


def main(
    argv: list[str] | None = None, *, dispatch: Callable[[list[str]], None] | None = None
) -> None:
    """Entry point: run a command and exit. `dispatch` runs a program other than `tarflowlm`.

    Without `argv` this is the whole process, which after an error leaves at once: Python would take
    most of a second to dismantle torch.
    """
    if argv is None:
        try:
            main(sys.argv[1:], dispatch=dispatch)
        except SystemExit as stop:
            if not stop.code:
                raise
            atexit._run_exitfuncs()
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
            os._exit(stop.code if isinstance(stop.code, int) else 1)
        return
    silent = {name for name in ("stdout", "stderr") if getattr(sys, name) is None}  # closed
    if not is_first_process():
        silent.add("stdout")
    for name in silent:
        setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a character that the output's encoding lacks is printed as ?
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            (dispatch or _dispatch)(argv)
        except SystemExit as stop:
            if isinstance(stop.__context__, BrokenPipeError):  # rich exits on it
                raise stop.__context__ from None
            raise
        finally:
            # inside this `try`, which catches a closed pipe
            sys.stdout.flush()
    except BrokenPipeError:
        # no message: it is no error that the reader of the output has closed it
        with contextlib.suppress(OSError, ValueError):
            # Python flushes once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 plus the number of SIGPIPE
    except (UserError, FloatingPointError) as error:
        helps = isinstance(error, UnknownCharacters) and set(TEXT8_ALPHABET) <= set(error.alphabet)
        helps &= "--from" not in argv
        _end(2, f"{error}{', or pass --normalize text8' if helps else ''}")
    except OSError as error:
        _end(2, about_file(error), everywhere=True)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        remedy = SMALLER
        # the run of another model or of a directory has its own
        if argv[:1] == ["train"] and not {"--from", "--resume"} & set(argv):
            same = "halve --train.tokens-at-once (at first 16384) or add"
            same = f"{same} --train.checkpoint-activations, which change no result"
            remedy = f"{same}; or {remedy}"
        _end(2, f"out of memory: {remedy}", everywhere=True)
    except Stopped as stopped:
        _end(75, str(stopped))  # EX_TEMPFAIL of sysexits.h: try again
    except KeyboardInterrupt as interrupt:
        more = f"; {interrupt}" if str(interrupt) else ""
        _end(INTERRUPTED, f"interrupted{more}")


def _dispatch(argv: list[str]) -> None:
    argv = _import_named(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        from tarflowlm.terminal.bars import print_table

        rows = []
        for name, place in COMMANDS.items():
            module, *words = place.split()
            same = f"Short for `{module.rpartition('.')[2]} {' '.join(words)}`."
            does = same if words else command_module(name).Args.__doc__
            rows.append((name, " ".join(does.split())))
        rows.append(("--import MODULE", "With any command: first import a module of yours."))
        print_table("tarflowlm COMMAND --help   or   tarflowlm --version", rows)
        return
    if argv[0] == "--version":
        sys.stdout.write(f"tarflowlm {tarflowlm.__version__}\n")
        return
    name, *given = argv
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    with exit_on_interrupt():
        command = command_module(name)
    _, *words = COMMANDS[name].split()
    run_command(command, [*words, *given], f"tarflowlm {name}")


def run_command(command: ModuleType, argv: list[str], prog: str) -> None:
    """Read the words of a command and run it.

    What holds for a whole process is chosen here, so that a program which imports the package has
    its own choices: threads, freed memory, and warnings of PyTorch.
    """
    with exit_on_interrupt():
        from tarflowlm.cli.options import parse
        from tarflowlm.terminal.bars import NoticeHandler

    args = command.read(argv) if hasattr(command, "read") else parse(command.Args, argv, prog)
    settle_threads()
    with exit_on_interrupt():
        import torch  # noqa: F401  # which takes seconds
    keep_freed_memory()
    # at every save and load of a training state by a single process
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    logger = logging.getLogger("tarflowlm")
    if not logger.handlers:
        logger.addHandler(NoticeHandler())
        logger.setLevel(logging.INFO)
    command.run(args)


def _import_named(argv: list[str]) -> list[str]:
    """Import the module of every --import MODULE, of this folder or installed.

    Returns the other words.
    """
    while "--import" in argv:
        at = argv.index("--import")
        module = "".join(argv[at + 1 : at + 2])
        argv = argv[:at] + argv[at + 2 :]
        sys.path.insert(0, str(Path()))
        try:
            import_module(module)
        except UserError:
            raise
        except (ImportError, ValueError) as error:
            remedy = "name a Python module, say my_module"
            if module.endswith(".py"):
                remedy = f"leave out .py: --import {module.removesuffix('.py')}"
            raise UserError(f"--import {module}: {error}; {remedy}") from None
    return argv


def command_module(name: str) -> ModuleType:
    """The module of a command."""
    return import_module(COMMANDS[name].split()[0])


def _end(status: int, message: str, *, everywhere: bool = False) -> NoReturn:
    """One line on stderr and exit.

    Under torchrun the first process of a machine speaks, or all of them with `everywhere`.
    """
    # names in it may hold line ends
    line = message.replace("\r", "\\r").replace("\n", "\\n")
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):
            sys.stderr.write(f"tarflowlm: {line}\n")
    sys.exit(status)
