"""`tarflowlm score`: the bits of every token of a text, under one model or two."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tarflowlm.cli import options
from tarflowlm.cli.options import arg
from tarflowlm.errors import UserError

# bits below which a token has a colour
LEVELS = ((1.0, ""), (2.0, "green"), (4.0, "yellow"), (8.0, "magenta"), (math.inf, "bold red"))


@dataclass(frozen=True)
class Args:
    """Show the bits of every token of a text, and of the whole text, under one model or two."""

    directory: options.Model = None
    model: options.ModelName = None
    text: options.Text = None  # The text to score.
    file: options.File = None  # A file with the text, or - for standard input, in place of --text.
    baseline: Annotated[Path | None, arg("MODEL")] = None
    """A second model to score the same text with: run directory, or the name of a model of the
    package.
    """
    samples: int = 8  # Posterior samples averaged in the bound of a flow; the baseline is exact.
    normalize: options.Normalize = None
    seed: int = 0  # Seed of the posterior samples.
    device: options.Device = "auto"
    json: options.PrintJson = False

    def __post_init__(self) -> None:
        if (self.text is None) == (self.file is None):
            raise UserError(
                "give the text to score: either --text TEXT, or --file FILE (- for standard input)"
            )
        options.check(self, ("samples",))


def run(args: Args) -> None:
    from tarflowlm.data.prompts import read
    from tarflowlm.evaluation.likelihood import sign_of
    from tarflowlm.evaluation.scores import score
    from tarflowlm.runs.hub import choose_directory
    from tarflowlm.terminal.bars import Bars, print_json, print_notice, print_table

    names = [
        choose_directory(args.directory, args.model),
        *([args.baseline] if args.baseline is not None else []),
    ]
    # all before the first is used, so that a missing model costs no time
    checkpoints = [options.load_checkpoint(name, args.device) for name in names]
    text = args.text if args.text is not None else options.read_source(str(args.file))
    found: list[dict[str, Any]] = []
    for name, checkpoint in zip(names, checkpoints, strict=True):
        reading = read(checkpoint.tokenizer, text, normalize=args.normalize)
        if args.text is not None and reading.notice:
            print_notice(f"{name.name}: {reading.notice}")
        with Bars(f"scoring with {name.name}, windows") as bars:
            scores = score(
                checkpoint.model,
                reading.tokens,
                samples=args.samples,
                seed=args.seed,
                progress=bars,
            )
        symbols = [checkpoint.tokenizer.symbols[i] for i in reading.tokens.tolist()]
        tokens = [
            {"text": symbol, "bits": bits}
            for symbol, bits in zip(symbols, scores.bits.tolist(), strict=True)
        ]
        if scores.blocks is not None:
            for token, column in zip(tokens, scores.blocks.T.tolist(), strict=True):
                token["log2_dets"] = column
        bound, samples = ("exact", 1) if scores.exact else ("elbo", args.samples)
        count = len(reading.text)
        record: dict[str, Any] = {
            "model": name.name,
            "bound": bound,
            "samples": samples,
            "bpc": scores.total / count,
        }
        record |= {
            "bits": scores.total,
            "bits_per_token": scores.per_token,
            "characters": count,
            "tokens": tokens,
        }
        found.append(record)
    if args.json:
        print_json(found[0] | ({"baseline": found[1]} if len(found) > 1 else {}))
        return
    _print_tokens(found)
    signed = {
        "bits per character": ("bpc", 4),
        "bits per token": ("bits_per_token", 4),
        "bits in all": ("bits", 2),
    }
    rows = []
    for label, (key, digits) in signed.items():
        rows.append([label, *(f"{sign_of(one['bound'])} {one[key]:.{digits}f}" for one in found)])
    rows.append(["characters", *(f"{one['characters']:,}" for one in found)])
    rows.append(["tokens", *(f"{len(one['tokens']):,}" for one in found)])
    draws = ("none" if one["bound"] == "exact" else f"{one['samples']:,}" for one in found)
    rows.append(["posterior samples", *draws])
    print_table("score", rows, ["", *(one["model"] for one in found)])


def _print_tokens(found: list[dict[str, Any]]) -> None:
    """The text in colours on a terminal. Elsewhere a line per token, with its bits under every
    model.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        texts = [[token["text"] for token in one["tokens"]] for one in found]
        # one model after the other if their tokens differ
        for group in [found] if texts[0] == texts[-1] else [[one] for one in found]:
            sys.stdout.write("\t".join(["", *(one["model"] for one in group)]) + "\n")
            for same in zip(*(one["tokens"] for one in group), strict=True):
                sys.stdout.write(
                    "\t".join([same[0]["text"], *(f"{token['bits']:.3f}" for token in same)]) + "\n"
                )
        return
    for one in found:
        console.print(Text(one["model"], style="bold"), soft_wrap=True)
        line = Text()
        for token in one["tokens"]:
            style = next(style for below, style in LEVELS if token["bits"] < below)
            # a space has no colour of its own
            line.append(
                token["text"],
                f"{style} underline" if style and not token["text"].strip() else style,
            )
        console.print(line)
    legend = Text("bits per token: ", style="dim")
    for below, style in LEVELS:
        legend.append(
            "more" if math.isinf(below) else f"below {below:g}", style=style or "default"
        ).append("  ")
    console.print(legend)
