"""The command line: `tarflowlm COMMAND`. Nothing in the package imports it.

Exit status: 0 on success, 2 for user errors (one line on stderr), 75 when a run was asked to stop and has saved
itself, 130 when interrupted otherwise (docs/reliability.md).
"""

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

import tarflowlm
from tarflowlm.cli.signals import INTERRUPTED, exit_on_interrupt
from tarflowlm.cli.threads import settle_threads
from tarflowlm.errors import Stopped, UnknownCharacters, UserError

STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: try again."""
UNREAD = 141
"""What a shell reports for a program whose output nobody reads any more: 128 plus the number of SIGPIPE."""
AFTER_INTERRUPT = {
    "train": "a training run continues with `tarflowlm train --resume DIR`",
    "reproduce": "the same command goes on from the last checkpoint",
}
"""What the commands that save on the way add when they are interrupted."""


@dataclass(frozen=True)
class Command:
    """A command, its modules imported only when it is called: torch takes seconds."""

    summary: str
    run: str
    """module:function below `cli`."""
    args: str
    """module:class of what `run` takes, or module:function that makes it of the words after the command's name."""


COMMANDS = {
    "quickstart": Command(
        "Train, evaluate and sample a small model on the built-in corpus, on any CPU, in a few minutes.",
        "quickstart:run_quickstart",
        "arguments:QuickstartArgs",
    ),
    "data": Command("Turn a corpus or text file into token shards.", "directories:run_data", "configured:DataArgs"),
    "train": Command(
        "Train a preset into a new directory, with any field of its configuration overridden. Or continue a run: "
        "train --resume DIR.",
        "train:run_train",
        "configured:read_train",
    ),
    "eval": Command(
        "Measure the likelihood of a text under a model; on request, its latents and the quality of samples.",
        "evaluate:run_eval",
        "inspect_arguments:EvalArgs",
    ),
    "score": Command(
        "Show how many bits every token of a text takes, and the text as a whole; under one model or two.",
        "score:run_score",
        "inspect_arguments:ScoreArgs",
    ),
    "sample": Command("Generate text from a trained model.", "sample:run_sample", "arguments:SampleArgs"),
    "info": Command(
        "Say what a model is, what it was trained on and how well it does; without one, list the shipped models.",
        "info:run_info",
        "inspect_arguments:InfoArgs",
    ),
    "runs": Command(
        "Compare training runs in a table: bits per character, tokens, time and state.",
        "info:run_runs",
        "inspect_arguments:RunsArgs",
    ),
    "edit": Command(
        "Redraw some words of a text given all others. Or move it --toward another, or --replace OLD NEW, or change "
        "a state of it in latent space (--level).",
        "edit:run_edit",
        "arguments:EditArgs",
    ),
    "report": Command(
        "Draw runs and models: samples, curves, blocks and codebook, as one HTML page and PNG figures. Needs the "
        "extra plots (matplotlib).",
        "directories:run_report",
        "arguments:ReportArgs",
    ),
    "studio": Command(
        "Open a local page that writes, fills in, edits and scores with models, and shows runs as they train.",
        "studio:run_studio",
        "arguments:StudioArgs",
    ),
    "export": Command(
        "Copy a model out of its run directory: configuration, tokenizer and weights, without its training state.",
        "directories:run_export",
        "arguments:ExportArgs",
    ),
    "push": Command(
        "Put a model with its model card on the Hugging Face hub; --dry-run writes both here.",
        "push:run_push",
        "arguments:PushArgs",
    ),
    "reproduce": Command(
        "Reproduce a table or figure of the paper, or an experiment of ours; `all` runs every one of them.",
        "reproduce:run_reproduce",
        "arguments:ReproduceArgs",
    ),
    "harness": Command(
        "Evaluate a model with lm-evaluation-harness: harness MODEL --tasks NAMES and any other option of lm-eval.",
        "harness:run_harness",
        "inspect_arguments:read_harness",
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Entry point: runs a command and exits."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a character that the output cannot take is no reason to end
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            _dispatch(argv)
        finally:
            # here, where a closed pipe can be told from other errors
            sys.stdout.flush()
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # how rich reports it
            _leave_unread()
        raise
    except BrokenPipeError:
        _leave_unread()
    except UnknownCharacters as error:
        _fail(f"{error}, or pass --normalize text8")
    except (UserError, FloatingPointError) as error:
        _fail(str(error))
    except OSError as error:
        place = f"cannot use {error.filename or 'the output'}: {error.strerror or error}"
        _fail(f"{place}; check the path, its permissions and the disk", everywhere=True)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail("out of memory: choose a smaller model, context, batch size or number of samples", everywhere=True)
    except Stopped as stopped:
        _say(str(stopped))
        sys.exit(STOPPED)
    except KeyboardInterrupt as interrupt:
        more = str(interrupt) or (AFTER_INTERRUPT.get(argv[0], "") if argv else "")
        _say(f"interrupted; {more}" if more else "interrupted")
        sys.exit(INTERRUPTED)


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        _print_help()
        return
    if argv[0] == "--version":
        sys.stdout.write(f"tarflowlm {tarflowlm.__version__}\n")
        return
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise UserError(f"command {name!r} is unknown: choose one of {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    settle_threads()
    args: Any
    takes = _load(command.args)
    if isinstance(takes, type):
        from tarflowlm.cli.parsing import parse

        args = parse(takes, rest, f"tarflowlm {name}", description=command.summary)
    else:
        args = takes(rest)
    run = _load(command.run)
    import torch

    # denormal numbers make these densities many times slower on CPUs
    torch.set_flush_denormal(True)
    run(args)


def _load(reference: str) -> Any:
    module, name = reference.split(":")
    with exit_on_interrupt():
        return getattr(import_module(f"tarflowlm.cli.{module}"), name)


def _print_help() -> None:
    from rich.console import Console

    from tarflowlm.terminal.tables import print_table

    rows = [(name, command.summary) for name, command in COMMANDS.items()]
    print_table(Console(), "tarflowlm COMMAND --help   or   tarflowlm --version", rows)


def _fail(message: str, *, everywhere: bool = False) -> NoReturn:
    _say(message, everywhere=everywhere)
    sys.exit(2)


def _say(message: str, *, everywhere: bool = False) -> None:
    """One line on stderr, whatever the names in it contain.

    Under torchrun it comes from the first process of every machine, or with `everywhere` from every process.
    """
    line = message.replace("\r", "\\r").replace("\n", "\\n")
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):
            sys.stderr.write(f"tarflowlm: {line}\n")


def _leave_unread() -> NoReturn:
    """Exit in silence: whoever read the output has stopped reading, which is no error."""
    with contextlib.suppress(OSError, ValueError):
        # Python flushes once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(UNREAD)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    import torch

    # PyTorch's CPU allocator raises a plain RuntimeError
    messages = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)
