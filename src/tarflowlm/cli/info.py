"""`tarflowlm info` and `tarflowlm runs`: what a model is, and how training runs compare."""

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

from tarflowlm.baseline import BaselineConfig
from tarflowlm.cli.inspect_arguments import InfoArgs, RunsArgs
from tarflowlm.cli.models import load_checkpoint, locate
from tarflowlm.errors import UserError, first_line
from tarflowlm.evaluation.likelihood import sign_of
from tarflowlm.files import read_json, writer_of
from tarflowlm.language_model import LanguageModel
from tarflowlm.report.records import RunRecord, read_record
from tarflowlm.runs.checkpoint import CONFIG, SUMMARY, WEIGHTS, Checkpoint
from tarflowlm.runs.hub import is_reference
from tarflowlm.runs.released import DEFAULT, FOLDER, released
from tarflowlm.terminal.progress import minutes
from tarflowlm.terminal.tables import column_table, print_json, print_notice, print_table
from tarflowlm.training.metrics import METRICS

CARD = "README.md"
"""What a shipped model says of itself, its licence included."""
DEPTH = 2
"""Levels below a folder at which runs are looked for."""


def run_info(args: InfoArgs) -> None:
    console = Console()
    if args.directory is None:
        models = [_describe(FOLDER / name) for name in released()]
        if args.json:
            print_json({"models": models})
            return
        note = {DEFAULT: ", the default"}
        rows = [(m["name"] + note.get(m["name"], ""), f"{_kind(m)}; {m['tokenizer']}") for m in models]
        print_table(console, "models that come with the package; `tarflowlm info NAME` says more", rows)
        return
    found = _describe(locate(args.directory))
    if is_reference(args.directory):
        # not the hash of its commit
        found["name"] = args.directory.as_posix()
    if args.json:
        print_json(found)
    else:
        _print_info(console, found)


def _describe(directory: Path) -> dict[str, Any]:
    """All that is known of a model. UserError as in `load_checkpoint`."""
    checkpoint = load_checkpoint(directory)
    run, model, tokenizer = checkpoint.run, checkpoint.model, checkpoint.tokenizer
    summary = _summary(directory)
    test = summary.get("test") or {}
    card, shipped = directory / CARD, directory.parent == FOLDER
    return {
        "name": directory.resolve().name,
        "directory": str(directory),
        "shipped": shipped,
        "preset": run.name,
        "family": run.model.family,
        "blocks": [run.model.describe(block) for block in range(model.num_blocks)],
        "layers": _layers(checkpoint),
        "parameters": _parameters(model),
        "context": run.model.context,
        "patch": run.model.patch,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} symbols, normalisation {tokenizer.normalization}",
        "source": run.data.source,
        "steps": _number(checkpoint.info.get("step")),
        "tokens": _number(checkpoint.info.get("tokens")),
        "seed": run.seed,
        # of a shipped model it would be the date of its installation
        "saved": None if shipped else _date(directory / WEIGHTS),
        "bpc": test.get("bpc"),
        "bound": test.get("bound"),
        "files": dict(_sizes(directory)),
        "card": card.read_text(encoding="utf-8") if card.is_file() else None,
    }


def _sizes(directory: Path) -> Iterator[tuple[str, int]]:
    """Names and bytes of the files of a directory, and of its folders as a whole."""
    for path in sorted(directory.iterdir()):
        if path.is_dir() and not path.name.startswith("__"):
            yield f"{path.name}/", sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        elif path.is_file() and not path.name.startswith("."):
            yield path.name, path.stat().st_size


def _summary(directory: Path) -> dict[str, Any]:
    """The results of a run; empty if there are none that can be read."""
    try:
        found = read_json(directory / SUMMARY)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _layers(checkpoint: Checkpoint) -> list[int]:
    """Transformer layers of every block, or of the baseline."""
    config = checkpoint.run.model
    if isinstance(config, BaselineConfig):
        return [config.layers]
    return [block.layers for block in config.blocks[: checkpoint.model.num_blocks]]


