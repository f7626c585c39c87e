"""`tarflowlm data`: a text as token shards, and the cache of such shards."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from tarflowlm.cli.options import Flag, Out, PrintJson, arg
from tarflowlm.config import TokenizerConfig
from tarflowlm.errors import UserError

SOURCES = (
    "english (built in), text8, openwebtext, a text or .jsonl file (FILE#FIELD), "
    "also as .gz or .xz, or a folder."
)


@dataclass(frozen=True)
class Args:
    """Turn a text into token shards, in a directory of its own. Without a text, list the cache."""

    source: Annotated[tyro.conf.Positional[str | None], arg("[SOURCE]", SOURCES)] = None
    out: Out = None  # Directory to create.
    empty: Flag = False  # Remove the texts and tokens in the cache; takes no SOURCE.
    tokenizer: Annotated[TokenizerConfig, tyro.conf.arg(name="")] = field(
        default_factory=TokenizerConfig
    )
    """The tokenizer."""
    json: PrintJson = False

    def __post_init__(self) -> None:
        is_given = self.source is not None
        if is_given != (self.out is not None) or (is_given and self.empty):
            remedy = "to see the cache give neither, and --empty to empty it"
            raise UserError(f"SOURCE and --out go together: {remedy}")


def run(args: Args) -> None:
    if args.source is None or args.out is None:
        _show_cache(args)
        return
    from tarflowlm.data import prepare_corpus, suited
    from tarflowlm.data.splits import SPLITS
    from tarflowlm.terminal.bars import Bars, print_notice, print_result

    with Bars() as bars:
        tokenizer = suited(args.source, args.tokenizer)
        corpus = prepare_corpus(args.source, tokenizer, args.out, progress=bars)
    counts = {name: corpus.num_tokens(name) for name in SPLITS}
    vocab_size = corpus.tokenizer.vocab_size
    found = {"out": str(args.out), "vocab_size": vocab_size, "tokens": counts}
    rows = [
        (name, f"{counts[name]:,} tokens, {corpus.num_characters(name):,} characters")
        for name in SPLITS
    ]
    print_result(args.json, found, f"{args.out}: {vocab_size} symbols", rows)
    print_notice(f"next: tarflowlm train mini-mixd --data {args.out} --out runs/mine")


def _show_cache(args: Args) -> None:
    from tarflowlm.files import cache_root
    from tarflowlm.locks import remove_entry
    from tarflowlm.terminal.bars import print_result

    root = cache_root()
    sizes = {}
    for entry in sorted([*root.glob("corpora/*"), *root.glob("sources/*")]):
        files = [entry, *entry.rglob("*")]
        size = sum(file.stat().st_size for file in files if file.is_file())
        sizes[entry.relative_to(root).as_posix()] = size
        if args.empty:
            remove_entry(entry)
    rows = [(name, f"{size / 1e6:,.1f} MB") for name, size in sizes.items()]
    total = f"{sum(sizes.values()) / 1e6:,.1f} MB"
    rows.append(("in all", f"{total}, removed" if args.empty else total))
    found = {"cache": str(root), "bytes": sizes, "removed": args.empty}
    print_result(args.json, found, str(root), rows)
