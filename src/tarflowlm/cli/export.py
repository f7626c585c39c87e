"""`tarflowlm export`: a model without its training state."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, ClassVar

from tarflowlm.cli.options import Copying
from tarflowlm.options import Flag, arg
from tarflowlm.terminal.bars import print_notice, print_result, suggest


@dataclass(frozen=True, kw_only=True)
class Args(Copying):
    """Copy a model out of its run directory: configuration, tokenizer and weights only."""

    EXCLUSIVE: ClassVar = {"half": ("causal_lm",)}

    out: Annotated[Path, arg("PATH")]
    """Directory to create."""
    causal_lm: Flag = False
    """Write block 1 as a language model of transformers (docs/hub.md)."""


def run(args: Args) -> None:
    from tarflowlm.runs.checkpoint import export, import_words, load_checkpoint

    checkpoint = load_checkpoint(args.directory)
    if args.causal_lm:
        # the core starts an application by name
        application = import_module("tarflowlm_apps.transformers_export.checkpoint")
        out = application.save_causal_lm(checkpoint, args.out)
    else:
        out = export(checkpoint, args.out, half=args.half)
    size = sum(path.stat().st_size for path in out.iterdir())
    print_result(
        args.json, {"out": str(out), "bytes": size}, str(out), [("size", f"{size / 1e6:.2f} MB")]
    )
    if args.causal_lm:
        for line in application.what_loads(out):
            print_notice(line)
    else:
        suggest("sample", out, *import_words(out))
