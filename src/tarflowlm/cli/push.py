"""`tarflowlm push`: a model and its card onto the Hugging Face hub."""

import tempfile
from pathlib import Path

from rich.console import Console

from tarflowlm.cli.arguments import PushArgs
from tarflowlm.cli.models import load_checkpoint
from tarflowlm.errors import UserError
from tarflowlm.runs.hub import hub_client
from tarflowlm.sharing import checked_repository, push_folder, save_pretrained
from tarflowlm.terminal.tables import print_json, print_notice, print_table


def run_push(args: PushArgs) -> None:
    repository = checked_repository(args.repository)
    name = repository.rpartition("/")[2]
    if not args.dry_run:
        hub_client(f"pushing {repository}")
    out = Path(name) if args.out is None and args.dry_run else args.out
    if out is not None and out.exists():
        raise UserError(f"{out} exists already: name a new directory with --out")
    with tempfile.TemporaryDirectory() as place:
        folder = save_pretrained(
            load_checkpoint(args.directory),
            Path(place) / name if out is None else out,
            half=args.half,
            licence=args.licence,
            repository=repository,
        )
        sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        url = None
        if not args.dry_run:
            size = sum(sizes.values()) / 1e6
            print_notice(Console(stderr=True), f"uploading {len(sizes)} files, {size:.2f} MB, to {repository}")
            url = push_folder(folder, repository, private=args.private)
    written = None if out is None else str(out)
    if args.json:
        print_json({"repository": repository, "private": args.private, "out": written, "url": url, "files": sizes})
        return
    rows = [(file, f"{size:,} bytes") for file, size in sizes.items()]
    if written is not None:
        rows.append(("written to", written))
    title = f"{repository}: would be uploaded" if url is None else url
    print_table(Console(), title, rows)
