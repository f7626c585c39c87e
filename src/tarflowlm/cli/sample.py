"""`tarflowlm sample`: text from a trained model."""

import signal
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from tarflowlm.cli import options
from tarflowlm.cli.options import arg
from tarflowlm.config import Decoder

EXCLUSIVE = {  # options that contradict each other
    "interactive": ("num", "prompts", "template", "out", "json", "passes", "states"),
    "stream": ("json", "passes", "particles"),
    "prompts": ("prompt", "template"),
    "stop": ("template", "passes", "states"),
}
GIVEN = ("prompt", "prompts", "template", "interactive")
NEEDED = {
    "states": ("json", "out"),
    "blank": ("template",),
    "particles": GIVEN,
}  # without one of these, no effect


@dataclass(frozen=True)
class Args:
    """Generate text from a trained model."""

    directory: options.Model = None
    model: options.ModelName = None
    num: int = 1  # Number of samples.
    length: options.Count = None
    """Tokens per sample, including the prompt; the default is the trained context. Beyond that the
    window slides: its last half is the next prompt, exact for the baseline and one block, an
    approximation for more.
    """
    prompt: options.Text = (
        None  # Text to continue. Exact for one block; an approximation for more, see --particles.
    )
    prompts: options.File = None
    """File with one prompt per line, or - for standard input; --num samples of each. Empty lines
    are skipped.
    """
    template: options.Text = None
    """Text with a blank for every token to fill in: "the ____ of ____". A BPE token brings the
    space before it.
    """
    blank: Annotated[str, arg("CHARACTER")] = "_"  # Character that marks a blank in the template.
    particles: int = 1
    """Candidates per sample, weighted by the likelihood of the given tokens; exact in the limit of
    many.
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
    interactive: options.Flag = (
        False  # Read prompts at the terminal and continue each; /help there lists commands.
    )
    normalize: options.Normalize = None
    device: options.Device = "auto"
    json: options.PrintJson = False

    def __post_init__(self) -> None:
        options.check(self, ("num", "length"), EXCLUSIVE, NEEDED)

    def writing(self) -> dict[str, Any]:
        """Options that `generate` takes as they are."""
        return {
            name: getattr(self, name) for name in ("particles", "temperature", "top_k", "top_p")
        }


def run(args: Args) -> None:
    from tarflowlm.checks import checked_seed
    from tarflowlm.cli.interactive import converse
    from tarflowlm.cli.main import handled
    from tarflowlm.cli.sampling import Sampling
    from tarflowlm.files import NewLines
    from tarflowlm.runs.hub import choose_directory

    checkpoint = options.load_checkpoint(choose_directory(args.directory, args.model), args.device)
    checked_seed(args.seed)
    if args.temperature is None:
        args = replace(args, temperature=checkpoint.run.temperature)
    if args.interactive:
        converse(checkpoint.model, checkpoint.tokenizer, args)
        return
    sampling = Sampling(checkpoint.model, checkpoint.tokenizer, args)
    # SIGTERM raises KeyboardInterrupt, as SIGINT does
    interrupts = handled({signal.SIGTERM: signal.default_int_handler})
    with interrupts, nullcontext() if args.out is None else NewLines(args.out) as out:
        sampling.run(out)
