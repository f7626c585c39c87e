"""`tarflowlm train PRESET`, `tarflowlm train --from MODEL` and `tarflowlm train --resume DIR`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from tarflowlm.cli.options import (
    Count,
    Device,
    Number,
    Out,
    PrintJson,
    arg,
    check,
    load_checkpoint,
    parse,
)
from tarflowlm.config import RunConfig
from tarflowlm.errors import UserError
from tarflowlm.presets import PRESETS, preset, with_blocks, with_steps


@dataclass(frozen=True)
class Args:
    """Train a preset, with any field of its configuration overridden, or go on with a run."""

    out: Out = None  # Run directory: a new one, or that of the same run, which goes on. Required.
    data: Annotated[str | None, arg("SOURCE")] = None
    """Corpus name, text file, or directory made by `tarflowlm data`."""
    steps: Count = None  # Optimiser steps in total; the stages keep their proportions.
    minutes: Number = None
    """Train for this time instead, including evaluation and saving; the stages keep their shares of
    it.
    """
    device: Device = "auto"
    checkpoint_every: Count = None  # Steps between checkpoints.
    blocks: Count = None  # Train only the first blocks of the preset's stack, this many.
    json: PrintJson = False
    run: Annotated[RunConfig | None, tyro.conf.arg(name="")] = None  # The preset's fields.

    def __post_init__(self) -> None:
        check(self, exclusive={"minutes": ("steps",)})
        if (
            self.blocks is not None
            and self.run is not None
            and not 1 <= self.blocks <= self.run.model.num_blocks
        ):
            raise UserError(
                f"blocks {self.blocks}: must be between 1 and the preset's {self.run.model.num_blocks}"
            )
        self.configured()  # for its errors

    def configured(self) -> RunConfig:
        """The run, with the short options moved into its fields."""
        assert self.run is not None
        run = self.run
        train: dict[str, Any] = {"checkpoint_every": self.checkpoint_every, "minutes": self.minutes}
        run = replace(
            run, train=replace(run.train, **{name: n for name, n in train.items() if n is not None})
        )
        if self.data is not None:
            run = replace(run, data=replace(run.data, source=self.data))
        if self.blocks is not None:
            run = with_blocks(run, self.blocks)
        return run if self.steps is None else with_steps(run, self.steps)


@dataclass(frozen=True)
class TuneArgs:
    """Train a model further on another text. Its weights, codebook and tokenizer are the start."""

    source: Annotated[Path, tyro.conf.arg(name="from", metavar="MODEL")]
    """Run directory, shipped model or hf:OWNER/NAME."""
    data: Annotated[
        str, arg("SOURCE")
    ]  # Text file, corpus name, or directory made with the model's tokenizer.
    out: Annotated[
        Path, arg("PATH")
    ]  # Run directory: a new one, or that of the same run, which goes on.
    minutes: Number = (
        None  # Time of the whole run, including evaluation and saving. Without --steps, 10.
    )
    steps: Count = None  # Optimiser steps in total, instead.
    lr: Number = None  # Peak learning rate; half of that of the model's own training if left out.
    seed: int = 0  # Seed of the order of the data and of the noise.
    device: Device = "auto"
    json: PrintJson = False

    def __post_init__(self) -> None:
        check(self, exclusive={"minutes": ("steps",)})


@dataclass(frozen=True)
class ResumeArgs:
    """Continue a stopped run."""

    resume: Annotated[Path, arg("DIR")]  # Run directory to continue.
    device: Device = "auto"
    json: PrintJson = False


def read(argv: list[str]) -> Args | TuneArgs | ResumeArgs:
    """The words after `tarflowlm train`: PRESET, --from MODEL or --resume DIR, and options. Help
    ends the process.
    """
    if argv[:1] in (["-h"], ["--help"]):
        from tarflowlm.terminal.bars import print_table

        usage = "tarflowlm train PRESET --out DIR [--help for its fields]\n"
        usage += "tarflowlm train --from MODEL --data TEXT --out DIR\ntarflowlm train --resume DIR"
        print_table(
            usage,
            [(name, " ".join((make.__doc__ or "").split())) for name, make in PRESETS.items()],
        )
        raise SystemExit
    given = {word.partition("=")[0] for word in argv}
    if argv and not argv[0].startswith("-"):
        if "--from" in given:
            raise UserError(
                f"{argv[0]} with --from: the model brings its own shape; leave the preset out"
            )
        name = argv[0]
        # some fields are true by default, so every flag --x has its --no-x; some take None
        config = (tyro.conf.AvoidSubcommands,)
        args = parse(
            Args, argv[1:], f"tarflowlm train {name}", default=Args(run=preset(name)), config=config
        )
        if args.out is None:
            raise UserError(f"--out is missing: name the directory to write, say --out runs/{name}")
        return args
    if "--from" in given:
        return parse(TuneArgs, argv, "tarflowlm train --from MODEL")
    if "--resume" in given:
        return parse(ResumeArgs, argv, "tarflowlm train --resume DIR")
    raise UserError(f"train needs a preset ({', '.join(PRESETS)}), --from MODEL or --resume DIR")


def run(args: Args | TuneArgs | ResumeArgs) -> None:
    from contextlib import nullcontext

    from tarflowlm.cli.main import stop_on_signals
    from tarflowlm.device import pick_device
    from tarflowlm.evaluation.likelihood import sign_of
    from tarflowlm.runs.checkpoint import read_run
    from tarflowlm.terminal.bars import ProgressReporter, print_notice, print_result
    from tarflowlm.training.metrics import Reporter
    from tarflowlm.training.parallel import launched
    from tarflowlm.training.train import train, tuning

    with launched(pick_device(args.device)) as processes:
        # the first process alone shows its progress
        with ProgressReporter() if processes.first else nullcontext(Reporter()) as reporter:
            options: dict[str, Any] = {
                "device": processes.device,
                "reporter": reporter,
                "processes": processes,
            }
            options["stop_requests"] = stop_on_signals
            parent = None
            if isinstance(args, ResumeArgs):
                out, config = args.resume, read_run(args.resume)
            elif isinstance(args, TuneArgs):
                with processes.first_alone():
                    out, parent = args.out, load_checkpoint(args.source, "cpu")
                length: dict[str, Any] = {
                    "minutes": args.minutes,
                    "steps": args.steps,
                    "lr": args.lr,
                }
                config = tuning(parent, args.data, seed=args.seed, **length)
            else:
                assert args.out is not None
                out, config = args.out, args.configured()
            summary = train(config, out, parent=parent, **options)
        if not processes.first:
            return
    test, sign = summary["test"], sign_of(summary["test"]["bound"])
    rows = [
        (
            "test",
            f"{sign} {test['bpc']:.4f} bits per character ({test['bound']}, {test['tokens']:,} tokens)",
        ),
        ("stages, valid", ", ".join(f"{bpc:.4f}" for bpc in summary["stage_valid_bpc"])),
        ("trained", f"{summary['tokens']:,} tokens in {summary['seconds']:,.0f} s"),
        (
            "parameters",
            f"{summary['parameters']:,}, {summary['trunk_parameters']:,} of them in Transformers",
        ),
    ]
    print_result(args.json, summary, summary["preset"], rows)
    print_notice(f"next: tarflowlm sample {out}")
