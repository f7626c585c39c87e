"""`tarflowlm sample`: text from a trained model."""

import io
import itertools
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import tyro

from tarflowlm.cli import options
from tarflowlm.cli.options import arg
from tarflowlm.config import Decoder
from tarflowlm.errors import UserError
from tarflowlm.parts import WHOLE, share

if TYPE_CHECKING:
    from tarflowlm.runs.checkpoint import Checkpoint
    from tarflowlm.texts import Draft, Writing, Written

EXCLUSIVE = {
    "interactive": ("prompt", "prompts", "template", "out", "part", "json", "passes"),
    "stream": ("out", "part", "json", "passes", "particles", "without", "contains"),
    "contains": ("template",),
    "prompts": ("prompt", "template"),
    "stop": ("template", "passes"),
    "no_stop": ("template",),
}
"""Options that contradict each other."""
NEEDED = {
    "blank": ("template",),
    "particles": ("prompt", "prompts", "template", "interactive", "without", "contains"),
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
    space before it. [...] stands for 1 to 8 tokens, [...12] for 1 to 12.
    """
    blank: Annotated[str, arg("CHARACTER")] = "_"  # Character that marks a blank in the template.
    without: Annotated[str, arg("LETTERS")] = ""
    """Write nothing with these letters, small or capital. Given text may have them."""
    contains: options.Text = None
    """Words that follow the prompt somewhere; the first one begins there."""
    particles: options.Count = None
    """Candidates per sample, weighted by the likelihood of the given tokens; exact in the limit of
    many. The default is 16 under a constraint and with text behind a blank, else 1.
    """
    seed: int = 0  # The same seed gives the same text.
    temperature: options.Temperature = None
    top_k: options.TopK = None
    top_p: options.TopP = None
    # Invert blocks position by position, in sweeps, or by the cheaper; or draw the last block.
    decoder: Decoder = "auto"
    passes: options.Flag = False  # Show the text decoded after every block.
    stop: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], arg("TEXT")] = ()
    """End a sample before this text, once it follows the prompt. May be given several times."""
    no_stop: options.Flag = False  # Go on behind the end of a document, with the next one.
    stream: options.Flag = False  # Show the text while it is written, one sample after the other.
    out: Annotated[Path | None, arg("FILE")] = None
    """New file for the samples, one JSON object per line, written as they are finished."""
    part: options.Part = WHOLE
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
            without=self.without,
            contains=self.contains,
            num=self.num,
            num_tokens=self.length,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            particles=self.particles,
            decoder=self.decoder,
            stop=self.stop,
            stop_at_end=not self.no_stop,
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
        writing = replace(writing, prompts=_read_prompts(args.prompts, writing, lm))
    draft = replace(writing.read(lm), part=args.part, is_whole=args.passes)
    context = lm.model.config.context
    if args.passes and (lm.model.is_exact or draft.num_written > context):
        what = "this is a baseline" if lm.model.is_exact else f"length {draft.num_tokens} is more"
        raise UserError(f"--passes needs a flow, and at most its context of {context}: {what}")
    if draft.follows_loosely:
        print_notice("this model follows given text loosely: --particles 64 weighs 64 candidates")
    for notice in draft.notices:
        print_notice(notice)
    if args.stream:
        _stream(draft)
        return
    # SIGTERM raises KeyboardInterrupt, as SIGINT does
    interrupts = handled({signal.SIGTERM: signal.default_int_handler})
    with interrupts, nullcontext() if args.out is None else new_lines(args.out) as out:
        _write(args, draft, out)


def _read_prompts(source: str, writing: "Writing", lm: "Checkpoint") -> tuple[str, ...]:
    """The prompts of a file. UserError, which names the line, for one that cannot be continued."""
    prompts = []
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
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"prompts {source}: holds no prompt; write one per line")
    return tuple(prompts)


def _stream(draft: "Draft") -> None:
    """Show each sample while it is written."""
    from tarflowlm.terminal.texts import write_out

    for row in range(draft.total):
        if draft.total > 1:
            write_out(f"sample {row + 1}\n")
        for piece in draft.pieces(row):
            write_out(piece)
        write_out("\n")


def _converse(lm: "Checkpoint", writing: "Writing") -> None:
    """Continue every line of the terminal until its end; a mistake costs its line.

    An empty line continues the one before with other noise.
    """
    from tarflowlm.terminal.bars import print_notice

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
        try:
            draft = replace(writing, prompts=(prompt,) if prompt else (), seed=seed).read(lm)
            for notice in draft.notices:
                print_notice(notice)
            _stream(draft)
        except UserError as error:
            print_notice(f"tarflowlm: {error}")
        except KeyboardInterrupt:
            print_notice("")


def _write(args: Args, draft: "Draft", out: TextIO | None) -> None:
    """Write all samples. An interrupt keeps those that are finished, and tells their number."""
    from tarflowlm.terminal.bars import Bars, counted, json_line, print_json
    from tarflowlm.terminal.texts import print_samples

    start = time.perf_counter()
    samples: list[dict[str, object]] = []
    done = 0
    interrupt = None
    try:
        with Bars("sampling, positions", draft.num_positions) as bars:
            for written in draft.batches(bars):
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
        wanted = len(share(args.part, draft.total))
        interrupt = KeyboardInterrupt(f"{done} of {wanted} samples are finished{where}")
    if args.json:
        found: dict[str, object] = {"samples": samples}
        if out is not None:
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
        sample |= {"index": row, "seed": args.seed}
        if args.template is not None:
            sample["template"] = args.template
        elif draft.request.prompts:
            sample["prompt"] = tokenizer.decode(draft.prompt(row).tolist())
    return samples
