"""`tarflowlm sample`: text from a trained model."""

import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import tyro

from tarflowlm import options
from tarflowlm.errors import UserError, counted
from tarflowlm.options import arg
from tarflowlm.texts.requests import Writing

if TYPE_CHECKING:
    from tarflowlm.processes import Processes
    from tarflowlm.runs.checkpoint import Checkpoint
    from tarflowlm.texts.writing import Draft, Written

EXCLUSIVE = {
    "stream": ("out", "json", "passes", "particles", "without", "contains"),
    "prompts": ("prompt", "template"),
    "stop": ("passes",),
    "stop_at_end": ("template",),
}
"""Options that contradict each other."""
NEEDED = {
    "blank": ("template",),
    "particles": ("prompt", "prompts", "template", "without", "contains"),
}
"""Without one of these, an option has no effect."""


@dataclass(frozen=True)
class Args:
    """Generate text from a trained model."""

    directory: options.Model = None
    writing: Annotated[Writing, tyro.conf.arg(name="")] = field(default_factory=Writing)
    prompts: options.File = None
    """File with one prompt per line, or - for standard input; --num samples of each. Empty lines
    are skipped.
    """
    passes: options.Flag = False  # Show the text decoded after every block.
    stream: options.Flag = False  # Show the text while it is written, one sample after the other.
    out: Annotated[Path | None, arg("FILE")] = None
    """New file for the samples, one JSON object per line, written as they are finished."""
    device: options.Device = "auto"
    json: options.PrintJson = False

    def __post_init__(self) -> None:
        options.check(self, self.writing, exclusive=EXCLUSIVE, needed=NEEDED)


def run(args: Args) -> None:
    from tarflowlm.cli.signals import handled
    from tarflowlm.files import new_lines
    from tarflowlm.processes import LONG, launched
    from tarflowlm.terminal.texts import write_out

    with launched(args.device, LONG) as processes:
        draft = _draft(args, processes)
        if args.stream:
            for row in range(draft.total):
                if draft.total > 1:
                    write_out(f"sample {row + 1}\n")
                for piece in draft.pieces(row):
                    write_out(piece)
                write_out("\n")
            return
        # SIGTERM raises KeyboardInterrupt, as SIGINT does
        interrupts = handled({signal.SIGTERM: signal.default_int_handler})
        path = args.out if processes.first else None
        with interrupts, nullcontext() if path is None else new_lines(path) as out:
            _write(args, draft, out)


def _draft(args: Args, processes: "Processes") -> "Draft":
    """What the command asks for, as the model reads it."""
    from tarflowlm.terminal.bars import print_notice
    from tarflowlm.texts.writing import Draft

    writing = args.writing
    with processes.first_alone():  # it may have to be downloaded
        lm = options.load_checkpoint(args.directory, processes.device)
    if args.prompts is not None:
        writing = replace(writing, prompt=_read_prompts(args.prompts, writing, lm))
    draft = replace(Draft.of(writing, lm), processes=processes, is_whole=args.passes)
    context = lm.model.config.context
    if args.passes and (lm.model.is_exact or draft.num_written > context):
        what = "this is a baseline" if lm.model.is_exact else f"length {draft.num_tokens} is more"
        raise UserError(f"--passes needs a flow, and at most its context of {context}: {what}")
    if draft.follows_loosely:
        print_notice("this model follows given text loosely: --particles 64 weighs 64 candidates")
    for notice in draft.notices:
        print_notice(notice)
    return draft


def _read_prompts(source: str, writing: Writing, lm: "Checkpoint") -> tuple[str, ...]:
    """The prompts of a file. UserError, which names the line, for one that cannot be continued."""
    from tarflowlm.texts.writing import Draft

    prompts = []
    for number, prompt in options.read_lines(source):
        try:
            Draft.of(replace(writing, prompt=prompt), lm)
        except UserError as error:
            error.args = (f"line {number} of {source}: {error}",)
            raise
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"prompts {source}: holds no prompt; write one per line")
    return tuple(prompts)


def _write(args: Args, draft: "Draft", out: TextIO | None) -> None:
    """Write all samples. An interrupt keeps those that are finished, and tells their number."""
    from tarflowlm.terminal.bars import Bars, json_line, print_json
    from tarflowlm.terminal.texts import print_samples

    start = time.perf_counter()
    samples: list[dict[str, object]] = []
    done = 0
    interrupt = None
    try:
        with Bars("sampling, positions", draft.num_positions) as bars:
            for written in draft.processes.in_turn(draft.batches(bars)):
                # rich would print below a running bar, on stderr
                bars.close()
                if out is not None:
                    out.writelines(map(json_line, _objects(args, draft, written)))
                elif args.json:
                    samples += _objects(args, draft, written)
                else:
                    print_samples(
                        written,
                        draft.lm.tokenizer,
                        candidates=draft.particles,
                        passes=args.passes,
                    )
                done += len(written.rows)
    except KeyboardInterrupt:
        where = f" and kept in {args.out}" if out is not None and done else ""
        interrupt = KeyboardInterrupt(f"{done} of {draft.total} samples are finished{where}")
    if args.json:
        found: dict[str, object] = {"samples": samples}
        if args.out is not None:
            found = {"out": str(args.out), "written": done}
        found["seconds"] = time.perf_counter() - start
        found["interrupted"] = interrupt is not None
        print_json(found)
    elif out is not None and interrupt is None:
        sys.stdout.write(f"{counted(done, 'sample')} in {args.out}\n")
    if interrupt is not None:
        raise interrupt


def _objects(args: Args, draft: "Draft", written: "Written") -> list[dict[str, object]]:
    """The samples of a batch for JSON, each with its number and the text that it was given."""
    from tarflowlm.terminal.texts import samples_to_json

    tokenizer = draft.lm.tokenizer
    samples = samples_to_json(written, tokenizer, passes=args.passes)
    for row, sample in zip(written.rows, samples, strict=True):
        sample |= {"index": row, "seed": args.writing.seed}
        if draft.request.template is not None:
            sample["template"] = draft.request.template
        elif draft.request.prompt is not None:
            sample["prompt"] = tokenizer.decode(draft.prompt(row).tolist())
    return samples
