"""`tarflowlm info`: what a model is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from tarflowlm.cli.options import PrintJson, arg, load_checkpoint


@dataclass(frozen=True)
class Args:
    """Describe a model: its shape, training and likelihood. Without one, list the models of the
    package.
    """

    directory: Annotated[tyro.conf.Positional[Path | None], arg("[MODEL]")] = None
    """Run directory, hf:OWNER/NAME, or a model of the package; without it those are listed."""
    json: PrintJson = False


def run(args: Args) -> None:
    from tarflowlm.runs.hub import DEFAULT, FOLDER, released
    from tarflowlm.terminal.bars import print_json, print_result

    if args.directory is None:
        models = [_describe(FOLDER / name) for name in released()]
        note = {DEFAULT: ", the default"}
        lines = ((m["name"], f"{m['purpose']}\n{_kind(m)}; {m['tokenizer']}") for m in models)
        rows = [(name + note.get(name, ""), text) for name, text in lines]
        title = "models that come with the package; `tarflowlm info NAME` says more"
        print_result(args.json, {"models": models}, title, rows)
        return
    found = _describe(args.directory)
    if args.json:
        print_json(found)
    else:
        _print_info(found)


def _describe(given: Path) -> dict[str, Any]:
    """A model as `--json` shows it."""
    from datetime import UTC, datetime

    from tarflowlm.model_config import BaselineConfig
    from tarflowlm.runs.checkpoint import WEIGHTS, read_summary
    from tarflowlm.runs.hub import CARD, FOLDER, is_reference, purpose

    checkpoint = load_checkpoint(given, "cpu")
    directory, run, model, tokenizer = (
        checkpoint.directory,
        checkpoint.run,
        checkpoint.model,
        checkpoint.tokenizer,
    )
    config, info = run.model, checkpoint.info
    test = (read_summary(directory) or {}).get("test") or {}
    card, shipped = directory / CARD, directory.parent == FOLDER
    saved = datetime.fromtimestamp((directory / WEIGHTS).stat().st_mtime, UTC)
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        first, *rest = name.split(".")
        part = first.replace("_", " ")
        if first == "prior":
            kind = "transformer" if rest[2] == "transformer" else "coupling and input"
            part = f"block {int(rest[1]) + 1} {kind}"
        parts[part] = parts.get(part, 0) + parameter.numel()
    files = {}
    for path in sorted(directory.iterdir()):
        if not path.name.startswith((".", "__")):
            within = [path, *path.rglob("*")] if path.is_dir() else [path]
            files[path.name + "/" * path.is_dir()] = sum(
                file.stat().st_size for file in within if file.is_file()
            )
    layers = (
        [config.layers] if isinstance(config, BaselineConfig) else [b.layers for b in config.blocks]
    )
    name = given.as_posix() if is_reference(given) else directory.resolve().name
    blocks = [config.describe(block) for block in range(model.num_blocks)]
    symbols = f"{tokenizer.kind}, {tokenizer.vocab_size:,} symbols, normalisation {tokenizer.normalization}"
    steps, tokens = (
        int(info[key]) if info.get(key, "").isdigit() else None for key in ("step", "tokens")
    )
    found: dict[str, Any] = {
        "name": name,
        "directory": str(directory),
        "shipped": shipped,
        "preset": run.name,
    }
    found |= {"family": config.family, "blocks": blocks, "layers": layers[: model.num_blocks]}
    found |= {
        "parameters": {"all": sum(parts.values()), **parts},
        "context": config.context,
        "patch": config.patch,
    }
    found |= {"vocab_size": tokenizer.vocab_size, "tokenizer": symbols, "source": run.data.source}
    # of a shipped model `saved` would be the date of its installation
    found |= {
        "steps": steps,
        "tokens": tokens,
        "seed": run.seed,
        "saved": None if shipped else f"{saved:%Y-%m-%d}",
    }
    found |= {
        "bpc": test.get("bpc"),
        "bound": test.get("bound"),
        "temperature": run.temperature,
        "files": files,
    }
    found["purpose"] = purpose(directory)
    return found | {"card": card.read_text(encoding="utf-8") if card.is_file() else None}


def _kind(found: dict[str, Any]) -> str:
    from tarflowlm.evaluation.likelihood import sign_of

    count = len(found["blocks"])
    kind = (
        "discrete autoregressive"
        if found["family"] == "ar"
        else f"flow of {count} block{'s' * (count != 1)}"
    )
    bits = (
        ""
        if found["bpc"] is None
        else f", {sign_of(found['bound'])} {found['bpc']:.4f} bits per character"
    )
    return f"{kind}, {found['parameters']['all'] / 1e6:.1f} M parameters{bits}"


def _print_info(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.text import Text

    from tarflowlm.terminal.bars import print_table

    layers = zip(found["blocks"], found["layers"], strict=True)
    parts = [f"{count:,} {name}" for name, count in found["parameters"].items() if name != "all"]
    trained = [f"{found[name]:,} {name}" for name in ("tokens", "steps") if found[name] is not None]
    patch = f", {found['patch']} per position" if found["patch"] > 1 else ""
    rows = [
        ("model", f"{_kind(found)}, preset {found['preset']}"),
        (
            "blocks",
            "\n".join(f"{block}: {n} Transformer layer{'s' * (n != 1)}" for block, n in layers),
        ),
        ("parameters", "\n".join([f"{found['parameters']['all']:,}", *parts])),
        ("context", f"{found['context']} tokens{patch}"),
        ("tokenizer", found["tokenizer"]),
        ("trained on", ", ".join([found["source"], *trained, f"seed {found['seed']}"])),
    ]
    if found["saved"]:
        rows.append(("saved", found["saved"]))
    rows.append(("temperature", f"{found['temperature']:g} by default"))
    rows.append(
        ("files", "\n".join(f"{name}  {size:,} bytes" for name, size in found["files"].items()))
    )
    print_table(found["name"] if found["shipped"] else found["directory"], rows)
    if found["card"]:
        console = Console()
        console.print(
            Markdown(found["card"]) if console.is_terminal else Text(found["card"].strip()),
            soft_wrap=True,
        )
