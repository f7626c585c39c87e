"""The command line: `tarflowlm COMMAND`. Imported by nothing.

Exit status: 0 on success, 2 for what the user got wrong (one line on stderr), 75 when a run was asked to stop and has
saved itself, 130 when interrupted with nothing saved (docs/reliability.md).
"""

import contextlib
import io
import os
import re
import sys
from typing import Any, NoReturn

from tarflowlm.cli.interrupts import INTERRUPTED, one_line_on_interrupt
from tarflowlm.cli.threads import yielding_threads

# before torch is imported: it takes seconds, and reads the environment once
yielding_threads()
_imported = one_line_on_interrupt()

import torch
import tyro
from rich.console import Console

from tarflowlm.bench import data as bench_data
from tarflowlm.bench import generation as bench_generation
from tarflowlm.bench import infilling as bench_infilling
from tarflowlm.bench import numerics as bench_numerics
from tarflowlm.bench import sizes as bench_sizes
from tarflowlm.bench import train as bench_train
from tarflowlm.cli.commands import (
    DataArgs,
    ExportArgs,
    ReportArgs,
    ResumeArgs,
    SampleArgs,
    SealArgs,
    TrainArgs,
    overridden,
    print_summary,
    run_data,
    run_export,
    run_quickstart_command,
    run_report,
    run_sample,
    run_seal,
)
from tarflowlm.cli.edit import EditArgs, run_edit
from tarflowlm.cli.evaluate import EvalArgs, run_eval
from tarflowlm.cli.quickstart import QuickstartArgs
from tarflowlm.cli.reproduce import ReproduceArgs, run_reproduce
from tarflowlm.cli.signals import stop_on_signals
from tarflowlm.device import pick_device
from tarflowlm.errors import UserError
from tarflowlm.runs.presets import PRESETS, preset
from tarflowlm.terminal.console import ProgressReporter, print_json, print_table, stages_bar
from tarflowlm.training.distributed import Processes, launched
from tarflowlm.training.lifecycle import resume, train
from tarflowlm.training.metrics import Reporter
from tarflowlm.training.run import Stopped

_imported()

STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: try again."""
UNREAD = 141
"""What a shell says of a program whose output nobody reads any more: 128 and the number of SIGPIPE."""


def main(argv: list[str] | None = None) -> None:
    """Entry point: runs a command and exits."""
    argv = sys.argv[1:] if argv is None else argv
    # denormal numbers make these densities many times slower on CPUs
    torch.set_flush_denormal(True)
    try:
        try:
            _dispatch(argv)
        finally:
            # here, where a closed pipe can be told from other errors
            sys.stdout.flush()
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich's way to say so
            _leave_unread()
        raise
    except BrokenPipeError:
        _leave_unread()
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
    except KeyboardInterrupt:
        more = "; a training run continues with `tarflowlm train --resume DIR`" if argv[:1] == ["train"] else ""
        _say(f"interrupted{more}")
        sys.exit(INTERRUPTED)


def _fail(message: str, *, everywhere: bool = False) -> NoReturn:
    _say(message, everywhere=everywhere)
    sys.exit(2)


def _say(message: str, *, everywhere: bool = False) -> None:
    """One line, whatever the names in it hold; under torchrun, from the first process of every machine, or from every
    process that has something of its own to say."""
    line = message.replace("\r", "\\r").replace("\n", "\\n")
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.write(f"tarflowlm: {line}\n")


def _leave_unread() -> NoReturn:
    """Whoever read the output has had enough: no error, and no word about it."""
    with contextlib.suppress(OSError, ValueError):
        # Python flushes once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(UNREAD)


def _is_out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    # PyTorch's CPU allocator raises a plain RuntimeError
    return known or "can't allocate memory" in str(error) or "Storage size calculation overflowed" in str(error)


def _dispatch(argv: list[str]) -> None:
    commands = {
        "quickstart": (run_quickstart_command, QuickstartArgs),
        "data": (run_data, DataArgs),
        "eval": (run_eval, EvalArgs),
        "sample": (run_sample, SampleArgs),
        "edit": (run_edit, EditArgs),
        "report": (run_report, ReportArgs),
        "seal": (run_seal, SealArgs),
        "export": (run_export, ExportArgs),
        "reproduce": (run_reproduce, ReproduceArgs),
    }
    if not argv or argv[0] in ("-h", "--help"):
        _print_help({name: args.__doc__ or "" for name, (_, args) in commands.items()})
        return
    name, rest = argv[0], argv[1:]
    if name == "train":
        run_train(rest)
    elif name == "bench":
        run_bench(rest)
    elif name in commands:
        function, args = commands[name]
        function(parse(args, rest, f"tarflowlm {name}"))  # type: ignore[operator]
    else:
        raise UserError(f"command {name!r} is unknown: choose one of train, bench, {', '.join(commands)}")


def _print_help(summaries: dict[str, str]) -> None:
    summaries = summaries | {
        "train": f"{TrainArgs.__doc__} Or continue one: train --resume DIR.",
        "bench": "Speed and accuracy, paired in one run: data, numerics, train, sizes, generation, infilling.",
    }
    print_table(Console(), "tarflowlm COMMAND --help", [(name, _unwrapped(text)) for name, text in summaries.items()])


def _unwrapped(docstring: str | None) -> str:
    return " ".join((docstring or "").split())


def parse(cls: type[Any], argv: list[str], prog: str, default: Any = None) -> Any:
    """`cls` from the command line; what does not parse becomes a one-line UserError."""
    captured = io.StringIO()
    extra = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                cls,
                args=argv,
                prog=prog,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands),
                **extra,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(captured.getvalue(), prog)) from None


def _one_line(message: str, prog: str) -> str:
    """tyro's boxed message without its frame, title and help text."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", message)
    text = re.sub(r"^\s*╭.*", "", text)
    text = re.sub(r"Argument helptext:.*", "", text, flags=re.DOTALL)
    text = re.sub(r"[╭╮╰╯│─]+", " ", text)
    text = re.sub(r"For full helptext.*", "", text, flags=re.DOTALL)
    return f"{' '.join(text.split()) or 'the arguments do not parse'}; see `{prog} --help`"


