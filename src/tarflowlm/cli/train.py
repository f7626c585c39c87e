"""`tarflowlm train PRESET` and `tarflowlm train --resume DIR`."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from tarflowlm.cli.arguments import Device, PrintJson
from tarflowlm.cli.parsing import parse
from tarflowlm.cli.signals import stop_on_signals
from tarflowlm.device import pick_device
from tarflowlm.errors import UserError
from tarflowlm.runs.config import RunConfig
from tarflowlm.runs.presets import PRESETS, preset, with_steps
from tarflowlm.terminal.tables import print_json, print_table
from tarflowlm.terminal.training import ProgressReporter
from tarflowlm.training.distributed import Processes, launched
from tarflowlm.training.lifecycle import resume, train
from tarflowlm.training.metrics import Reporter


@dataclass(frozen=True)
class TrainArgs:
    """Train a preset into a new directory; any field of its configuration can be overridden."""

    out: Path | None = None
    """Run directory to create. Required."""
    data: str | None = None
    """Corpus name, text file, or directory made by `tarflowlm data`."""
    steps: int | None = None
    """Optimiser steps in total; the stages keep their proportions."""
    minutes: float | None = None
    """Train for this time instead, including evaluation and saving; the stages keep their shares of it."""
    device: Device = "auto"
    checkpoint_every: int | None = None
    """Steps between checkpoints."""
    blocks: int | None = None
    """Train only the first blocks of the preset's stack, this many."""
    json: PrintJson = False
    run: Annotated[RunConfig | None, tyro.conf.arg(name="")] = None
    """The preset's fields."""

    def __post_init__(self) -> None:
        if self.blocks is not None and self.run is not None and not 1 <= self.blocks <= self.run.model.num_blocks:
            raise UserError(f"blocks {self.blocks}: must be between 1 and the preset's {self.run.model.num_blocks}")
        if self.minutes is None:
            return
        if self.steps is not None:
            raise UserError(f"--steps {self.steps} with --minutes {self.minutes}: give one of them")
        if not self.minutes > 0:
            raise UserError(f"minutes {self.minutes}: must be above 0 and finite")


@dataclass(frozen=True)
class ResumeArgs:
    """Continue a stopped run."""

    resume: Path
    """Run directory to continue."""
    device: Device = "auto"
    json: PrintJson = False


def run_train(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        usage = "tarflowlm train PRESET --out DIR [--help for its fields]   or   tarflowlm train --resume DIR"
        print_table(
            Console(), usage, [(name, " ".join((make.__doc__ or "").split())) for name, make in PRESETS.items()]
        )
    elif argv and not argv[0].startswith("-"):
        name = argv[0]
        args = parse(TrainArgs, argv[1:], f"tarflowlm train {name}", default=TrainArgs(run=preset(name)))
        if args.out is None:
            raise UserError(f"--out is missing: name the directory to write, say --out runs/{name}")
        run = overridden(args)
        with launched(pick_device(args.device)) as processes, _reporter(processes) as reporter:
            summary = train(run, args.out, **_options(reporter, processes))
        _show(summary, processes, as_json=args.json)
    elif "--resume" in argv:
        resumed = parse(ResumeArgs, argv, "tarflowlm train --resume DIR")
        with launched(pick_device(resumed.device)) as processes, _reporter(processes) as reporter:
            summary = resume(resumed.resume, **_options(reporter, processes))
        _show(summary, processes, as_json=resumed.json)
    else:
        raise UserError(f"train needs a preset ({', '.join(PRESETS)}) or --resume DIR")


def overridden(args: TrainArgs) -> RunConfig:
    """The run, with the short options moved into its fields."""
    run = args.run
    assert run is not None
    if args.data is not None:
        run = replace(run, data=replace(run.data, source=args.data))
    if args.checkpoint_every is not None:
        run = replace(run, train=replace(run.train, checkpoint_every=args.checkpoint_every))
    if args.blocks is not None:
        steps = run.train.stage_steps[: args.blocks] if run.num_stages > 1 else run.train.stage_steps
        run = replace(run, model=run.model.first_blocks(args.blocks), train=replace(run.train, stage_steps=steps))
    if args.minutes is not None:
        run = replace(run, train=replace(run.train, minutes=args.minutes))
    return run if args.steps is None else with_steps(run, args.steps)


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
    sign = "=" if test["bound"] == "exact" else "<="
    rows = [
        ("test", f"{sign} {test['bpc']:.4f} bits per character ({test['bound']}, {test['tokens']:,} tokens)"),
        ("stages, valid", ", ".join(f"{bpc:.4f}" for bpc in summary["stage_valid_bpc"])),
        ("trained", f"{summary['tokens']:,} tokens in {summary['seconds']:,.0f} s"),
        ("parameters", f"{summary['parameters']:,}, {summary['trunk_parameters']:,} of them in Transformers"),
    ]
    print_table(Console(), summary["preset"], rows)
