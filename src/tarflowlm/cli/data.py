"""`tarflowlm data`: a text as a corpus of tokens."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from tarflowlm.cli.options import Json
from tarflowlm.config import DataConfig, TokenizerConfig
from tarflowlm.errors import is_first_process
from tarflowlm.options import Unwrap, arg
from tarflowlm.terminal.bars import Bars, print_result, suggest

SOURCES = (
    "tales or stories (built in), text8, openwebtext, a text or .jsonl file (FILE#FIELD), "
    "also as .gz or .xz, a folder of these or of .parquet, or hf:OWNER/NAME#FIELD."
)


@dataclass(frozen=True, kw_only=True)
class Args(Json):
    """Turn a text into tokens, in a directory of its own."""

    source: Annotated[tyro.conf.Positional[str], arg("SOURCE", SOURCES)]
    out: Annotated[Path, arg("PATH")]
    """Directory to create."""
    tokenizer: Annotated[TokenizerConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TokenizerConfig(normalize="auto")
    )
    """The tokenizer."""
    unwrap: Unwrap = False


def run(args: Args) -> None:
    from tarflowlm.data import infer_tokenizer, prepare_corpus
    from tarflowlm.data.splits import SPLITS

    if not is_first_process():
        return  # the first one writes, and its tokenizer uses all cores
    with Bars() as bars:
        text = DataConfig(source=args.source, tokenizer=args.tokenizer, unwrap=args.unwrap)
        corpus = prepare_corpus(infer_tokenizer(text), out=args.out, progress=bars)
    counts = {name: corpus.num_tokens(name) for name in SPLITS}
    vocab_size = corpus.tokenizer.vocab_size
    found = {"out": str(args.out), "vocab_size": vocab_size, "tokens": counts}
    rows = [
        (name, f"{counts[name]:,} tokens, {corpus.num_characters(name):,} characters")
        for name in SPLITS
    ]
    print_result(args.json, found, f"{args.out}: {vocab_size} symbols", rows)
    suggest("train", "mini-mixd", "--data", args.out, "--out", "runs/mine")
