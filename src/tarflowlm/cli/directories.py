"""`tarflowlm data`, `report` and `export`: directories of tokens, figures and models."""

from rich.console import Console

from tarflowlm.cli.arguments import ExportArgs, ReportArgs
from tarflowlm.cli.configured import DataArgs
from tarflowlm.data import prepare_corpus
from tarflowlm.device import pick_device
from tarflowlm.report import write_report
from tarflowlm.runs.checkpoint import export
from tarflowlm.terminal.bars import stages_bar
from tarflowlm.terminal.tables import print_json, print_table

SPLITS = ("train", "valid", "test")


def run_data(args: DataArgs) -> None:
    corpus = prepare_corpus(args.source, args.tokenizer, args.out)
    counts = {name: corpus.num_tokens(name) for name in SPLITS}
    vocab_size = corpus.tokenizer.vocab_size
    if args.json:
        print_json({"out": str(args.out), "vocab_size": vocab_size, "tokens": counts})
        return
    rows = [(name, f"{counts[name]:,} tokens, {corpus.num_characters(name):,} characters") for name in SPLITS]
    print_table(Console(), f"{args.out}: {vocab_size} symbols", rows)


def run_report(args: ReportArgs) -> None:
    with stages_bar(Console(stderr=True)) as progress:
        result = write_report(args.directories, args.out, device=pick_device(args.device), progress=progress)
    if args.json:
        print_json(result)
        return
    rows = [("page", result["page"]), ("figures", f"{len(result['figures'])} in PNG beside it")]
    for run in result["runs"]:
        rows.append((run["name"], run["status"]))
        rows += [("", note) for note in run["notes"]]
    print_table(Console(), "report", rows)


def run_export(args: ExportArgs) -> None:
    out = export(args.directory, args.out, half=args.half)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if args.json:
        print_json({"out": str(out), "bytes": size})
        return
    print_table(Console(), str(out), [("size", f"{size / 1e6:.2f} MB")])
