"""`tarflowlm sample`: text from a trained model."""

import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import zip_longest
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
    "interactive": ("num", "prompts", "template", "out", "json", "passes", "states"),
    "stream": ("json", "passes", "particles"),
    "prompts": ("prompt", "template"),
    "stop": ("template", "passes", "states"),
}
"""Options that contradict each other."""
NEEDED = {
    "states": ("json", "out"),
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
    window slides: its last half is the next prompt, exact for the baseline and one block, an
    approximation for more.
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
    states: options.Flag = False  # With --json or --out: the latents after every block as well.
    stop: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], arg("TEXT")] = ()
    """End a sample before this text, once it follows the prompt. May be given several times."""
    stream: options.Flag = False  # Show the text while it is written, one sample after the other.
    out: Annotated[Path | None, arg("FILE")] = None
    """New file for the samples, one JSON object per line, written as they are finished."""
    # Read prompts at the terminal and continue each; /help there lists commands.
    interactive: options.Flag = False
    normalize: options.Normalize = None
    device: options.Device = "auto"
    json: options.PrintJson = False

    def __post_init__(self) -> None:
        options.check(self, exclusive=EXCLUSIVE, needed=NEEDED)

    def writing(self, prompts: tuple[str, ...]) -> "Writing":
        """The request."""
        from tarflowlm.texts import Writing

        return Writing(
            prompts=prompts,
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
    from tarflowlm.cli.interactive import converse
    from tarflowlm.cli.signals import handled
    from tarflowlm.files import new_lines
    from tarflowlm.terminal.bars import print_notice

    # numbers are checked before the model is loaded
    writing = args.writing(() if args.prompt is None else (args.prompt,))
    lines = [] if args.prompts is None else _lines(args.prompts)
    lm = options.load_checkpoint(args.directory, args.device)
    if args.interactive:
        converse(lm, writing, args.prompt)
        return
    if lines:
        for number, line in lines:
            _check_prompt(writing, lm, line, f"line {number} of {args.prompts}")
        writing = replace(writing, prompts=tuple(line for _, line in lines))
    draft = writing.read(lm)
    _check_passes(args, draft)
    if draft.follows_loosely:
        print_notice("this model follows given text loosely: --particles 64 weighs 64 candidates")
    for notice in draft.notices:
        print_notice(notice)
    # SIGTERM raises KeyboardInterrupt, as SIGINT does
    interrupts = handled({signal.SIGTERM: signal.default_int_handler})
    with interrupts, nullcontext() if args.out is None else new_lines(args.out) as out:
        _Samples(args, draft, out).write()


def _lines(source: str) -> list[tuple[int, str]]:
    """The prompts of a file, with the numbers of their lines."""
    lines = options.read_source(source).split("\n")
    found = [(n, line.removesuffix("\r")) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"prompts {source}: holds no prompt; write one per line")
    return found


def _check_prompt(writing: "Writing", lm: "Checkpoint", prompt: str, where: str) -> None:
    """UserError, which names the line, for a prompt that cannot be read or fills the length."""
    try:
        draft = replace(writing, prompts=(prompt,)).read(lm)
        count = len(draft.given[0].tokens)
        if count >= draft.num_tokens:
            raise UserError(f"{count} tokens leave no room in {draft.num_tokens}: raise --length")
    except UserError as error:
        error.args = (f"{where}: {error}",)
        raise


def _check_passes(args: Args, draft: "Draft") -> None:
    """UserError where there are no passes or states to show."""
    model, context = draft.lm.model, draft.lm.model.config.context
    if (args.passes or args.states) and (model.is_exact or draft.num_tokens > context):
        flag = "passes" if args.passes else "states"
        what = "this is a baseline" if model.is_exact else f"length {draft.num_tokens} is more"
        raise UserError(
            f"--{flag} needs a flow, and at most its context of {context} tokens: {what}"
        )


class _Samples:
    """Samples as they are finished: printed, kept for --json, or written to a file."""

    def __init__(self, args: Args, draft: "Draft", out: TextIO | None) -> None:
        self.args, self.draft, self.out = args, draft, out
        self.objects: list[dict[str, object]] = []
        self.sweeps: list[int] = []
        self.decoders: tuple[Decoder, ...] = ()
        self.done = 0
        self.num_tokens = 0

    def write(self) -> None:
        """Write all samples. An interrupt keeps those that are finished, and tells their number."""
        from tarflowlm.terminal.bars import Bars

        start = time.perf_counter()
        interrupt = None
        try:
            if self.args.stream:
                for row in range(self.draft.total):
                    self._add(self._stream(row))
            else:
                with Bars("sampling, positions", self.draft.num_positions) as bars:
                    for written in self.draft.batches(bars):
                        # rich would print below a running bar, on stderr
                        bars.close()
                        self._add(written)
        except KeyboardInterrupt:
            where = f" and kept in {self.args.out}" if self.out is not None and self.done else ""
            total = self.draft.total
            interrupt = KeyboardInterrupt(f"{self.done} of {total} samples are finished{where}")
        self._conclude(time.perf_counter() - start, interrupted=interrupt is not None)
        if interrupt is not None:
            raise interrupt

    def _stream(self, row: int) -> "Written":
        """One sample, shown while it is written."""
        from tarflowlm.terminal.texts import write_out

        if self.draft.total > 1:
            write_out("\n" * (row > 0) + f"sample {row + 1}\n")
        pieces = self.draft.pieces(row, decoder=self.decoders or None)
        try:
            while True:
                write_out(next(pieces))
        except StopIteration as end:
            written: Written = end.value
            return written
        finally:
            write_out("\n")

    def _add(self, written: "Written") -> None:
        """Print, write or keep the samples of a batch."""
        from tarflowlm.terminal.bars import json_line
        from tarflowlm.terminal.texts import print_samples, samples_to_json

        args, draft, generation = self.args, self.draft, written.generation
        tokenizer = draft.lm.tokenizer
        if self.out is not None or args.json:
            objects = samples_to_json(written, tokenizer, passes=args.passes, states=args.states)
            for row, one in zip(written.rows, objects, strict=True):
                given: dict[str, object] = {}
                if args.template is not None:
                    given = {"template": args.template}
                elif draft.given:
                    given = {"prompt": tokenizer.decode(draft.prompt(row).tolist())}
                if self.out is None:
                    self.objects.append(given | one)
                else:
                    self.out.write(json_line({"index": row, "seed": args.seed} | given | one))
        elif not args.stream:
            tau = draft.temperature
            print_samples(
                written,
                tokenizer,
                candidates=draft.particles,
                passes=args.passes,
                about="" if tau == 1.0 else f", temperature {tau:g}",
            )
        self.decoders = generation.decoders or self.decoders
        self.sweeps = [a + b for a, b in zip_longest(self.sweeps, generation.sweeps, fillvalue=0)]
        self.num_tokens += generation.tokens.numel()
        self.done += len(written.rows)

    def _conclude(self, seconds: float, *, interrupted: bool) -> None:
        """The object of --json, or the number of samples in the file."""
        from tarflowlm.terminal.bars import counted, print_json

        if self.args.json:
            result: dict[str, object] = {"samples": self.objects}
            if self.out is not None:
                result = {"out": str(self.args.out), "written": self.done}
            result |= {
                "sweeps": self.sweeps,
                "decoders": self.decoders,
                "seconds": seconds,
                "tokens_per_second": self.num_tokens / seconds,
            }
            print_json(result | ({"interrupted": True} if interrupted else {}))
        elif self.out is not None and not interrupted:
            sys.stdout.write(f"{counted(self.done, 'sample')} in {self.args.out}\n")
