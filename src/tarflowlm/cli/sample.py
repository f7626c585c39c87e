"""`tarflowlm sample`: text from a trained model."""

import io
import itertools
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import tyro

from tarflowlm.cli import options
from tarflowlm.cli.options import arg
from tarflowlm.config import Decoder
from tarflowlm.errors import UserError

if TYPE_CHECKING:
    from tarflowlm.runs.checkpoint import Checkpoint
    from tarflowlm.texts import Draft, Writing, Written

EXCLUSIVE = {
    "interactive": ("num", "prompt", "prompts", "template", "out", "json", "passes"),
    "stream": ("json", "passes", "particles"),
    "prompts": ("prompt", "template"),
    "stop": ("template", "passes"),
}
"""Options that contradict each other."""
NEEDED = {
    "blank": ("template",),
    "particles": ("prompt", "prompts", "template", "interactive"),
}
"""Without one of these, an option has no effect."""


@dataclass(frozen=True)
class Args:
    """Generate text from a trained model."""

    directory: options.Model = None
    num: int = 1  # Number of samples.
    length: options.Count = None
    """Tokens per sample, including the prompt; the default is the trained context. Beyond that the
    window slides: its last half is the next prompt.
    """
    prompt: options.Text = None
    """Text to continue. Exact for one block; an approximation for more, see --particles."""
    prompts: options.File = None
    """File with one prompt per line, or - for standard input; --num samples of each. Empty lines
    are skipped.
    """
    template: options.Text = None
    """Text with a blank for every token to fill in: "the ____ of ____". A BPE token brings the
    space before it.
    """
    blank: Annotated[str, arg("CHARACTER")] = "_"  # Character that marks a blank in the template.
    particles: options.Count = None
    """Candidates per sample, weighted by the likelihood of the given tokens; exact in the limit of
    many. The default is 16 for a template with text behind a blank, else 1.
    """
    seed: int = 0  # The same seed gives the same text.
    temperature: Annotated[
        float | None, arg("FLOAT", f"By default the model's own: {options.TEMPERATURE}")
    ] = None
    top_k: Annotated[int | None, arg("INT", options.TOP_K.capitalize())] = None
    top_p: Annotated[float | None, arg("FLOAT", options.TOP_P.capitalize())] = None
    # Invert blocks position by position, in parallel sweeps, or by the cheaper of the two.
    decoder: Decoder = "auto"
    passes: options.Flag = False  # Show the text decoded after every block.
    stop: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], arg("TEXT")] = ()
    """End a sample before this text, once it follows the prompt. May be given several times."""
    stream: options.Flag = False  # Show the text while it is written, one sample after the other.
    out: Annotated[Path | None, arg("FILE")] = None
    """New file for the samples, one JSON object per line, written as they are finished."""
    # Read prompts at the terminal and continue each; an empty line writes another continuation.
    interactive: options.Flag = False
    normalize: options.Normalize = None
    device: options.Device = "auto"
    json: options.PrintJson = False

    def __post_init__(self) -> None:
        options.check(self, exclusive=EXCLUSIVE, needed=NEEDED)

    def writing(self) -> "Writing":
        """The request; the prompts of a file are read later."""
        from tarflowlm.texts import Writing

        return Writing(
            prompts=() if self.prompt is None else (self.prompt,),
            template=self.template,
            blank=self.blank,
            num=self.num,
            num_tokens=self.length,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            particles=self.particles,
            decoder=self.decoder,
            stop=self.stop,
            seed=self.seed,
            normalize=self.normalize,
        )


def run(args: Args) -> None:
    from tarflowlm.cli.signals import handled
    from tarflowlm.files import new_lines
    from tarflowlm.terminal.bars import print_notice

    # numbers are checked before the model is loaded
    writing = args.writing()
    lm = options.load_checkpoint(args.directory, args.device)
    if args.interactive:
        _converse(lm, writing)
        return
    if args.prompts is not None:
        writing = replace(writing, prompts=tuple(_read_prompts(args.prompts, writing, lm)))
    draft = writing.read(lm)
    context = lm.model.config.context
    if args.passes and (lm.model.is_exact or draft.num_tokens > context):
        what = "this is a baseline" if lm.model.is_exact else f"length {draft.num_tokens} is more"
        raise UserError(f"--passes needs a flow, and at most its context of {context}: {what}")
    if draft.follows_loosely:
        print_notice("this model follows given text loosely: --particles 64 weighs 64 candidates")
    for notice in draft.notices:
        print_notice(notice)
    # SIGTERM raises KeyboardInterrupt, as SIGINT does
    interrupts = handled({signal.SIGTERM: signal.default_int_handler})
    with interrupts, nullcontext() if args.out is None else new_lines(args.out) as out:
        _Samples(args, draft, out).write()


def _read_prompts(source: str, writing: "Writing", lm: "Checkpoint") -> Iterator[str]:
    """The prompts of a file. UserError, which names the line, for one that cannot be continued."""
    is_empty = True
    for number, line in enumerate(options.read_source(source).split("\n"), 1):
        prompt = line.removesuffix("\r")
        if not prompt.strip():
            continue
        try:
            draft = replace(writing, prompts=(prompt,)).read(lm)
            count = len(draft.prompt(0))
            if count >= draft.num_tokens:
                remedy = "raise --length"
                raise UserError(f"{count} tokens leave no room in {draft.num_tokens}: {remedy}")
        except UserError as error:
            error.args = (f"line {number} of {source}: {error}",)
            raise
        is_empty = False
        yield prompt
    if is_empty:
        raise UserError(f"prompts {source}: holds no prompt; write one per line")


