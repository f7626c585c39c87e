"""What the commands take that hold configurations, or whose options depend on their first word. No torch here."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from tarflowlm.cli.arguments import Device, PrintJson
from tarflowlm.cli.parsing import parse
from tarflowlm.config import RunConfig, TokenizerConfig
from tarflowlm.errors import UserError
from tarflowlm.presets import PRESETS, preset, with_blocks, with_steps


@dataclass(frozen=True)
class DataArgs:
    """Arguments of `tarflowlm data`."""

    source: tyro.conf.Positional[str]
    """english (built in), text8, openwebtext, or a .txt, .gz, .xz or .zst file."""
    out: Path
    """Directory to create."""
    tokenizer: Annotated[TokenizerConfig, tyro.conf.arg(name="")] = field(default_factory=TokenizerConfig)
    """How text becomes tokens."""
    json: PrintJson = False


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
        if self.minutes is not None and self.steps is not None:
            raise UserError(f"--steps {self.steps} with --minutes {self.minutes}: give one of them")
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"minutes {self.minutes}: must be above 0 and finite")
        self.configured()  # for its errors

    def configured(self) -> RunConfig:
        """The run, with the short options moved into its fields."""
        run = self.run
        assert run is not None
        if self.data is not None:
            run = replace(run, data=replace(run.data, source=self.data))
        if self.checkpoint_every is not None:
            run = replace(run, train=replace(run.train, checkpoint_every=self.checkpoint_every))
        if self.blocks is not None:
            run = with_blocks(run, self.blocks)
        if self.minutes is not None:
            run = replace(run, train=replace(run.train, minutes=self.minutes))
        return run if self.steps is None else with_steps(run, self.steps)


@dataclass(frozen=True)
class ResumeArgs:
    """Continue a stopped run."""

    resume: Path
    """Run directory to continue."""
    device: Device = "auto"
    json: PrintJson = False


def read_train(argv: list[str]) -> TrainArgs | ResumeArgs:
    """What follows `tarflowlm train`: PRESET and its options, or --resume DIR. Help pages end the process."""
    if argv[:1] in (["-h"], ["--help"]):
        usage = "tarflowlm train PRESET --out DIR [--help for its fields]   or   tarflowlm train --resume DIR"
        _list(usage, {name: make.__doc__ for name, make in PRESETS.items()})
    if argv and not argv[0].startswith("-"):
        name = argv[0]
        default = TrainArgs(run=preset(name))
        args = parse(TrainArgs, argv[1:], f"tarflowlm train {name}", default=default, has_pairs=True)
        if args.out is None:
            raise UserError(f"--out is missing: name the directory to write, say --out runs/{name}")
        return args
    if any(word.partition("=")[0] == "--resume" for word in argv):
        return parse(ResumeArgs, argv, "tarflowlm train --resume DIR")
    raise UserError(f"train needs a preset ({', '.join(PRESETS)}) or --resume DIR")


def _list(usage: str, described: dict[str, str | None]) -> NoReturn:
    from rich.console import Console

    from tarflowlm.terminal.tables import print_table

    print_table(Console(), usage, [(name, " ".join((text or "").split())) for name, text in described.items()])
    sys.exit()
