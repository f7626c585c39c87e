"""`tarflowlm score`: the bits of every token of a text, under one model or two."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro
from rich.console import Console
from rich.text import Text

from tarflowlm.cli.options import OfModel, check_lines, load_checkpoint, read_lines, read_source
from tarflowlm.errors import UserError
from tarflowlm.options import File, arg
from tarflowlm.requests import Score, as_texts
from tarflowlm.runs.hub import shown_name
from tarflowlm.terminal.bars import Bars, print_json, print_notice, print_table

if TYPE_CHECKING:
    from tarflowlm.evaluation.scores import Scores

COLOURS = {8: "red", 4: "magenta", 2: "yellow", 1: "green"}
"""Least bits -> the colour of a token."""
MOST_TOKENS = 2_000
"""More tokens are summed up, and not listed."""
WIDTH = 32
"""Characters of a text at the head of a column."""


@dataclass(frozen=True, kw_only=True)
class Args(OfModel):
    """Show the bits of every token of a text, and of the whole text, under one model or two, or of
    several texts. The bits of a token are its share of a bound. This has densities, so they may be
    below zero.
    """

    EXCLUSIVE: ClassVar = {"texts": ("baseline", "text", "file")}

    file: File = None
    """A file with the text, or - for standard input, instead of --text."""
    texts: File = None
    """Or a file with one text per line, for a JSON object per line. Empty lines are skipped, and
    have no number.
    """
    baseline: Annotated[Path | None, arg("MODEL")] = None
    """A second model to score the same text with."""
    score: Annotated[Score, tyro.conf.arg(name="", help="")] = field(default_factory=Score)

    def __post_init__(self) -> None:
        super().__post_init__()
        num = len(as_texts(self.score.text))
        if self.texts is None and (num == 0) == (self.file is None):
            raise UserError(
                "give the text to score: either --text TEXT, or --file FILE (- for standard input)"
            )
        if num > 1 and self.baseline is not None:
            raise UserError(f"--baseline with {num} texts: compare two texts, or two models")


def run(args: Args) -> None:
    from tarflowlm.evaluation.scores import score_texts

    if args.texts is not None:
        _score_lines(args, args.texts)
        return
    texts = as_texts(args.score.text if args.file is None else read_source(args.file))
    request = replace(args.score, text=texts)
    # load both before the first is used, so that a missing model costs no time
    given = [args.directory] if args.baseline is None else [args.directory, args.baseline]
    models = [load_checkpoint(directory, args.device) for directory in given]
    names = [shown_name(one, lm.directory) for one, lm in zip(given, models, strict=True)]
    found: list[Scores] = []
    for name, lm in zip(names, models, strict=True):
        with Bars() as bars:
            found += score_texts(request, lm, bars)
        for notice in dict.fromkeys(one.notice for one in found[-len(texts) :] if one.notice):
            print_notice(f"{name}: {notice}")
    if len(texts) > 1:
        names = names * len(texts)
    elif found[0].text != found[-1].text:
        print_notice(f"{' and '.join(names)} read different texts: their bits do not compare")
    if args.json:
        objects = list(map(_to_json, names, found, [request.samples] * len(found)))
        second = {} if len(objects) == 1 else {"baseline": objects[-1]}
        print_json({"texts": objects} if len(texts) > 1 else objects[0] | second)
        return
    if len(texts) > 1:
        names = [_short(one.text) for one in found]
    if max(len(one.bits) for one in found) > MOST_TOKENS:
        print_notice(f"of more than {MOST_TOKENS:,} tokens --json lists the bits")
    else:
        _print_tokens(names, [*map(_pieces, found)])
    _print_table(names, found, request.samples)


def _score_lines(args: Args, source: str) -> None:
    """A JSON object for every line of a file; under torchrun the processes share the lines."""
    from tarflowlm.data.prompts import read
    from tarflowlm.evaluation.scores import score_texts
    from tarflowlm.processes import LONG, launched

    lines = read_lines(source)
    if not lines:
        raise UserError(f"{source} holds no text: write one per line")
    with launched(args.device, LONG) as processes:
        with processes.first_alone():  # it may have to be downloaded
            lm = load_checkpoint(args.directory, processes.device)
        name = shown_name(args.directory, lm.directory)
        how = args.score.normalize
        texts = check_lines(lines, source, lambda text: read(lm.tokenizer, text, normalize=how))
        request = replace(args.score, text=texts[processes.rank :: processes.world])
        with Bars() as bars:
            found = score_texts(request, lm, bars)
        results = (_to_json(name, scored, request.samples) for scored in found)
        for index, result in enumerate(processes.in_turn(results)):
            print_json({"index": index} | result)


def _to_json(name: str, scored: "Scores", samples: int) -> dict[str, object]:
    tokens: list[dict[str, object]] = []
    for symbol, bits in zip(scored.symbols, scored.bits.tolist(), strict=True):
        tokens.append({"text": symbol, "bits": bits})
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
        "characters": len(scored.text),
        "tokens": tokens,
    }


def _short(text: str) -> str:
    """A text as the head of a column."""
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def _pieces(scored: "Scores") -> list[tuple[str, float]]:
    """The tokens with their bits; those that are parts of one character together."""
    pieces: list[tuple[str, float]] = []
    total = 0.0
    for symbol, bits in zip(scored.symbols, scored.bits.tolist(), strict=True):
        total += bits
        if symbol:
            pieces.append((symbol, total))
            total = 0.0
    return pieces


def _print_tokens(names: Sequence[str], found: Sequence[list[tuple[str, float]]]) -> None:
    """The tokens with their bits: coloured on a terminal, else a line for each."""
    console = Console()
    first, *_, last = [[symbol for symbol, _ in one] for one in (*found, found[-1])]
    if console.is_terminal:
        for name, one in zip(names, found, strict=True):
            _print_colours(console, name, one)
    elif first == last:
        _print_lines(names, found)
    else:
        for name, one in zip(names, found, strict=True):
            _print_lines([name], [one])


def _print_table(names: Sequence[str], found: "Sequence[Scores]", samples: int) -> None:
    """What holds for the whole texts."""
    rows = [["bits per token", *(f"{one.sign} {one.per_token:.4f}" for one in found)]]
    if all(one.is_lossless for one in found):
        bits = (f"{one.sign} {one.bits_per_character:.4f}" for one in found)
        rows.insert(0, ["bits per character", *bits])
    rows += [
        ["bits in all", *(f"{one.sign} {one.total:,.2f}" for one in found)],
        ["characters", *(f"{len(one.text):,}" for one in found)],
        ["tokens", *(f"{len(one.bits):,}" for one in found)],
        ["posterior samples", *("none" if one.exact else f"{samples:,}" for one in found)],
    ]
    print_table("score", rows, ["", *names])


def _print_lines(names: Sequence[str], found: Sequence[list[tuple[str, float]]]) -> None:
    """A line for every token, with its bits under each of the models."""
    sys.stdout.write("\t".join(["", *names]) + "\n")
    for row in zip(*found, strict=True):
        sys.stdout.write("\t".join([row[0][0], *(f"{bits:.3f}" for _, bits in row)]) + "\n")


def _print_colours(console: Console, name: str, pieces: list[tuple[str, float]]) -> None:
    """The text coloured by the bits of its tokens, below a title with the colours."""
    title = Text(f"{name}, bits per token: ", style="bold")
    for least, colour in COLOURS.items():
        title.append(f"from {least}  ", colour)
    line = Text()
    for symbol, bits in pieces:
        colour = next((colour for least, colour in COLOURS.items() if bits >= least), "")
        if colour and not symbol.strip():
            colour += " underline"  # a space shows no colour
        line.append(symbol, colour)
    console.print(title, soft_wrap=True)
    console.print(line)
