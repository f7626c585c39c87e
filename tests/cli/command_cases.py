"""Options of a tiny run, and the files of a folder."""

from pathlib import Path

TINY = [
    "--model.context",
    "32",
    "--model.trunk.width",
    "32",
    "--train.batch-size",
    "4",
    "--train.evaluate-windows",
    "4",
    "--device",
    "cpu",
    *(word for block in "012" for word in (f"--model.blocks.{block}.layers", "1")),
]
TINY_AR = [*TINY[:10], "--model.layers", "1"]
CHECKPOINT = {"config.json", "model.safetensors", "tokenizer.json"}


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
