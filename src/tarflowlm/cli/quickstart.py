"""`tarflowlm quickstart`: train, evaluate and sample a TarFlowLM on the built-in corpus within a few minutes."""

import time
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console

from tarflowlm.cli.arguments import QuickstartArgs
from tarflowlm.cli.signals import stop_on_signals
from tarflowlm.data import Corpus, cached_corpus
from tarflowlm.device import pick_device
from tarflowlm.evaluation.ngram import bigram_cross_entropy, compressed_bits, ngram_entropy
from tarflowlm.generation import generate
from tarflowlm.presets import preset
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.terminal.bars import sampling_bar
from tarflowlm.terminal.tables import print_json, print_table
from tarflowlm.terminal.texts import print_samples, samples_to_json
from tarflowlm.terminal.training import ProgressReporter
from tarflowlm.training.lifecycle import check_new, train

SAMPLING_SHARE = 0.06
"""Of --minutes; the run has the rest, including validation and test."""
SAMPLING_MINUTES = 0.15
"""At least, unless that were most of --minutes."""
YARDSTICKS = {
    "bigram_bpc": "bigrams of the same tokens",
    "bz2_bpc": "bz2, a compressor",
    "lzma_bpc": "lzma, another",
    "trigram_bpc": "trigrams of characters",
}
"""What the table compares the model with."""
NUM_SAMPLES = 2
SAMPLE_LENGTH = 192


def run_quickstart(args: QuickstartArgs) -> None:
    start = time.perf_counter()
    progress, console = Console(stderr=True), Console()
    check_new(args.out)
    device = pick_device(args.device)
    run = replace(preset("quickstart"), seed=args.seed)
    with ProgressReporter(progress) as reporter:
        corpus = cached_corpus(run.data.source, run.data.tokenizer)
        # before the training, whose time is what is left
        yardsticks = _yardsticks(corpus)
        sampling = max(SAMPLING_SHARE * args.minutes, min(SAMPLING_MINUTES, 0.3 * args.minutes))
        left = args.minutes - sampling - (time.perf_counter() - start) / 60
        # however little is left, every stage takes at least one step
        run = replace(run, train=replace(run.train, minutes=max(left, args.minutes / 100)))
        summary = train(run, args.out, device=device, reporter=reporter, stop_requests=stop_on_signals)
    test = summary["test"]
    checkpoint = load_checkpoint(args.out, device)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    length = min(SAMPLE_LENGTH, run.model.context)
    with sampling_bar(progress, model, length) as tick:
        result = generate(
            model,
            num_tokens=length,
            num=NUM_SAMPLES,
            generator=torch.Generator().manual_seed(args.seed),
            decoder="auto",
            tick=tick,
        )
    seconds = time.perf_counter() - start
    print_samples(console, result, tokenizer)
    rows = [
        ("this model, test text", f"<= {test['bpc']:.3f} bits per character"),
        *((label, f"{yardsticks[name]:.3f}") for name, label in YARDSTICKS.items()),
        ("time", f"{seconds:.0f} s in total"),
        ("run directory", str(args.out)),
    ]
    print_table(console, "quickstart", rows)
    if args.json:
        print_json(
            {
                "bpc": test["bpc"],
                "bound": test["bound"],
                **yardsticks,
                "seconds": seconds,
                "samples": samples_to_json(result, tokenizer),
                "out": str(args.out),
                "test_tokens": test["tokens"],
            }
        )


def _yardsticks(corpus: Corpus) -> dict[str, float]:
    """Bits per character of the test text without a neural network."""
    known, unseen = (np.asarray(corpus.split(split)) for split in ("train", "test"))
    text = corpus.tokenizer.decode(unseen.tolist())
    bigram = bigram_cross_entropy(known, unseen, corpus.tokenizer.vocab_size)
    return {
        "unigram_bpc": ngram_entropy(text, 1),
        "trigram_bpc": ngram_entropy(text, 3),
        "bigram_bpc": bigram * len(unseen) / len(text),
        **{f"{name}_bpc": value for name, value in compressed_bits(text).items()},
    }
