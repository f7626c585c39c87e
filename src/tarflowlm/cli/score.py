"""`tarflowlm score`: the bits that every token of a text takes, under one model or two."""

import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from tarflowlm.cli.inspect_arguments import ScoreArgs
from tarflowlm.cli.models import load_checkpoint
from tarflowlm.cli.prompts import Wording, read_source
from tarflowlm.device import pick_device
from tarflowlm.evaluation.likelihood import sign_of
from tarflowlm.evaluation.scores import Scores, score
from tarflowlm.runs.released import choose_directory
from tarflowlm.terminal.bars import stages_bar
from tarflowlm.terminal.tables import column_table, print_json, print_notice

LEVELS = ((1.0, ""), (2.0, "green"), (4.0, "yellow"), (8.0, "magenta"), (float("inf"), "bold red"))
"""Bits below which a token has a colour."""


@dataclass(frozen=True)
class _Scored:
    """A text under one model."""

    name: str
    symbols: list[str]
    characters: int
    samples: int
    scores: Scores

    @property
    def bound(self) -> str:
        return "exact" if self.scores.exact else "elbo"

    @property
    def bpc(self) -> float:
        return self.scores.total / self.characters

    def to_json(self) -> dict[str, Any]:
        bits, blocks = self.scores.bits.tolist(), self.scores.blocks
        tokens = [{"text": symbol, "bits": b} for symbol, b in zip(self.symbols, bits, strict=True)]
        if blocks is not None:
            for token, column in zip(tokens, blocks.T.tolist(), strict=True):
                token["log2_dets"] = column
        return {
            "model": self.name,
            "bound": self.bound,
            "samples": self.samples,
            "bpc": self.bpc,
            "bits": self.scores.total,
            "bits_per_token": self.scores.per_token,
            "characters": self.characters,
            "tokens": tokens,
        }


def run_score(args: ScoreArgs) -> None:
    notes, console = Console(stderr=True), Console()
    names = [choose_directory(args.directory, args.model), *([args.baseline] if args.baseline is not None else [])]
    # all before the first is used, so that a model that is not there costs no time
    checkpoints = [load_checkpoint(name, pick_device(args.device)) for name in names]
    text = args.text if args.text is not None else read_source(str(args.file))
    found = []
    for name, checkpoint in zip(names, checkpoints, strict=True):
        wording = Wording(checkpoint.tokenizer, args.normalize, is_file=args.file is not None)
        prepared = wording.text(text, "text")
        tokens = torch.from_numpy(wording.tokenizer.encode(prepared))
        wording.say(partial(print_notice, notes), name.name)
        with stages_bar(notes) as show:
            progress = partial(show, f"scoring with {name.name}, windows")
            scores = score(checkpoint.model, tokens, samples=args.samples, seed=args.seed, progress=progress)
        symbols = [wording.tokenizer.symbols[i] for i in tokens.tolist()]
        found.append(_Scored(name.name, symbols, len(prepared), 1 if scores.exact else args.samples, scores))
    if args.json:
        print_json(found[0].to_json() | ({"baseline": found[1].to_json()} if len(found) > 1 else {}))
        return
    if console.is_terminal:
        _print_coloured(console, found)
    else:
        _print_plain(found)
    rows = [
        ["bits per character", *(f"{sign_of(s.bound)} {s.bpc:.4f}" for s in found)],
        ["bits per token", *(f"{sign_of(s.bound)} {s.scores.per_token:.4f}" for s in found)],
        ["bits in all", *(f"{sign_of(s.bound)} {s.scores.total:.2f}" for s in found)],
        ["characters", *(f"{s.characters:,}" for s in found)],
        ["tokens", *(f"{len(s.symbols):,}" for s in found)],
        ["posterior samples", *("none, exact" if s.scores.exact else f"{s.samples:,}" for s in found)],
    ]
    console.print(column_table("score", ["", *(s.name for s in found)], rows))


def _print_coloured(console: Console, found: list[_Scored]) -> None:
    legend = Text("bits per token: ", style="dim")
    for below, style in LEVELS:
        legend.append("more" if math.isinf(below) else f"below {below:g}", style=style or "default").append("  ")
    for scored in found:
        console.print(Text(scored.name, style="bold"), soft_wrap=True)
        line = Text()
        for symbol, bits in zip(scored.symbols, scored.scores.bits.tolist(), strict=True):
            style = next(style for below, style in LEVELS if bits < below)
            # a space has no colour of its own
            line.append(symbol, style=f"{style} underline" if style and not symbol.strip() else style)
        console.print(line)
    console.print(legend)


def _print_plain(found: list[_Scored]) -> None:
    """A line per token: the token, and its bits under every model; one model after the other if tokens differ."""
    alike = all(s.symbols == found[0].symbols for s in found)
    for group in [found] if alike else [[s] for s in found]:
        for symbol, *bits in zip(group[0].symbols, *(s.scores.bits.tolist() for s in group), strict=True):
            sys.stdout.write("\t".join([symbol, *(f"{b:.3f}" for b in bits)]) + "\n")
