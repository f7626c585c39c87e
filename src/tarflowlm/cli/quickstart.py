"""`tarflowlm quickstart`: train, evaluate and sample a TarFlowLM on the built-in corpus within a few minutes."""

import time
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console

from tarflowlm.cli.arguments import QuickstartArgs
from tarflowlm.cli.signals import stop_on_signals
from tarflowlm.data import cached_corpus
from tarflowlm.device import pick_device
from tarflowlm.evaluation.ngram import ngram_entropy
from tarflowlm.generation import generate
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.runs.presets import preset
from tarflowlm.terminal.bars import sampling_bar
from tarflowlm.terminal.tables import print_json, print_table
from tarflowlm.terminal.texts import print_samples, samples_to_json
from tarflowlm.terminal.training import ProgressReporter
from tarflowlm.training.lifecycle import check_new, train

SAMPLING_SHARE = 0.06
"""Of --minutes; the run has the rest, including validation and test."""
NUM_SAMPLES = 2
SAMPLE_LENGTH = 192


def run_quickstart(args: QuickstartArgs) -> None:
    start = time.perf_counter()
    progress, console = Console(stderr=True), Console()
    check_new(args.out)
    device = pick_device(args.device)
    run = replace(preset("quickstart"), seed=args.seed)
    with ProgressReporter(progress) as reporter:
        corpus = cached_corpus(
            run.data.source, run.data.tokenizer, progress=reporter.preparing, notice=reporter.notice
        )
        left = args.minutes * (1 - SAMPLING_SHARE) - (time.perf_counter() - start) / 60
        # however little is left, every stage takes at least one step
        run = replace(run, train=replace(run.train, minutes=max(left, args.minutes / 100)))
        summary = train(run, args.out, device=device, reporter=reporter, stop_requests=stop_on_signals)
    test = summary["test"]
    checkpoint = load_checkpoint(args.out, device)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    text = tokenizer.decode(np.asarray(corpus.split("test")).tolist())
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
    unigram, trigram = ngram_entropy(text, 1), ngram_entropy(text, 3)
    print_samples(console, result, tokenizer)
    rows = [
        ("this model, test text", f"<= {test['bpc']:.3f} bits per character"),
        ("unigram entropy of that text", f"{unigram:.3f}"),
        ("trigram entropy of that text", f"{trigram:.3f}"),
        ("time", f"{seconds:.0f} s in total"),
        ("run directory", str(args.out)),
    ]
    print_table(console, "quickstart", rows)
    if args.json:
        print_json(
            {
                "bpc": test["bpc"],
                "bound": test["bound"],
                "unigram_bpc": unigram,
                "trigram_bpc": trigram,
                "seconds": seconds,
                "samples": samples_to_json(result, tokenizer),
                "out": str(args.out),
                "test_tokens": test["tokens"],
            }
        )
