"""`tarflowlm train PRESET` and `tarflowlm train --resume DIR`."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console

from tarflowlm.cli.configured import ResumeArgs, TrainArgs
from tarflowlm.cli.signals import stop_on_signals
from tarflowlm.device import pick_device
from tarflowlm.evaluation.likelihood import sign_of
from tarflowlm.terminal.tables import print_json, print_table
from tarflowlm.terminal.training import ProgressReporter
from tarflowlm.training.metrics import Reporter
from tarflowlm.training.processes import Processes, launched
from tarflowlm.training.train import resume, train


def run_train(args: TrainArgs | ResumeArgs) -> None:
    with launched(pick_device(args.device)) as processes, _reporter(processes) as reporter:
        if isinstance(args, ResumeArgs):
            summary = resume(args.resume, **_options(reporter, processes))
        else:
            assert args.out is not None
            summary = train(args.configured(), args.out, **_options(reporter, processes))
    _show(summary, processes, as_json=args.json)


def _reporter(processes: Processes) -> AbstractContextManager[Reporter]:
    """Progress of the first process; the others are silent."""
    return ProgressReporter(Console(stderr=True)) if processes.first else nullcontext(Reporter())


def _options(reporter: Reporter, processes: Processes) -> dict[str, Any]:
    return {
        "device": processes.device, "reporter": reporter, "processes": processes, "stop_requests": stop_on_signals
    }  # fmt: skip


def _show(summary: dict[str, Any], processes: Processes, *, as_json: bool) -> None:
    """The result of a run, from its first process."""
    if not processes.first:
        return
    if as_json:
        print_json(summary)
        return
    test = summary["test"]
    sign = sign_of(test["bound"])
    rows = [
        ("test", f"{sign} {test['bpc']:.4f} bits per character ({test['bound']}, {test['tokens']:,} tokens)"),
        ("stages, valid", ", ".join(f"{bpc:.4f}" for bpc in summary["stage_valid_bpc"])),
        ("trained", f"{summary['tokens']:,} tokens in {summary['seconds']:,.0f} s"),
        ("parameters", f"{summary['parameters']:,}, {summary['trunk_parameters']:,} of them in Transformers"),
    ]
    print_table(Console(), summary["preset"], rows)