def _converse(lm: "Checkpoint", writing: "Writing") -> None:
    """Continue every line of the terminal until its end; a mistake costs its line.

    An empty line continues the one before with other noise.
    """
    from tarflowlm.terminal.bars import print_notice
    from tarflowlm.terminal.texts import write_out

    options.check_stdin()
    # so that a line that is not UTF-8 is a mistake as others are
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  (it lets `input` edit and repeat lines)
    prompt = ""
    for seed in itertools.count(writing.seed):
        try:
            prompt = input("> " if is_terminal else "") or prompt
        except EOFError:
            return
        request = replace(writing, prompts=(prompt,) if prompt else (), seed=seed)
        try:
            draft = request.read(lm)
            for notice in draft.notices:
                print_notice(notice)
            # Ctrl-C ends this text alone
            with suppress(KeyboardInterrupt):
                for piece in draft.pieces():
                    write_out(piece)
            write_out("\n")
        except UserError as error:
            print_notice(f"tarflowlm: {error}")


class _Samples:
    """Samples as they are finished: printed, kept for --json, or written to a file."""

    def __init__(self, args: Args, draft: "Draft", out: TextIO | None) -> None:
        self.args = args
        self.draft = draft
        self.out = out
        self.objects: list[dict[str, object]] = []
        self.sweeps: list[int] = []
        self.decoders: tuple[Decoder, ...] = ()
        self.done = 0
        self.num_tokens = 0

    def write(self) -> None:
        """Write all samples. An interrupt keeps those that are finished, and tells their number."""
        start = time.perf_counter()
        try:
            for written in self._streamed() if self.args.stream else self._in_batches():
                self._add(written)
        except KeyboardInterrupt:
            self._conclude(time.perf_counter() - start, interrupted=True)
            found = f"{self.done} of {self.draft.total} samples are finished"
            where = f" and kept in {self.args.out}" if self.out is not None and self.done else ""
            raise KeyboardInterrupt(found + where) from None
        self._conclude(time.perf_counter() - start)

    def _in_batches(self) -> "Iterator[Written]":
        from tarflowlm.terminal.bars import Bars

        with Bars("sampling, positions", self.draft.num_positions) as bars:
            for written in self.draft.batches(bars):
                # rich would print below a running bar, on stderr
                bars.close()
                yield written

    def _streamed(self) -> "Iterator[Written]":
        """Samples one by one, each shown while it is written."""
        from tarflowlm.terminal.texts import write_out

        for row in range(self.draft.total):
            if self.draft.total > 1:
                write_out("\n" * (row > 0) + f"sample {row + 1}\n")
            pieces = self.draft.pieces(row, decoder=self.decoders or None)
            try:
                while True:
                    write_out(next(pieces))
            except StopIteration as end:
                yield end.value
            finally:
                write_out("\n")

    def _add(self, written: "Written") -> None:
        """Print, write or keep the samples of a batch."""
        from tarflowlm.terminal.bars import json_line
        from tarflowlm.terminal.texts import print_samples, samples_to_json

        args, draft, generation = self.args, self.draft, written.generation
        tokenizer = draft.lm.tokenizer
        if args.json or self.out is not None:
            objects = samples_to_json(written, tokenizer, passes=args.passes)
            for row, sample in zip(written.rows, objects, strict=True):
                given: dict[str, object] = {}
                if args.template is not None:
                    given = {"template": args.template}
                elif draft.given:
                    given = {"prompt": tokenizer.decode(draft.prompt(row).tolist())}
                if self.out is None:
                    self.objects.append(given | sample)
                else:
                    self.out.write(json_line({"index": row, "seed": args.seed} | given | sample))
        elif not args.stream:
            print_samples(written, tokenizer, candidates=draft.particles, passes=args.passes)
        self.decoders = generation.decoders or self.decoders
        pairs = itertools.zip_longest(self.sweeps, generation.sweeps, fillvalue=0)
        self.sweeps = [sum(pair) for pair in pairs]
        self.num_tokens += generation.tokens.numel()
        self.done += len(written.rows)

    def _conclude(self, seconds: float, *, interrupted: bool = False) -> None:
        """The object of --json, or the number of samples in the file."""
        from tarflowlm.terminal.bars import counted, print_json

        if self.args.json:
            found: dict[str, object] = {
                "sweeps": self.sweeps,
                "decoders": self.decoders,
                "seconds": seconds,
                "tokens_per_second": self.num_tokens / seconds,
            }
            if self.out is None:
                found["samples"] = self.objects
            else:
                found |= {"out": str(self.args.out), "written": self.done}
            if interrupted:
                found["interrupted"] = True
            print_json(found)
        elif self.out is not None and not interrupted:
            sys.stdout.write(f"{counted(self.done, 'sample')} in {self.args.out}\n")
