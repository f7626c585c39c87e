"""`tarflowlm export`: a model without its training state."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tarflowlm.cli.options import Flag, PrintJson, arg

Exported = Annotated[
    tyro.conf.Positional[Path], arg("MODEL", "Run directory, or the name of a shipped model.")
]


@dataclass(frozen=True)
class Args:
    """Copy a model out of its run directory: configuration, tokenizer and weights only."""

    directory: Exported
    out: Annotated[Path, arg("PATH")]  # Directory to create.
    half: Flag = False  # Store weight matrices in bfloat16, which halves the size.
    json: PrintJson = False


def run(args: Args) -> None:
    from tarflowlm.runs.checkpoint import export, load_checkpoint
    from tarflowlm.terminal.bars import print_notice, print_result

    out = export(load_checkpoint(args.directory), args.out, half=args.half)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print_result(
        args.json, {"out": str(out), "bytes": size}, str(out), [("size", f"{size / 1e6:.2f} MB")]
    )
    print_notice(f"next: tarflowlm sample {out}")
