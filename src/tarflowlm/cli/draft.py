"""`tarflowlm draft RUN`: trains the draft of a finished run."""

from rich.console import Console

from tarflowlm.cli.configured import DraftArgs
from tarflowlm.cli.models import locate
from tarflowlm.cli.signals import stop_on_signals
from tarflowlm.device import pick_device
from tarflowlm.errors import UserError
from tarflowlm.runs.drafts import DRAFT
from tarflowlm.runs.released import borrowed, chosen
from tarflowlm.terminal.tables import print_json, print_table
from tarflowlm.terminal.training import DraftReporter
from tarflowlm.training.draft import DraftTraining, train_draft


def run_draft(args: DraftArgs) -> None:
    given = chosen(args.directory, args.model)
    if args.out is None and (whose := borrowed(given)) is not None:
        raise UserError(f"{whose}: name a directory for a copy of it with --out")
    directory = locate(given)
    if args.resume and args.out is not None:
        raise UserError(f"--resume with --out {args.out}: resume that directory itself, `draft {args.out} --resume`")
    training: DraftTraining | None = DraftTraining(seed=args.seed)
    if args.minutes is not None:
        training = DraftTraining(seed=args.seed, minutes=args.minutes)
    elif args.steps is not None:
        training = DraftTraining(seed=args.seed, steps=args.steps)
    elif args.resume:
        training = None
    with DraftReporter(Console(stderr=True)) as reporter:
        summary = train_draft(
            directory,
            config=args.draft,
            training=training,
            data=args.data,
            out=args.out,
            resume=args.resume,
            device=pick_device(args.device),
            reporter=reporter,
            stop_requests=stop_on_signals,
        )
    if args.json:
        print_json(summary)
        return
    rows = [
        ("valid", f"{summary['tokens_per_pass']:.2f} tokens final per pass of block 1 (1 without a draft)"),
        ("trained", f"{summary['steps']:,} steps in {summary['seconds']:,.0f} s"),
        ("parameters", f"{summary['parameters']:,}"),
    ]
    print_table(Console(), str((args.out or directory) / DRAFT), rows)
