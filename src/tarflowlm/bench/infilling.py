"""Infilling and editing of held-out text: the gain from particles, and the changes made by re-noising."""

import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tarflowlm.bench.arguments import InfillingArgs
from tarflowlm.data import encode_text_source, eval_windows
from tarflowlm.device import pick_device
from tarflowlm.editing import bound, encode, renoise
from tarflowlm.evaluation.likelihood import bits
from tarflowlm.generation import generate
from tarflowlm.generation.generate import num_ticks
from tarflowlm.generation.sampling import BLANK
from tarflowlm.model import as_flow
from tarflowlm.runs.checkpoint import Checkpoint, load_checkpoint
from tarflowlm.terminal.bars import StageProgress, no_progress, ticker


def run(args: InfillingArgs, progress: StageProgress = no_progress) -> dict[str, Any]:
    """{"infilling", "editing", "examples"}; bits per character are upper bounds for flows, exact for baselines.

    Raises UserError as `load_checkpoint` and `generate`.
    """
    result: dict[str, Any] = {"infilling": [], "editing": [], "examples": []}
    for directory in args.directories:
        checkpoint = load_checkpoint(directory, pick_device(args.device))
        texts = _sentences(checkpoint, args)
        filled, shown = _infill(checkpoint, str(directory), texts, args, progress)
        result["infilling"] += filled
        result["examples"] += shown
        if not checkpoint.model.is_exact:
            result["editing"] += _edit(checkpoint, str(directory), texts, args, progress)
    return result


def _sentences(checkpoint: Checkpoint, args: InfillingArgs) -> torch.Tensor:
    """Windows [sentences, T] of the test split, each starting at a word if the text has spaces."""
    source = checkpoint.run.data.source if args.data is None else args.data
    tokens = encode_text_source(source, checkpoint.tokenizer, ("test",))["test"]
    wide = eval_windows(tokens, 2 * args.length, args.sentences)
    space = torch.tensor([symbol.startswith((" ", "\u2423")) for symbol in checkpoint.tokenizer.symbols])
    starts = (space[wide[:, : args.length]].int().argmax(1) + 1).clamp(max=args.length)
    return wide.gather(1, starts[:, None] + torch.arange(args.length))


def _bits(checkpoint: Checkpoint, tokens: torch.Tensor, seed: int) -> float:
    """Bits per character of texts [sentences, T], over all of them, with the same noise in every call."""
    nats = bound(checkpoint.model, tokens, torch.Generator().manual_seed(seed)).sum().item()
    characters = torch.as_tensor(checkpoint.tokenizer.characters_per_token)[tokens.cpu()].sum().item()
    return bits(nats) / characters


def _infill(
    checkpoint: Checkpoint, name: str, texts: torch.Tensor, args: InfillingArgs, progress: StageProgress
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    model, first = checkpoint.model, (args.length - args.blanks) // 2
    hidden = torch.zeros(args.length, dtype=torch.bool)
    hidden[first : first + args.blanks] = True
    template = torch.where(hidden, torch.tensor(BLANK), texts)
    rows, filled = [], {}
    for particles in args.particles:
        what = f"infilling by {name}, {particles} particles, positions"
        start = time.perf_counter()
        found = generate(
            model,
            num_tokens=args.length,
            num=len(texts),
            template=template,
            particles=particles,
            decoder="parallel",
            generator=torch.Generator().manual_seed(args.seed),
            tick=ticker(progress, what, num_ticks(model, args.length)),
        )
        seconds = time.perf_counter() - start
        tokens = found.tokens.cpu()
        assert found.ess is not None
        assert found.log_evidence is not None
        filled[particles] = tokens
        rows.append(
            {
                "name": name,
                "particles": particles,
                "kept": (tokens == texts)[:, ~hidden].cpu().double().mean().item(),
                "recovered": (tokens == texts)[:, hidden].cpu().double().mean().item(),
                "bpc": _bits(checkpoint, tokens, args.seed),
                "bpc_true": _bits(checkpoint, texts, args.seed),
                "ess": found.ess.mean().item(),
                "log_evidence": found.log_evidence.mean().item(),
                "seconds": seconds,
            }
        )
    decode = checkpoint.tokenizer.decode
    shown = [
        {
            "name": name,
            "before": decode(texts[i, :first].tolist()),
            "hidden": decode(texts[i, hidden].tolist()),
            "after": decode(texts[i, first + args.blanks :].tolist()),
            "filled": {str(n): decode(tokens[i, hidden].tolist()) for n, tokens in filled.items()},
        }
        for i in range(min(args.examples, len(texts)))
    ]
    return rows, shown


def _edit(
    checkpoint: Checkpoint, name: str, texts: torch.Tensor, args: InfillingArgs, progress: StageProgress
) -> list[dict[str, Any]]:
    model = as_flow(checkpoint.model)
    text = encode(model, texts, torch.Generator().manual_seed(args.seed))
    rows: list[dict[str, Any]] = []
    for level in range(model.num_blocks + 1):
        for strength in args.strengths:
            progress(f"editing by {name}", len(rows), (model.num_blocks + 1) * len(args.strengths))
            edit = renoise(
                model,
                text,
                level=level,
                strength=strength,
                decoder="auto",
                generator=torch.Generator().manual_seed(args.seed + 1),
            )
            rows.append(
                {
                    "name": name,
                    "level": level,
                    "strength": strength,
                    "changed": edit.changed.cpu().double().mean().item(),
                    "unchanged_texts": (~edit.changed.any(1)).cpu().double().mean().item(),
                    "bpc": _bits(checkpoint, edit.tokens.cpu(), args.seed),
                    "bpc_before": _bits(checkpoint, texts, args.seed),
                }
            )
    return rows


def print_result(result: dict[str, Any], console: Console) -> None:
    """The tables of `run`'s result."""
    table = Table(title="infilling", title_justify="left")
    for column in (
        "",
        "particles",
        "given kept",
        "hidden met",
        "bpc",
        "bpc of the truth",
        "effective",
        "log p(given)",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for r in result["infilling"]:
        table.add_row(
            r["name"], str(r["particles"]), f"{r['kept']:.1%}", f"{r['recovered']:.1%}", f"{r['bpc']:.3f}",
            f"{r['bpc_true']:.3f}", f"{r['ess']:.1f}", f"{r['log_evidence']:.2f}",
        )  # fmt: skip
    console.print(table)
    for example in result["examples"]:
        console.print(Text(f"{example['name']}", style="cyan"))
        for label, middle in (("truth", example["hidden"]), *example["filled"].items()):
            line = Text(f"  {label:>6}  {example['before']}")
            line.append(middle, style="bold green")
            console.print(line.append(example["after"]), soft_wrap=True)
    if not result["editing"]:
        return
    edits = Table(title="re-noising", title_justify="left")
    for column in ("", "state", "strength", "tokens changed", "texts unchanged", "bpc", "bpc before"):
        edits.add_column(column, justify="left" if not column else "right")
    for r in result["editing"]:
        edits.add_row(
            r["name"], str(r["level"]), f"{r['strength']:g}", f"{r['changed']:.1%}", f"{r['unchanged_texts']:.1%}",
            f"{r['bpc']:.3f}", f"{r['bpc_before']:.3f}",
        )  # fmt: skip
    console.print(edits)
