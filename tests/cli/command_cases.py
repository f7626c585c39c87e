"""Tiny runs as the command line makes them, shared by the tests of the commands."""

from pathlib import Path

from tarflowlm.runs.manifest import write_manifest

TINY = ["--model.context", "32", "--model.trunk.width", "32", "--train.batch-size", "4", "--device", "cpu"]
ONE_LAYER = [option for i in range(3) for option in (f"--model.blocks.{i}.layers", "1")]
FAMILIES = {
    "mini-ar": ["--model.layers", "1"],
    "mini-affine": ONE_LAYER,
    "mini-mix1": ONE_LAYER,
    "mini-mixd": ONE_LAYER,
    "mini-mixd-p2": ONE_LAYER,
}
CHECKPOINT = {"config.json", "model.safetensors", "tokenizer.json"}


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def put_config(run: Path, text: str) -> None:
    (run / "config.json").write_text(text, encoding="utf-8")
    write_manifest(run, CHECKPOINT)
