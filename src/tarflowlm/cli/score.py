"""`tarflowlm score`: the bits of every token of a text, under one model or two."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tarflowlm.cli import options
from tarflowlm.cli.options import arg
from tarflowlm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from tarflowlm.texts import Scored

LEVELS = ((1.0, ""), (2.0, "green"), (4.0, "yellow"), (8.0, "magenta"), (math.inf, "bold red"))
"""Bits below which a token has a colour."""


@dataclass(frozen=True)
class Args:
    """Show the bits of every token of a text, and of the whole text, under one model or two."""

    directory: options.Model = None
    text: options.Text = None  # The text to score.
    file: options.File = None  # A file with the text, or - for standard input, instead of --text.
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


def run(args: Args) -> None:
    from tarflowlm.terminal.bars import Bars, print_json, print_notice
    from tarflowlm.texts import Score

    text = options.read_source(str(args.file)) if args.text is None else args.text
    request = Score(texts=(text,), samples=args.samples, seed=args.seed, normalize=args.normalize)
    # both before the first is used, so that a missing model costs no time
    models = [options.load_checkpoint(args.directory, args.device)]
    if args.baseline is not None:
        models.append(options.load_checkpoint(args.baseline, args.device))
    names = [lm.directory.name for lm in models]
    found: list[Scored] = []
    for name, lm in zip(names, models, strict=True):
        with Bars(f"scoring with {name}, windows") as bars:
            (scored,) = request.run(lm, bars)
        if scored.notice:
            print_notice(f"{name}: {scored.notice}")
        found.append(scored)
    if found[0].reading.text != found[-1].reading.text:
        print_notice(f"{' and '.join(names)} read different texts: their bits do not compare")
    if args.json:
        objects = [
            _to_json(name, one, args.samples) for name, one in zip(names, found, strict=True)
        ]
        print_json(objects[0] | ({"baseline": objects[1]} if len(objects) > 1 else {}))
    else:
        _print(names, found, args.samples)


def _to_json(name: str, scored: "Scored", samples: int) -> dict[str, object]:
    tokens: list[dict[str, object]] = [
        {"text": symbol, "bits": bits}
        for symbol, bits in zip(scored.symbols, scored.bits.tolist(), strict=True)
    ]
    if scored.blocks is not None:
        for token, column in zip(tokens, scored.blocks.T.tolist(), strict=True):
            token["log2_dets"] = column
    return {
        "model": name,
        "bound": "exact" if scored.exact else "elbo",
        "samples": 1 if scored.exact else samples,
        "bpc": scored.bits_per_character,
        "bits": scored.total,
        "bits_per_token": scored.per_token,
        "characters": len(scored.reading.text),
        "tokens": tokens,
    }


def _print(names: Sequence[str], found: "Sequence[Scored]", samples: int) -> None:
    """The tokens, and a table of the whole text."""
    from rich.console import Console

    from tarflowlm.terminal.bars import print_table

    console = Console()
    if console.is_terminal:
        _print_colours(console, names, found)
    else:
        _print_lines(names, found)
    rows = [
        ["bits per character", *(f"{one.sign} {one.bits_per_character:.4f}" for one in found)],
        ["bits per token", *(f"{one.sign} {one.per_token:.4f}" for one in found)],
        ["bits in all", *(f"{one.sign} {one.total:.2f}" for one in found)],
        ["characters", *(f"{len(one.reading.text):,}" for one in found)],
        ["tokens", *(f"{len(one.bits):,}" for one in found)],
        ["posterior samples", *("none" if one.exact else f"{samples:,}" for one in found)],
    ]
    print_table("score", rows, ["", *names])


def _print_lines(names: Sequence[str], found: "Sequence[Scored]") -> None:
    """A line for every token, with its bits under every model that reads the same tokens."""
    groups = [range(len(found))]
    if found[0].symbols != found[-1].symbols:
        groups = [range(i, i + 1) for i in range(len(found))]
    for group in groups:
        symbols = found[group[0]].symbols
        bits = zip(*(found[i].bits.tolist() for i in group), strict=True)
        sys.stdout.write("\t".join(["", *(names[i] for i in group)]) + "\n")
        for symbol, row in zip(symbols, bits, strict=True):
            sys.stdout.write("\t".join([symbol, *(f"{one:.3f}" for one in row)]) + "\n")


def _print_colours(console: "Console", names: Sequence[str], found: "Sequence[Scored]") -> None:
    """The text under every model, coloured by the bits of its tokens, and a legend."""
    from rich.text import Text

    for name, one in zip(names, found, strict=True):
        console.print(Text(name, style="bold"), soft_wrap=True)
        line = Text()
        for symbol, bits in zip(one.symbols, one.bits.tolist(), strict=True):
            style = next(style for below, style in LEVELS if bits < below)
            if style and not symbol.strip():
                style += " underline"  # a space has no colour of its own
            line.append(symbol, style)
        console.print(line)
    legend = Text("bits per token: ", style="dim")
    for below, style in LEVELS:
        words = "more" if math.isinf(below) else f"below {below:g}"
        legend.append(words, style=style or "default").append("  ")
    console.print(legend)
