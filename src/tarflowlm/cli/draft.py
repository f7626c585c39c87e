"""`tarflowlm draft RUN`: trains the draft of a finished run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from tarflowlm.cli.arguments import Device, PrintJson, ReleasedModel, RunOrModel
from tarflowlm.cli.models import locate
from tarflowlm.cli.signals import stop_on_signals
from tarflowlm.device import pick_device
from tarflowlm.draft import DraftConfig
from tarflowlm.errors import UserError
from tarflowlm.runs.drafts import DRAFT
from tarflowlm.runs.hub import is_reference
from tarflowlm.runs.released import FOLDER, chosen
from tarflowlm.terminal.tables import print_json, print_table
from tarflowlm.terminal.training import DraftReporter
from tarflowlm.training.draft import DraftTraining, train_draft


@dataclass(frozen=True)
class DraftArgs:
    """Arguments of `tarflowlm draft`."""

    directory: RunOrModel = None
    model: ReleasedModel = None
    out: Path | None = None
    """Directory to create: a copy of the model with its draft. Without, the draft is added to the run."""
    data: str | None = None
    """Corpus name, text file, or directory made by `tarflowlm data`; the default is the run's own corpus."""
    steps: int | None = None
    """Optimiser steps in total, 4000."""
    minutes: float | None = None
    """Train for this time instead."""
    resume: bool = False
    """Continue where training stopped; --steps or --minutes may ask for more than before."""
    seed: int = 0
    """Seed of the start, the order of the data and the noise."""
    device: Device = "auto"
    json: PrintJson = False
    draft: Annotated[DraftConfig, tyro.conf.arg(name="")] = field(default_factory=DraftConfig)
    """Shape of the draft."""

    def __post_init__(self) -> None:
        if self.minutes is not None and self.steps is not None:
            raise UserError(f"--steps {self.steps} with --minutes {self.minutes}: give one of them")
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"minutes {self.minutes}: must be above 0 and finite")


def run_draft(args: DraftArgs) -> None:
    given = chosen(args.directory, args.model)
    if args.out is None and is_reference(given) and not given.exists():
        raise UserError(f"{given.as_posix()} is on the hub: name a directory for a copy of it with --out")
    directory = locate(given)
    if directory.parent == FOLDER and args.out is None:
        raise UserError(f"{directory.name} comes with the package: name a directory for a copy of it with --out")
    if args.resume and args.out is not None:
        raise UserError(f"--resume with --out {args.out}: resume that directory itself, `draft {args.out} --resume`")
    training: DraftTraining | None = DraftTraining(seed=args.seed)
    if args.minutes is not None:
        training = DraftTraining(seed=args.seed, minutes=args.minutes)
    elif args.steps is not None:
        training = DraftTraining(seed=args.seed, steps=args.steps)
    elif args.resume:
        training = None
    with DraftReporter(Console(stderr=True)) as reporter:
        summary = train_draft(
            directory,
            config=args.draft,
            training=training,
            data=args.data,
            out=args.out,
            resume=args.resume,
            device=pick_device(args.device),
            reporter=reporter,
            stop_requests=stop_on_signals,
        )
    if args.json:
        print_json(summary)
        return
    rows = [
        ("valid", f"{summary['tokens_per_pass']:.2f} tokens final per pass of block 1 (1 without a draft)"),
        ("trained", f"{summary['steps']:,} steps in {summary['seconds']:,.0f} s"),
        ("parameters", f"{summary['parameters']:,}"),
    ]
    print_table(Console(), str((args.out or directory) / DRAFT), rows)
