"""`tarflowlm sample`: text from a trained model."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, TextIO

import tyro

from tarflowlm import compiled
from tarflowlm.cli.options import OfModel, check_lines, load_checkpoint, read_lines
from tarflowlm.cli.signals import handled, of_hang_up
from tarflowlm.errors import UserError, counted
from tarflowlm.files import json_line, new_lines
from tarflowlm.options import File, Flag, arg
from tarflowlm.requests import Writing
from tarflowlm.terminal.bars import Bars, print_json, print_notice

if TYPE_CHECKING:
    from tarflowlm.generation.texts import Samples, Written
    from tarflowlm.processes import Processes


@dataclass(frozen=True, kw_only=True)
class Args(OfModel):
    """Generate text from a trained model."""

    EXCLUSIVE: ClassVar = {
        "stream": ("out", "json", "passes", "particles", "without", "contains", "matches"),
        "prompts": ("prompt", "template"),
        "stop": ("passes",),
    }
    NEEDS: ClassVar = {
        "particles": ("prompt", "prompts", "template", "without", "contains", "matches")
    }

    writing: Annotated[Writing, tyro.conf.arg(name="", help="")] = field(default_factory=Writing)
    prompts: File = None
    """File with one prompt per line, or - for standard input; --num samples of each. Empty lines
    are skipped.
    """
    passes: Flag = False
    """Show the text decoded after every block."""
    stream: Flag = False
    """Show the text while it is written, one sample after the other."""
    out: Annotated[Path | None, arg("FILE")] = None
    """New file for the samples, one JSON object per line, each written once it is finished."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.writing.prompt == "":
            yield "writing.prompt", "give at least one character"


def run(args: Args) -> None:
    from tarflowlm.processes import LONG, launched
    from tarflowlm.terminal.texts import write_out

    with launched(args.device, LONG) as processes:
        samples = _samples(args, processes)
        if args.stream:
            for row in range(samples.total):
                if samples.total > 1:
                    write_out(f"sample {row + 1}\n")
                try:
                    for piece in samples.pieces(row):
                        write_out(piece)
                finally:
                    # also before the message of an interrupt
                    write_out("\n")
            return
        # the other signals raise KeyboardInterrupt, as SIGINT does
        raised = signal.default_int_handler
        interrupts = handled({signal.SIGTERM: raised} | of_hang_up(raised))
        path = args.out if processes.first else None
        with interrupts, nullcontext() if path is None else new_lines(path) as out:
            _write(args, samples, out)
        if sys.stderr.isatty() and out is None and not args.writing.seed:
            print_notice("seed 0; another text: --seed 1")
        if processes.world == 1 and sys.stderr.isatty():
            # for the next text; whoever pipes texts asked for no other process
            compiled.start()


def _samples(args: Args, processes: "Processes") -> "Samples":
    """The samples that the command asks for, with texts as the model reads them."""
    from tarflowlm.generation.requested import plans
    from tarflowlm.generation.texts import Samples

    writing = args.writing
    with processes.first_alone():  # it may have to be downloaded
        lm = load_checkpoint(args.directory, processes.device)
    if args.prompts is not None:
        lines = read_lines(args.prompts)
        if not lines:
            raise UserError(f"prompts {args.prompts}: holds no prompt; write one per line")
        prompts = check_lines(
            lines, args.prompts, lambda prompt: plans(replace(args.writing, prompt=prompt), lm)
        )
        writing = replace(writing, prompt=prompts)
    samples = Samples(writing, lm, past_end=args.passes, processes=processes)
    context = lm.model.config.context
    longest = max(samples.plans, key=lambda plan: plan.num_tokens)
    if args.passes and (lm.model.is_exact or longest.num_tokens > context):
        length = longest.num_tokens - longest.lead
        what = "this is a baseline" if lm.model.is_exact else f"length {length} is more"
        raise UserError(f"--passes needs a flow, and at most its context of {context}: {what}")
    if samples.follows_loosely:
        print_notice(
            "with one candidate this model mostly ignores the given text; try --particles 64"
        )
    if samples.num_tokens >= compiled.LONG and not compiled.is_installed():
        print_notice(compiled.MISSING)
    for notice in samples.notices:
        print_notice(notice)
    return samples


def _write(args: Args, samples: "Samples", out: TextIO | None) -> None:
    """Write all samples. An interrupt keeps the finished ones, and tells their number."""
    from tarflowlm.terminal.texts import print_samples

    start = time.perf_counter()
    objects: list[dict[str, object]] = []
    done = 0
    interrupt = None
    try:
        with Bars("sampling, tokens", samples.num_tokens) as bars:
            for written in samples.processes.in_turn(samples.batches(bars)):
                # rich would print below a running bar, on stderr
                bars.progress.stop()
                if out is not None:
                    out.writelines(map(json_line, _objects(args, samples, written)))
                elif args.json:
                    objects += _objects(args, samples, written)
                else:
                    print_samples(written, samples.lm, passes=args.passes)
                done += len(written.rows)
    except KeyboardInterrupt:
        where = f" and kept in {args.out}" if out is not None and done else ""
        interrupt = KeyboardInterrupt(f"{done} of {samples.total} samples are finished{where}")
    if args.json:
        found: dict[str, object] = {"samples": objects}
        if args.out is not None:
            found = {"out": str(args.out), "written": done}
        found["seconds"] = time.perf_counter() - start
        found["interrupted"] = interrupt is not None
        print_json(found)
    elif out is not None and interrupt is None:
        sys.stdout.write(f"{counted(done, 'sample')} in {args.out}\n")
    if interrupt is not None:
        raise interrupt


def _objects(args: Args, samples: "Samples", written: "Written") -> list[dict[str, object]]:
    """The samples of a batch for JSON, each with its number and the text that it was given."""
    from tarflowlm.terminal.texts import samples_to_json

    objects = samples_to_json(written, samples.lm, passes=args.passes)
    for row, one in zip(written.rows, objects, strict=True):
        one |= {"index": row, "seed": samples.request.seed}
        reading = samples.plan(row).reading
        if samples.request.template is not None:
            one["template"] = samples.request.template
        elif reading is not None:
            one["prompt"] = reading.text
    return objects