def run_train(argv: list[str]) -> None:
    console = Console(stderr=True)
    if argv and not argv[0].startswith("-"):
        name, rest = argv[0], argv[1:]
        args = parse(TrainArgs, rest, f"tarflowlm train {name}", TrainArgs(run=preset(name)))
        if args.out is None:
            raise UserError(f"--out is missing: name the directory to write, say --out runs/{name}")
        run = overridden(args)
        with launched(pick_device(args.device)) as processes, _reporter(console, processes) as reporter:
            summary = train(run, args.out, **_options(reporter, processes))
    elif "--resume" in argv:
        args = parse(ResumeArgs, argv, "tarflowlm train --resume DIR")
        with launched(pick_device(args.device)) as processes, _reporter(console, processes) as reporter:
            summary = resume(args.resume, **_options(reporter, processes))
    elif argv and argv[0] in ("-h", "--help"):
        usage = "tarflowlm train PRESET --out DIR [--help for its fields]   or   tarflowlm train --resume DIR"
        print_table(Console(), usage, [(name, _unwrapped(make.__doc__)) for name, make in PRESETS.items()])
        return
    else:
        raise UserError(f"train needs a preset ({', '.join(PRESETS)}) or --resume DIR")
    if not processes.first:
        return
    if args.json:
        print_json(summary)
    else:
        print_summary(summary)


def _reporter(console: Console, processes: Processes) -> contextlib.AbstractContextManager[Reporter]:
    """Progress of the first process; the others are silent."""
    return ProgressReporter(console) if processes.first else contextlib.nullcontext(Reporter())


def _options(reporter: Reporter, processes: Processes) -> dict[str, Any]:
    return {
        "device": processes.device, "reporter": reporter, "processes": processes, "stop_requests": stop_on_signals
    }  # fmt: skip


def run_bench(argv: list[str]) -> None:
    benchmarks: dict[str, Any] = {
        "data": bench_data,
        "numerics": bench_numerics,
        "train": bench_train,
        "sizes": bench_sizes,
        "generation": bench_generation,
        "infilling": bench_infilling,
    }
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        rows = [(name, _unwrapped(module.Args.__doc__)) for name, module in benchmarks.items()]
        print_table(Console(), "tarflowlm bench NAME [--help for its options]", rows)
        return
    if name not in benchmarks:
        raise UserError(f"benchmark {name!r} is unknown: choose one of {', '.join(benchmarks)}")
    module = benchmarks[name]
    args = parse(module.Args, argv[1:], f"tarflowlm bench {name}")
    with stages_bar(Console(stderr=True), is_timing=True) as progress:
        result = module.run(args, progress)
    if args.json:
        print_json(result)
    else:
        module.print_result(result, Console())


if __name__ == "__main__":
    main()
