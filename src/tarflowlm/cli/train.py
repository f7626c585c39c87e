"""`tarflowlm train PRESET`, `tarflowlm train --from MODEL` and `tarflowlm train --resume DIR`."""

import gc
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tarflowlm.cli.options import Json, OnDevice, Training, load_checkpoint, parse
from tarflowlm.cli.signals import stop_on_signals
from tarflowlm.config import RunConfig
from tarflowlm.errors import UserError
from tarflowlm.model_config import BlockConfig
from tarflowlm.options import Integer, Normalize, Number, Seeded, arg, flag
from tarflowlm.presets import FOR_CPU, PRESETS, preset, with_fields, with_steps
from tarflowlm.schema import Positive, from_dict
from tarflowlm.terminal.bars import Bars, print_result, print_table, suggest

USAGE = """tarflowlm train PRESET --out DIR [--help for its fields]
tarflowlm train --from MODEL --data TEXT --out DIR
tarflowlm train --resume DIR [--steps N or --minutes M, to go on]"""

SHORT = {
    "data": "data.source",
    "unwrap": "data.unwrap",
    "normalize": "data.tokenizer.normalize",
    "minutes": "train.minutes",
    "checkpoint_every": "train.checkpoint_every",
}
"""Short options -> the fields of the run that they set."""


@dataclass(frozen=True, kw_only=True)
class Args(Training):
    """Train a preset, with any field of its configuration overridden, or continue a run."""

    normalize: Normalize = None
    """Read your own text in a-z and single spaces, too."""
    checkpoint_every: Integer = None
    """Steps between checkpoints."""
    run: Annotated[RunConfig | None, tyro.conf.arg(name="")] = None
    """The preset's fields."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.configured()  # for its errors

    def configured(self) -> RunConfig:
        """The run, with the short options moved into its fields."""
        assert self.run is not None
        # a flag that is False, and an option that is None, were not given
        given = {
            long: getattr(self, short) for short, long in SHORT.items() if getattr(self, short)
        }
        # not read again without need: blocks of other couplings may still lack options
        run = with_fields(self.run, given) if given else self.run
        return run if self.steps is None else with_steps(run, self.steps)


@dataclass(frozen=True, kw_only=True)
class TuneArgs(Training, Seeded):
    """Train a model further on another text, from its weights, codebook and tokenizer: for 10
    minutes, unless --minutes or --steps say otherwise.
    """

    parent: Annotated[Path, tyro.conf.arg(name="from", metavar="MODEL")]
    """Run directory, shipped model or hf:OWNER/NAME."""
    lr: Number = None
    """Peak learning rate; if left out, half of the model's own."""


@dataclass(frozen=True, kw_only=True)
class ResumeArgs(Json, OnDevice):
    """Continue a stopped run; or one that is to be longer, from before its learning rate fell."""

    resume: Annotated[Path, arg("DIR")]
    """Run directory to continue."""
    steps: Integer = None
    """Optimiser steps in all, more than the run has had."""
    minutes: Annotated[Positive | None, arg("FLOAT")] = None
    """Time of the whole run, more than it has had, instead."""


