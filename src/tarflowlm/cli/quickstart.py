"""`tarflowlm quickstart`: train, evaluate and sample a TarFlowLM on the built-in corpus within a few minutes."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from tarflowlm.cli.signals import stop_on_signals
from tarflowlm.data import cached_corpus
from tarflowlm.device import DeviceName, pick_device
from tarflowlm.errors import UserError
from tarflowlm.evaluation.ngram import ngram_entropy
from tarflowlm.generation import generate
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.runs.presets import preset
from tarflowlm.terminal.console import ProgressReporter, print_samples, print_table, samples_to_json, sampling_bar
from tarflowlm.training.lifecycle import check_new, train

SAMPLING_SHARE = 0.06
"""Of the minutes asked for; the run has the rest, with its validation and test."""
NUM_SAMPLES = 2
SAMPLE_LENGTH = 192


@dataclass(frozen=True)
class QuickstartArgs:
    """Train, evaluate and sample a small model on the built-in corpus, on any CPU, in a few minutes."""

    out: Path = Path("runs/quickstart")
    """Run directory to write; it must not exist."""
    minutes: float = 5.0
    """Time to spend, everything included."""
    seed: int = 0
    """Of weights, data order, noise and samples."""
    device: DeviceName = "auto"
    """auto takes cuda, then mps, then cpu."""
    json: bool = False
    """Print one JSON object last."""


def run_quickstart(args: QuickstartArgs, progress: Console, console: Console) -> dict[str, Any]:
    """Run it; returns the object that --json prints. The run directory can be used by every other command."""
    start = time.perf_counter()
    if not 0 < args.minutes < math.inf:
        raise UserError(f"minutes {args.minutes}: must be above 0 and finite")
    check_new(args.out)
    device = pick_device(args.device)
    run = replace(preset("quickstart"), seed=args.seed)
    with ProgressReporter(progress) as reporter:
        corpus = cached_corpus(
            run.data.source, run.data.tokenizer, progress=reporter.preparing, notice=reporter.notice
        )
        left = args.minutes * (1 - SAMPLING_SHARE) - (time.perf_counter() - start) / 60
        # whatever is left: every stage takes a step at least
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
            return_passes=True,
            decoder="auto",
            tick=tick,
        )
    seconds = time.perf_counter() - start
    samples = samples_to_json(result, tokenizer)
    unigram, trigram = ngram_entropy(text, 1), ngram_entropy(text, 3)
    print_samples(console, result, tokenizer)
    rows = [
        ("this model, test text", f"<= {test['bpc']:.3f} bits per character"),
        ("unigram entropy of that text", f"{unigram:.3f}"),
        ("trigram entropy of that text", f"{trigram:.3f}"),
        ("time", f"{seconds:.0f} s in all"),
        ("run directory", str(args.out)),
    ]
    print_table(console, "quickstart", rows)
    return {
        "bpc": test["bpc"],
        "bound": test["bound"],
        "unigram_bpc": unigram,
        "trigram_bpc": trigram,
        "seconds": seconds,
        "samples": samples,
        "out": str(args.out),
        "test_tokens": test["tokens"],
    }
