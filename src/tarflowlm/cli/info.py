"""`tarflowlm info`: a model described, the list of models, or training runs in a table."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tarflowlm.cli.options import Json
from tarflowlm.errors import UserError, counted, first_line
from tarflowlm.options import Flag, arg
from tarflowlm.runs import CONFIG, TOKENIZER, WEIGHTS
from tarflowlm.runs.hub import (
    DEFAULT,
    FOLDER,
    check_model,
    folder_of,
    purpose,
    read_card,
    released,
    shown_name,
)
from tarflowlm.terminal.bars import print_json, print_notice, print_result, print_table

if TYPE_CHECKING:
    from tarflowlm.runs.records import RunRecord


@dataclass(frozen=True, kw_only=True)
class Args(Json):
    """Describe a model: its shape, training and likelihood. Without one, list the models of the
    package. Given folders of runs, compare them: bits per character, tokens, time and state.
    """

    directories: Annotated[tyro.conf.Positional[tuple[Path, ...]], arg("[MODEL or DIR ...]")] = ()
    """Run directories, shipped models or hf:OWNER/NAME; or folders of runs, two levels deep."""
    compare: Flag = False
    """Compare runs in a table, even if only one is given: `tarflowlm runs`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare and not self.directories:
            raise UserError("name the directory that holds the runs, say `tarflowlm runs runs`")
        for path in self.directories:
            if not path.is_dir():
                check_model(path)


def run(args: Args) -> None:
    paths = args.directories
    folders = filter(Path.is_dir, map(folder_of, paths))
    if args.compare or not all((folder / CONFIG).exists() for folder in folders):
        _compare(args)
        return
    if len(paths) == 1:
        found = describe(paths[0])
        if args.json:
            print_json(asdict(found))
        else:
            _print_model(found)
        return
    models = list(map(describe, paths or [FOLDER / name for name in released()]))
    rows = []
    for model in models:
        name = f"{model.name}, the default" if model.name == DEFAULT else model.name
        size = f"{model.kind}; {model.tokenizer}"
        rows.append((name, f"{model.purpose}\n{size}" if model.purpose else size))
    which = "models" if paths else "models that come with the package"
    title = f"{which}; `tarflowlm info NAME` says more"
    print_result(args.json, {"models": [asdict(model) for model in models]}, title, rows)


# models


@dataclass(frozen=True, kw_only=True)
class Description:
    """A model as `--json` shows it."""

    name: str
    preset: str
    family: str
    blocks: list[str]
    layers: list[int]
    parameters: int
    trunk_parameters: int
    context: int
    patch: int
    tokenizer: str
    source: str
    steps: int | None
    tokens: int | None
    seed: int
    bpc: float | None
    bound: str
    temperature: float
    top_p: float
    purpose: str
    card: str

    @property
    def kind(self) -> str:
        """Its kind, its size and its likelihood, in half a line."""
        from tarflowlm.evaluation.likelihood import sign_of

        kind = f"flow of {counted(len(self.blocks), 'block')}"
        if self.bound == "exact":
            kind = "discrete autoregressive"
        found = f"{kind}, {self.parameters / 1e6:.1f} M parameters"
        if self.bpc is not None:
            found += f", {sign_of(self.bound)} {self.bpc:.4f} bits per character"
        return found


def describe(given: Path) -> Description:
    """Describe the model of a path or a name."""
    from tarflowlm.data import load_tokenizer
    from tarflowlm.model_config import BaselineConfig
    from tarflowlm.runs.checkpoint import locate, read_run, read_summary, read_weights

    # not loaded, so that couplings of modules that are not imported can be shown
    folder = locate(given)
    run = read_run(folder, is_shown=True)
    tensors, info = read_weights(folder / WEIGHTS)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    config = run.model
    test = (read_summary(folder) or {}).get("test", {})
    trained = int(info.get("blocks", config.num_blocks))
    if isinstance(config, BaselineConfig):
        layers = [config.layers]
    else:
        layers = [block.layers for block in config.blocks[:trained]]
    card = read_card(folder)
    sizes = {name: one.numel() for name, one in tensors.items()}
    counts = {name: int(info[name]) for name in ("step", "tokens") if name in info}
    return Description(
        name=shown_name(given, folder),
        preset=run.name,
        family=config.family,
        blocks=[config.describe(block) for block in range(len(layers))],
        layers=layers,
        parameters=sum(sizes.values()),
        trunk_parameters=sum(n for name, n in sizes.items() if "transformer." in name),
        context=config.context,
        patch=config.patch,
        tokenizer=(
            f"{tokenizer.kind}, {tokenizer.vocab_size:,} symbols, "
            f"normalisation {tokenizer.normalization}"
        ),
        source=run.data.source,
        steps=counts.get("step"),
        tokens=counts.get("tokens"),
        seed=run.seed,
        bpc=test.get("bpc"),
        bound=config.bound,
        temperature=run.temperature,
        top_p=run.top_p,
        purpose=purpose(card),
        card=card,
    )