def read(argv: list[str]) -> Args | TuneArgs | ResumeArgs:
    """The words after `tarflowlm train`: PRESET, --from MODEL or --resume DIR, and options.

    Help ends the process.
    """
    if argv[:1] in (["-h"], ["--help"]):
        rows = [(name, one.help) for name, one in PRESETS.items()]
        print_table(USAGE, rows)
        raise SystemExit
    given = {word.partition("=")[0].replace("_", "-") for word in argv}
    for short, long in (*SHORT.items(), ("steps", "train.minutes")):
        if {flag(short), flag(long)} <= given:
            raise UserError(f"{flag(short)} with {flag(long)}: leave one of them out")
    if argv and not argv[0].startswith("-"):
        if "--from" in given:
            remedy = "the model brings its own shape; leave the preset out"
            raise UserError(f"{argv[0]} with --from: {remedy}")
        run, others = _with_couplings(preset(argv[0]), argv[1:])
        args: Args | TuneArgs = parse(
            Args,
            others,
            f"tarflowlm train {argv[0]}",
            default=Args(run=run),
            # some fields are true by default, so every flag --x has its --no-x; some take None
            config=(tyro.conf.AvoidSubcommands,),
        )
    elif "--from" in given:
        args = parse(TuneArgs, argv, "tarflowlm train --from MODEL")
        if args.data is None:
            raise UserError("--data is missing: name the text to train on, say --data novel.txt")
    elif "--resume" in given:
        more = sorted(given & {flag(name) for name in ("data", "out", "seed")})
        if more:
            rule = "a run keeps its own; --from trains its model on another text"
            raise UserError(f"{more[0]} with --resume: {rule}, with --data and --out")
        return parse(ResumeArgs, argv, "tarflowlm train --resume DIR")
    else:
        raise UserError(
            f"train needs a preset (on a CPU {', '.join(FOR_CPU)}; `tarflowlm train --help` "
            "describes all), --from MODEL or --resume DIR"
        )
    if args.out is None:
        raise UserError("--out is missing: name the directory to write, say --out runs/mine")
    return args


def _with_couplings(run: RunConfig, argv: list[str]) -> tuple[RunConfig, list[str]]:
    """The run with the couplings, and so the options, that the words give blocks; and other words.

    The run is not checked, because it may be right only with those options.
    """
    words = iter(argv)
    others: list[str] = []
    blocks = list(getattr(run.model, "blocks", ()))
    for word in words:
        match = re.fullmatch(r"--model\.blocks\.(\d+)\.coupling(?:=(.*))?", word)
        if match is None or int(match[1]) >= len(blocks):
            others.append(word)
            continue
        index = int(match[1])
        coupling = next(words, "") if match[2] is None else match[2]
        options = {BlockConfig.KEY: coupling, "layers": blocks[index].layers}
        blocks[index] = from_dict(BlockConfig, options, f"model.blocks.{index}")
    if blocks:
        run = run.unchecked(model=run.model.unchecked(blocks=tuple(blocks)))
    return run, others


def run(args: Args | TuneArgs | ResumeArgs) -> None:
    from tarflowlm.evaluation.likelihood import in_bits
    from tarflowlm.processes import launched
    from tarflowlm.runs.checkpoint import import_words
    from tarflowlm.training.configure import tuning
    from tarflowlm.training.extend import extend
    from tarflowlm.training.train import train

    out = args.resume if isinstance(args, ResumeArgs) else args.out
    assert out is not None
    config = args.configured() if isinstance(args, Args) else None
    parent = None
    with launched(args.device) as processes, Bars(keep=True) as bars:
        if processes.world > 1:
            gc.disable()  # `train` collects, so that no process holds up the others
        if isinstance(args, TuneArgs):
            with processes.first_alone():
                parent = load_checkpoint(args.parent, "cpu")
            assert args.data is not None
            config = tuning(
                parent,
                args.data,
                minutes=args.minutes,
                steps=args.steps,
                seed=args.seed,
                lr=args.lr,
                unwrap=args.unwrap,
            )
        if isinstance(args, ResumeArgs) and processes.first:
            extend(out, steps=args.steps, minutes=args.minutes)
        processes.from_first(None)
        summary = train(
            config,
            out,
            device=processes.device,
            reporter=bars,
            processes=processes,
            stop_requests=stop_on_signals,
            parent=parent,
        )
    if not processes.first:
        return
    test = summary["test"]
    trunk = f"{summary['trunk_parameters']:,} of them in Transformers"
    rows = [
        ("test", f"{in_bits(test['bound'], test)} ({test['bound']}, {test['tokens']:,} tokens)"),
        ("stages, valid", ", ".join(f"{bpc:.4f}" for bpc in summary["stage_valid_bpc"])),
        ("trained", f"{summary['tokens']:,} tokens in {summary['seconds']:,.0f} s"),
        ("parameters", f"{summary['parameters']:,}, {trunk}"),
    ]
    print_result(args.json, summary, summary["preset"], rows)
    suggest("sample", out, *import_words(out))
