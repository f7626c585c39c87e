"""`tarflowlm info`: what a model is."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tarflowlm.errors import counted
from tarflowlm.options import PrintJson, arg, load_checkpoint
from tarflowlm.terminal.bars import print_json, print_result, print_table


@dataclass(frozen=True)
class Args:
    """Describe a model: its shape, training and likelihood. Without one, list the models of the
    package.
    """

    directory: Annotated[tyro.conf.Positional[Path | None], arg("[MODEL]")] = None
    """Run directory, shipped model or hf:OWNER/NAME."""
    json: PrintJson = False


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
    purpose: str
    card: str

    @property
    def kind(self) -> str:
        """Its kind, its size and its likelihood, in half a line."""
        from tarflowlm.evaluation.likelihood import sign_of

        kind = f"flow of {counted(len(self.blocks), 'block')}"
        if self.family == "ar":
            kind = "discrete autoregressive"
        found = f"{kind}, {self.parameters / 1e6:.1f} M parameters"
        if self.bpc is not None:
            found += f", {sign_of(self.bound)} {self.bpc:.4f} bits per character"
        return found


def run(args: Args) -> None:
    from tarflowlm.runs.hub import DEFAULT, FOLDER, released

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
    from tarflowlm.model_config import BaselineConfig
    from tarflowlm.runs.checkpoint import read_summary
    from tarflowlm.runs.hub import is_reference, purpose, read_card

    lm = load_checkpoint(given, "cpu")
    config = lm.run.model
    tokenizer = lm.tokenizer
    test = (read_summary(lm.directory) or {}).get("test", {})
    if isinstance(config, BaselineConfig):
        layers = [config.layers]
    else:
        layers = [block.layers for block in config.blocks[: lm.model.num_blocks]]
    card = read_card(lm.directory)
    sizes = {name: one.numel() for name, one in lm.model.named_parameters()}
    counts = {name: int(lm.info[name]) for name in ("step", "tokens") if name in lm.info}
    return Description(
        name=given.as_posix() if is_reference(given) else lm.directory.resolve().name,
        preset=lm.run.name,
        family=config.family,
        blocks=[config.describe(block) for block in range(lm.model.num_blocks)],
        layers=layers,
        parameters=sum(sizes.values()),
        trunk_parameters=sum(n for name, n in sizes.items() if "transformer." in name),
        context=config.context,
        patch=config.patch,
        tokenizer=(
            f"{tokenizer.kind}, {tokenizer.vocab_size:,} symbols, "
            f"normalisation {tokenizer.normalization}"
        ),
        source=lm.run.data.source,
        steps=counts.get("step"),
        tokens=counts.get("tokens"),
        seed=lm.run.seed,
        bpc=test.get("bpc"),
        bound=test.get("bound", ""),
        temperature=lm.run.temperature,
        purpose=purpose(card),
        card=card,
    )


def _print(found: Description) -> None:
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
        ("temperature", f"{found.temperature:g} by default"),
    ]
    print_table(found.name, rows)
    if found.card:
        console = Console()
        card = Markdown(found.card) if console.is_terminal else Text(found.card.strip())
        console.print(card, soft_wrap=True)