def _print_model(found: Description) -> None:
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.text import Text

    layers = zip(found.blocks, found.layers, strict=True)
    blocks = [f"{block}: {counted(n, 'Transformer layer')}" for block, n in layers]
    parameters = f"{found.parameters:,}, {found.trunk_parameters:,} of them in Transformers"
    trained = [found.source, f"seed {found.seed}"]
    if found.tokens is not None:
        trained.append(f"{found.tokens:,} tokens")
    if found.steps is not None:
        trained.append(f"{found.steps:,} steps")
    patch = f", {found.patch} per position" if found.patch > 1 else ""
    rows = [
        ("model", f"{found.kind}, preset {found.preset}"),
        ("blocks", "\n".join(blocks)),
        ("parameters", parameters),
        ("context", f"{found.context} tokens{patch}"),
        ("tokenizer", found.tokenizer),
        ("trained on", ", ".join(trained)),
        ("samples", f"temperature {found.temperature:g}, top-p {found.top_p:g} by default"),
    ]
    print_table(found.name, rows)
    if found.card:
        console = Console()
        card = Markdown(found.card) if console.is_terminal else Text(found.card.strip())
        console.print(card, soft_wrap=True)


# training runs


def _compare(args: Args) -> None:
    """A table for every text, as bits per character compare within a text only."""
    from tarflowlm.evaluation.likelihood import sign_of
    from tarflowlm.runs.records import read_record

    rows = []
    broken = []
    for name, path in _find(args.directories).items():
        try:
            rows.append(_row(read_record(path, name)))
        except (UserError, OSError) as error:
            reason = first_line(error).removeprefix(f"{path} ").removeprefix(f"{path}/")
            broken.append({"name": name, "directory": str(path), "state": reason, "best": False})
    text = itemgetter("source", "normalize", "unwrap")
    rows.sort(key=lambda row: (*text(row), row["bpc"] is None, row["bpc"] or 0.0, row["name"]))
    groups = [list(group) for _, group in groupby(rows, text)]
    for group in groups:
        known = [row for row in group if row["bpc"] is not None]
        if len(known) > 1:
            # a test, if there is one, says more than a validation
            next((row for row in known if row["split"] == "test"), known[0])["best"] = True
    if args.json:
        empty: dict[str, Any] = dict.fromkeys(rows[0]) if rows else {}
        print_json({"runs": rows + [empty | row for row in broken]})
        return
    for group in groups:
        source, normalize, unwrap = text(group[0])
        how = " in text8" if normalize == "text8" else ""
        how += ", unwrapped" if unwrap else ""
        title = f"runs on {Path(source).name}{how}: bits per character (bpc) and more"
        columns = ["", "bpc", "tokens", "time", "state"]
        table = []
        for row in group:
            bits = "" if row["bpc"] is None else f"{sign_of(row['bound'])} {row['bpc']:.4f}"
            bits += " v" if row["split"] == "valid" else ""
            bits += " *" if row["best"] else ""
            spent = str(timedelta(seconds=round(row["seconds"])))
            table.append([row["name"], bits, f"{row['tokens'] / 1e6:.2f}M", spent, row["state"]])
        print_table(title, table, columns)
    for row in broken:
        sys.stdout.write(f"{row['name']}: {row['state']}\n")
    if any(row["best"] for row in rows):
        print_notice("* the fewest bits per character on its text, by the test if there is one")
    if any(row["split"] == "valid" for row in rows):
        print_notice("v: the best validation so far, over fewer windows than a test")


def _find(directories: Sequence[Path]) -> dict[str, Path]:
    """Name -> run directory; models that were exported from runs are left out."""
    from tarflowlm.runs.records import DEPTH, find_runs, is_export

    found: dict[str, Path] = {}
    known = set()
    for folder in directories:
        below = [path for path in find_runs(folder) if not is_export(path)]
        if not below:
            remedy = "give a directory made by `tarflowlm train`"
            raise UserError(f"{folder} holds no run within {DEPTH} levels: {remedy}")
        for path in below:
            place = path.resolve()
            if place in known:
                continue
            known.add(place)
            name = folder.resolve().name if path == folder else str(path.relative_to(folder))
            found[next(one for one in (name, str(path), str(place)) if one not in found)] = path
    return found


def _row(record: "RunRecord") -> dict[str, Any]:
    """A run as `--json` shows it, by its test if it has one, else by its best validation."""
    data = record.run.data
    row = {
        "name": record.name,
        "directory": str(record.directory),
        "state": record.status,
        "preset": record.run.name,
        "source": data.source,
        "normalize": data.tokenizer.normalization,
        "unwrap": data.unwrap,
        "bpc": min(record.valid["bpc"].tolist(), default=None),
        "split": "valid" if len(record.valid["bpc"]) else "",
        "bound": record.run.model.bound,
        "tokens": int(record.train["tokens"][-1]),
        "seconds": float(record.train["seconds"][-1]),
        "best": False,
    }
    done = record.summary
    if done is not None:
        row |= {"bpc": done["test"]["bpc"], "split": "test"}
        row |= {"tokens": done["tokens"], "seconds": done["seconds"]}
    return row