def _parameters(model: LanguageModel) -> dict[str, int]:
    """Parameters in all, and of every part: codebook or embedding, and Transformer and the rest of every block."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        first, *rest = name.split(".")
        part = first.replace("_", " ")
        if first == "prior":
            part = f"block {int(rest[1]) + 1} " + (
                "transformer" if rest[2] == "transformer" else "coupling and input"
            )
        parts[part] = parts.get(part, 0) + parameter.numel()
    return {"all": sum(parts.values()), **parts}


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _date(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d")


def _kind(found: dict[str, Any]) -> str:
    return "discrete autoregressive" if found["family"] == "ar" else f"flow of {len(found['blocks'])} blocks"


def _print_info(console: Console, found: dict[str, Any]) -> None:
    layers = zip(found["blocks"], found["layers"], strict=True)
    parts = [f"{count:,} {name}" for name, count in found["parameters"].items() if name != "all"]
    trained = [f"{found[name]:,} {name}" for name in ("tokens", "steps") if found[name] is not None]
    rows = [
        ("model", f"{_kind(found)}, preset {found['preset']}"),
        ("blocks", "\n".join(f"{block}: {n} Transformer layer{'s' * (n != 1)}" for block, n in layers)),
        ("parameters", "\n".join([f"{found['parameters']['all']:,}", *parts])),
        ("context", f"{found['context']} tokens" + (f", {found['patch']} a position" if found["patch"] > 1 else "")),
        ("tokenizer", found["tokenizer"]),
        ("trained on", ", ".join([found["source"], *trained, f"seed {found['seed']}"])),
    ]
    if found["saved"]:
        rows.append(("saved", found["saved"]))
    if found["bpc"] is not None:
        sign = sign_of(found["bound"])
        rows.append(("test", f"{sign} {found['bpc']:.4f} bits per character ({found['bound']})"))
    rows += [
        ("files", "\n".join(f"{name}  {size:,} bytes" for name, size in found["files"].items())),
    ]
    print_table(console, found["name"] if found["shipped"] else found["directory"], rows)
    if found["card"]:
        console.print(Markdown(found["card"]) if console.is_terminal else Text(found["card"].strip()), soft_wrap=True)


def run_runs(args: RunsArgs) -> None:
    rows = _sorted([_row(name, directory) for name, directory in _find(args.directories).items()])
    if args.json:
        print_json({"runs": rows})
        return
    columns = {"": "name", "preset": "preset", "bpc": "bpc", "best step": "best_step", "tokens": "tokens"}
    columns |= {"time": "seconds", "state": "state"}
    if all((row["preset"] or "") in row["name"] for row in rows):
        del columns["preset"]
    # bits per character compare within a text only
    for source, same in groupby(rows, lambda row: row["source"]):
        text = "" if source is None else f" on {Path(source).name}"
        cells = [[_cell(row, name) for name in columns.values()] for row in same]
        Console().print(column_table(f"runs{text}: bits per character (bpc) and more", list(columns), cells))
    notes = Console(stderr=True)
    if any(row["best"] for row in rows):
        print_notice(notes, "* the fewest bits per character on its text")
    if any(row["split"] == "valid" for row in rows):
        print_notice(notes, "v: the best validation so far, over fewer windows than a test")


def _find(directories: Sequence[Path]) -> dict[str, Path]:
    """Name -> run directory. UserError for a folder that is not there or holds no run."""
    found: dict[str, Path] = {}
    for folder in directories:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a directory: give run directories, or a folder that holds some")
        below = list(_runs_in(folder, DEPTH))
        if not below:
            raise UserError(
                f"{folder} holds no run, also not {DEPTH} levels down: give a directory made by `tarflowlm train`"
            )
        short = {folder.resolve().name if path == folder else str(path.relative_to(folder)): path for path in below}
        found |= {name if name not in found else str(path): path for name, path in short.items()}
    return found


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / name).is_file() for name in (CONFIG, WEIGHTS, METRICS)):
        yield folder
    elif depth:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                yield from _runs_in(path, depth - 1)


def _row(name: str, directory: Path) -> dict[str, Any]:
    """A run as `--json` shows it; of a broken one the state is the reason."""
    empty = dict.fromkeys(("preset", "source", "bpc", "split", "bound", "best_step", "tokens", "seconds"))
    row: dict[str, Any] = {"name": name, "directory": str(directory), **empty, "state": "", "best": False}
    try:
        record = read_record(directory)
    except (UserError, OSError) as error:
        return row | {"state": first_line(error).removeprefix(f"{directory} ").removeprefix(f"{directory}/")}
    summary, valid = record.summary, record.valid
    row |= {"preset": record.run.name, "source": record.run.data.source, "state": _state(record)}
    if record.has_log:
        row |= {"tokens": int(record.train["tokens"].max()), "seconds": float(record.seconds[-1])}
    row["bound"] = "exact" if record.is_exact else "elbo"
    if len(valid["bpc"]):
        best = int(valid["bpc"].argmin())
        row |= {"bpc": float(valid["bpc"][best]), "split": "valid", "best_step": int(valid["step"][best])}
    if summary is not None:
        row |= {"bpc": float(summary["test"]["bpc"]), "split": "test"}
        row |= {key: summary[key] for key in ("tokens", "seconds") if key in summary}
    return row


def _state(record: RunRecord) -> str:
    if record.summary is not None:
        return "finished"
    if not record.has_log:
        return "no log"
    train = record.run.train
    # a run with a time limit learns its steps at its end
    step = f"step {record.last_step:,}" + ("" if train.minutes else f" of {train.num_steps:,}")
    return f"training now, {step}" if writer_of(record.directory) else f"stopped, {step}"


def _sorted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Text by text and by bits per character, the best of every text marked; broken runs last."""
    rows = sorted(rows, key=lambda r: (r["source"] is None, r["source"] or "", r["bpc"] or math.inf, r["name"]))
    for source in {row["source"] for row in rows}:
        same = [row for row in rows if row["source"] == source and row["bpc"] is not None]
        # a test says more than a validation, where there is one
        finished = [row for row in same if row["split"] == "test"] or same
        if len(same) > 1:
            finished[0]["best"] = True
    return rows


def _cell(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return ""
    match name:
        case "bpc":
            sign = sign_of(row["bound"])
            return f"{sign} {value:.4f}" + " v" * (row["split"] == "valid") + " *" * row["best"]
        case "tokens":
            return f"{value / 1e6:.2f}M"
        case "seconds":
            return minutes(value)
    return f"{value:,}" if isinstance(value, int) else value
