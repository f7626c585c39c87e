"""`tarflowlm push`: a model and its card onto the Hugging Face hub."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from tarflowlm.cli.options import Copying, load_checkpoint
from tarflowlm.options import Flag, Out, Text, arg
from tarflowlm.terminal.bars import print_notice, print_result


@dataclass(frozen=True, kw_only=True)
class Args(Copying):
    """Upload a model and its model card to the Hugging Face hub; --dry-run only writes them."""

    EXCLUSIVE: ClassVar = {"dry_run": ("private",)}

    repository: Annotated[
        tyro.conf.Positional[str], arg("OWNER/NAME", "Repository on the hub, made if needed.")
    ]
    private: Flag = False
    """Only its owner sees the repository; it must be new or private already."""
    licence: Text = None
    """Licence of the weights, as the hub calls it: apache-2.0, cc-by-sa-4.0."""
    out: Out = None
    """Directory to create, which keeps the uploaded files."""
    dry_run: Flag = False
    """Write the directory, by default ./NAME, and upload nothing."""


def run(args: Args) -> None:
    from tarflowlm_apps.hub.share import checked_repository, push_folder, save_pretrained

    repository = checked_repository(args.repository)
    name = repository.rpartition("/")[2]
    out = Path(name) if args.out is None and args.dry_run else args.out
    checkpoint = load_checkpoint(args.directory, "cpu")
    url = None
    with tempfile.TemporaryDirectory() as place:
        folder = save_pretrained(
            checkpoint,
            out or Path(place) / name,
            half=args.half,
            licence=args.licence,
            repository=repository,
        )
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        if not args.dry_run:
            total = f"{len(sizes)} files, {sum(sizes.values()) / 1e6:.2f} MB"
            print_notice(f"uploading {total}, to {repository}")
            url = push_folder(folder, repository, private=args.private)
    found = {
        "repository": repository,
        "private": args.private,
        "out": None if out is None else str(out),
        "url": url,
        "files": sizes,
    }
    rows = [(file, f"{size:,} bytes") for file, size in sizes.items()]
    if out is not None:
        rows.append(("written to", str(out)))
    title = f"{repository}: would be uploaded" if url is None else url
    print_result(args.json, found, title, rows)
