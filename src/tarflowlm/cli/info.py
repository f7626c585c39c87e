"""`tarflowlm info`: what a model is."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tarflowlm.cli.options import PrintJson, arg, load_checkpoint

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Args:
    """Describe a model: its shape, training and likelihood. Without one, list the models of the
    package.
    """

    directory: Annotated[tyro.conf.Positional[Path | None], arg("[MODEL]")] = None
    """Run directory, hf:OWNER/NAME, or a model of the package; without it those are listed."""
    json: PrintJson = False


@dataclass(frozen=True, kw_only=True)
class Description:
    """A model as `--json` shows it."""

    name: str
    directory: str
    shipped: bool
    preset: str
    family: str
    blocks: list[str]
    layers: list[int]
    parameters: dict[str, int]
    context: int
    patch: int
    vocab_size: int
    tokenizer: str
    source: str
    steps: int | None
    tokens: int | None
    seed: int
    saved: str | None
    bpc: float | None = None
    bound: str | None = None
    temperature: float
    files: dict[str, int]
    purpose: str
    card: str | None

    @property
    def kind(self) -> str:
        """Its kind, its size and its likelihood, in half a line."""
        from tarflowlm.evaluation.likelihood import sign_of
        from tarflowlm.terminal.bars import counted

        kind = f"flow of {counted(len(self.blocks), 'block')}"
        if self.family == "ar":
            kind = "discrete autoregressive"
        found = f"{kind}, {self.parameters['all'] / 1e6:.1f} M parameters"
        if self.bpc is not None:
            found += f", {sign_of(self.bound or '')} {self.bpc:.4f} bits per character"
        return found


def run(args: Args) -> None:
    from tarflowlm.runs.hub import DEFAULT, FOLDER, released
    from tarflowlm.terminal.bars import print_json, print_result

    if args.directory is not None:
        found = describe(args.directory)
        if args.json:
            print_json(asdict(found))
        else:
            _print(found)
        return
    models = [describe(FOLDER / name) for name in released()]
    rows = []
    for model in models:
        name = f"{model.name}, the default" if model.name == DEFAULT else model.name
        rows.append((name, f"{model.purpose}\n{model.kind}; {model.tokenizer}"))
    title = "models that come with the package; `tarflowlm info NAME` says more"
    print_result(args.json, {"models": [asdict(model) for model in models]}, title, rows)


def describe(given: Path) -> Description:
    """The model that a path or a name stands for."""
    from datetime import UTC, datetime

    from tarflowlm.model_config import BaselineConfig
    from tarflowlm.runs.checkpoint import WEIGHTS, read_summary
    from tarflowlm.runs.hub import FOLDER, is_reference, purpose, read_card

    lm = load_checkpoint(given, "cpu")
    directory, config = lm.directory, lm.run.model
    summary = read_summary(directory) or {}
    test = summary.get("test") or {}
    shipped = directory.parent == FOLDER
    saved = datetime.fromtimestamp((directory / WEIGHTS).stat().st_mtime, UTC)
    layers = (
        [config.layers]
        if isinstance(config, BaselineConfig)
        else [block.layers for block in config.blocks]
    )
    card = read_card(directory)
    return Description(
        name=given.as_posix() if is_reference(given) else directory.resolve().name,
        directory=str(directory),
        shipped=shipped,
        preset=lm.run.name,
        family=config.family,
        blocks=[config.describe(block) for block in range(lm.model.num_blocks)],
        layers=layers[: lm.model.num_blocks],
        parameters=_parameters(lm.model),
        context=config.context,
        patch=config.patch,
        vocab_size=lm.tokenizer.vocab_size,
        tokenizer=(
            f"{lm.tokenizer.kind}, {lm.tokenizer.vocab_size:,} symbols, "
            f"normalisation {lm.tokenizer.normalization}"
        ),
        source=lm.run.data.source,
        steps=_count(lm.info.get("step", "")),
        tokens=_count(lm.info.get("tokens", "")),
        seed=lm.run.seed,
        # for a shipped model it would be the date of its installation
        saved=None if shipped else f"{saved:%Y-%m-%d}",
        bpc=test.get("bpc"),
        bound=test.get("bound"),
        temperature=lm.run.temperature,
        files=_files(directory),
        purpose=purpose(card),
        card=card or None,
    )


def _count(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _parameters(model: "nn.Module") -> dict[str, int]:
    """The number of parameters in all, and of every part of the model."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        first, *rest = name.split(".")
        part = first.replace("_", " ")
        if first == "prior":
            kind = "transformer" if rest[2] == "transformer" else "coupling and input"
            part = f"block {int(rest[1]) + 1} {kind}"
        parts[part] = parts.get(part, 0) + parameter.numel()
    return {"all": sum(parts.values()), **parts}


def _files(directory: Path) -> dict[str, int]:
    """The bytes of everything in a directory; a folder counts with what it holds."""
    files = {}
    for path in sorted(directory.iterdir()):
        if path.name.startswith((".", "__")):
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        within = [path, *path.rglob("*")]
        files[name] = sum(file.stat().st_size for file in within if file.is_file())
    return files


def _print(found: Description) -> None:
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.text import Text

    from tarflowlm.terminal.bars import counted, print_table

    layers = zip(found.blocks, found.layers, strict=True)
    blocks = [f"{block}: {counted(n, 'Transformer layer')}" for block, n in layers]
    parts = [f"{count:,} {name}" for name, count in found.parameters.items() if name != "all"]
    trained = [found.source]
    trained += [] if found.tokens is None else [f"{found.tokens:,} tokens"]
    trained += [] if found.steps is None else [f"{found.steps:,} steps"]
    trained.append(f"seed {found.seed}")
    patch = f", {found.patch} per position" if found.patch > 1 else ""
    rows = [
        ("model", f"{found.kind}, preset {found.preset}"),
        ("blocks", "\n".join(blocks)),
        ("parameters", "\n".join([f"{found.parameters['all']:,}", *parts])),
        ("context", f"{found.context} tokens{patch}"),
        ("tokenizer", found.tokenizer),
        ("trained on", ", ".join(trained)),
    ]
    if found.saved:
        rows.append(("saved", found.saved))
    rows.append(("temperature", f"{found.temperature:g} by default"))
    files = [f"{name}  {size:,} bytes" for name, size in found.files.items()]
    rows.append(("files", "\n".join(files)))
    print_table(found.name if found.shipped else found.directory, rows)
    if found.card:
        console = Console()
        card = Markdown(found.card) if console.is_terminal else Text(found.card.strip())
        console.print(card, soft_wrap=True)
