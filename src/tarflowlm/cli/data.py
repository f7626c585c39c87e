"""`tarflowlm data`: a corpus as token shards."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from tarflowlm.cli.options import Flag, Out, PrintJson, arg
from tarflowlm.config import TokenizerConfig
from tarflowlm.errors import UserError

SOURCES = "english (built in), text8, openwebtext, a text or .jsonl file (FILE#FIELD), .gz, .xz or .zst, or a folder."


@dataclass(frozen=True)
class Args:
    """Turn a corpus or text file into token shards. Without one, list the texts and tokens in the
    cache.
    """

    source: Annotated[tyro.conf.Positional[str | None], arg("[SOURCE]", SOURCES)] = None
    out: Out = None  # Directory to create.
    empty: Flag = False  # Without SOURCE: empty the cache. What is needed again is made again.
    tokenizer: Annotated[TokenizerConfig, tyro.conf.arg(name="")] = field(
        default_factory=TokenizerConfig
    )
    """The tokenizer."""
    json: PrintJson = False

    def __post_init__(self) -> None:
        if (self.source is None) != (self.out is None) or (self.empty and self.source is not None):
            raise UserError(
                "give SOURCE and --out, or neither of them to see the cache, and --empty to empty it"
            )


def run(args: Args) -> None:
    if args.source is None or args.out is None:
        _show_cache(args)
        return
    from tarflowlm.data import prepare_corpus, suited
    from tarflowlm.terminal.bars import Bars, print_notice, print_result

    with Bars() as bars:
        tokenizer = suited(args.source, args.tokenizer)
        corpus = prepare_corpus(args.source, tokenizer, args.out, progress=bars)
    splits = ("train", "valid", "test")
    counts = {name: corpus.num_tokens(name) for name in splits}
    vocab_size = corpus.tokenizer.vocab_size
    found = {"out": str(args.out), "vocab_size": vocab_size, "tokens": counts}
    rows = [
        (name, f"{counts[name]:,} tokens, {corpus.num_characters(name):,} characters")
        for name in splits
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
        sizes[entry.relative_to(root).as_posix()] = sum(
            file.stat().st_size for file in files if file.is_file()
        )
        if args.empty:
            remove_entry(entry)
    rows = [(name, f"{size / 1e6:,.1f} MB") for name, size in sizes.items()]
    rows.append(("in all", f"{sum(sizes.values()) / 1e6:,.1f} MB" + ", removed" * args.empty))
    print_result(
        args.json, {"cache": str(root), "bytes": sizes, "removed": args.empty}, str(root), rows
    )
