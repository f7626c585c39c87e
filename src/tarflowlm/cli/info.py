"""`tarflowlm info`: a model described, or the list of models; folders of runs are compared."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.text import Text

from tarflowlm.cli.compare import compare
from tarflowlm.cli.options import Json
from tarflowlm.errors import UserError, counted
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
from tarflowlm.terminal.bars import print_json, print_result, print_table

Model = dict[str, Any]
"""A model as --json shows it."""


@dataclass(frozen=True, kw_only=True)
class Args(Json):
    """Describe a model: its shape, training and likelihood. Without one, list the models of the
    package. Given folders of runs, compare them: bits per character, tokens, time and state.
    """

    directories: Annotated[tyro.conf.Positional[tuple[Path, ...]], arg("[MODEL or DIR ...]")] = ()
    """Run directories, shipped models or hf:OWNER/NAME; or folders of runs, two levels deep."""
    compare: Flag = False
    """Compare runs in a table, even if only one is given: `tarflowlm runs`."""
    disk: Flag = False
    """Say where models, prepared texts, compiled steps and runs lie, how large they are, and what
    may be deleted.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare and not self.directories:
            raise UserError("name the directory that holds the runs, say `tarflowlm runs runs`")
        for path in self.directories:
            if not path.is_dir():
                check_model(path)


def run(args: Args) -> None:
    paths = args.directories
    if args.disk:
        from tarflowlm.cli.disk import show_disk

        show_disk(paths, as_json=args.json)
        return
    folders = filter(Path.is_dir, map(folder_of, paths))
    if args.compare or not all((folder / CONFIG).exists() for folder in folders):
        compare(paths, as_json=args.json)
        return
    models = list(map(describe, paths or [FOLDER / name for name in released()]))
    if len(paths) == 1:
        if args.json:
            print_json(models[0])
        else:
            _print_model(models[0])
        return
    rows = []
    for model in models:
        name = f"{model['name']}, the default" if model["name"] == DEFAULT else model["name"]
        lines = [model["purpose"], f"{_kind(model)}; {model['tokenizer']}"]
        rows.append((name, "\n".join(filter(None, lines))))
    which = "models" if paths else "models that come with the package"
    title = f"{which}; `tarflowlm info NAME` says more"
    print_result(args.json, {"models": models}, title, rows)


def describe(given: Path) -> Model:
    """Describe the model of a path or a name."""
    from tarflowlm.config import TOKENIZERS
    from tarflowlm.data import load_tokenizer
    from tarflowlm.model_config import BaselineConfig
    from tarflowlm.runs.checkpoint import locate, read_run, read_summary
    from tarflowlm.runs.weights import read_weights

    # not loaded, so that couplings of modules that are not imported can be shown
    folder = locate(given)
    run = read_run(folder, is_shown=True)
    tensors, info = read_weights(folder / WEIGHTS)
    config, how = run.model, run.data.tokenizer
    kind, vocab_size, normalization = how.kind, config.vocab_size, how.normalization
    if kind in TOKENIZERS:  # else its module is not imported
        tokenizer = load_tokenizer(folder / TOKENIZER)
        kind, vocab_size = tokenizer.kind, tokenizer.vocab_size
        normalization = tokenizer.normalization
    test = (read_summary(folder) or {}).get("test", {})
    trained = int(info.get("blocks", config.num_blocks))
    if isinstance(config, BaselineConfig):
        layers = [config.layers]
    else:
        layers = [block.layers for block in config.blocks[:trained]]
    card = read_card(folder)
    sizes = {name: one.numel() for name, one in tensors.items()}
    counts = {name: int(info[name]) for name in ("step", "tokens") if name in info}
    symbols = f"{vocab_size:,} symbols, normalisation {normalization}"
    return {
        "name": shown_name(given, folder),
        "preset": run.name,
        "family": config.family,
        "blocks": [config.describe(block) for block in range(len(layers))],
        "layers": layers,
        "parameters": sum(sizes.values()),
        "trunk_parameters": sum(n for name, n in sizes.items() if "transformer." in name),
        "context": config.context,
        "patch": config.patch,
        "tokenizer": f"{kind}, {symbols}",
        "source": run.data.source,
        "steps": counts.get("step"),
        "tokens": counts.get("tokens"),
        "seed": run.seed,
        "bpc": test.get("bpc"),
        "bound": config.bound,
        "temperature": run.temperature,
        "top_p": run.top_p,
        "purpose": purpose(card),
        "card": card,
    }


def _kind(model: Model) -> str:
    """Its kind, its size and its likelihood, in half a line."""
    from tarflowlm.evaluation.likelihood import sign_of

    kind = f"flow of {counted(len(model['blocks']), 'block')}"
    if model["bound"] == "exact":
        kind = "discrete autoregressive"
    found = f"{kind}, {model['parameters'] / 1e6:.1f} M parameters"
    if model["bpc"] is not None:
        found += f", {sign_of(model['bound'])} {model['bpc']:.4f} bits per character"
    return found


def _print_model(model: Model) -> None:
    from rich.markdown import Markdown

    layers = zip(model["blocks"], model["layers"], strict=True)
    blocks = [f"{block}: {counted(n, 'Transformer layer')}" for block, n in layers]
    trained = [model["source"], f"seed {model['seed']}"]
    trained += [f"{model[n]:,} {n}" for n in ("tokens", "steps") if model[n] is not None]
    patch = f", {model['patch']} per position" if model["patch"] > 1 else ""
    trunk = f"{model['trunk_parameters']:,} of them in Transformers"
    usual = f"temperature {model['temperature']:g}, top-p {model['top_p']:g} by default"
    rows = [
        ("model", f"{_kind(model)}, preset {model['preset']}"),
        ("blocks", "\n".join(blocks)),
        ("parameters", f"{model['parameters']:,}, {trunk}"),
        ("context", f"{model['context']} tokens{patch}"),
        ("tokenizer", model["tokenizer"]),
        ("trained on", ", ".join(trained)),
        ("samples", usual),
    ]
    print_table(model["name"], rows)
    if model["card"]:
        console = Console()
        card = Markdown(model["card"]) if console.is_terminal else Text(model["card"].strip())
        console.print(card, soft_wrap=True)
