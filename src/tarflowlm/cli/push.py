"""`tarflowlm push`: a model and its card onto the Hugging Face hub."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tarflowlm.cli.export import Exported
from tarflowlm.cli.options import Flag, Out, PrintJson, Text, arg, check, load_checkpoint


@dataclass(frozen=True)
class Args:
    """Put a model with its model card on the Hugging Face hub; --dry-run writes both here."""

    directory: Exported
    repository: Annotated[
        tyro.conf.Positional[str], arg("OWNER/NAME", "Repository on the hub, made if needed.")
    ]
    space: Flag = False  # Make a Space of it, which runs the studio, in place of a model.
    private: Flag = (
        False  # Only its owner can see it; for a new repository, or one that is private already.
    )
    half: Flag = False  # Store weight matrices in bfloat16, which halves the size.
    licence: Text = None  # Licence of the weights, as the hub calls it: apache-2.0, cc-by-sa-4.0.
    out: Out = None  # Directory to create, to keep what is uploaded.
    # Upload nothing: write the directory, by default ./NAME, and list what would be uploaded.
    dry_run: Flag = False
    json: PrintJson = False

    def __post_init__(self) -> None:
        check(self, exclusive={"dry_run": ("private",)})


def run(args: Args) -> None:
    from tarflowlm.runs.hub import hub_client
    from tarflowlm.sharing import add_space, checked_repository, push_folder, save_pretrained
    from tarflowlm.terminal.bars import print_notice, print_result

    repository = checked_repository(args.repository)
    name = repository.rpartition("/")[2]
    if not args.dry_run:
        hub_client(f"pushing {repository}")
    out = Path(name) if args.out is None and args.dry_run else args.out
    with tempfile.TemporaryDirectory() as place:
        checkpoint, new = (
            load_checkpoint(args.directory, "cpu"),
            Path(place) / name if out is None else out,
        )
        folder = save_pretrained(
            checkpoint, new, half=args.half, licence=args.licence, repository=repository
        )
        if args.space:
            add_space(folder, name)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        url = None
        if not args.dry_run:
            print_notice(
                f"uploading {len(sizes)} files, {sum(sizes.values()) / 1e6:.2f} MB, to {repository}"
            )
            url = push_folder(folder, repository, private=args.private, space=args.space)
    written = None if out is None else str(out)
    found = {
        "repository": repository,
        "private": args.private,
        "out": written,
        "url": url,
        "files": sizes,
    }
    rows = [(file, f"{size:,} bytes") for file, size in sizes.items()]
    rows += [] if written is None else [("written to", written)]
    print_result(args.json, found, f"{repository}: would be uploaded" if url is None else url, rows)
