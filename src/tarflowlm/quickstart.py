"""`tarflowlm quickstart`: train, evaluate and sample a TarFlowLM on the built-in corpus within a few minutes."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from tarflowlm.checkpoint import load_checkpoint
from tarflowlm.console import ProgressReporter, print_samples, print_table, samples_to_json, sampling_bar
from tarflowlm.data import WindowSampler, cached_corpus
from tarflowlm.device import DeviceName, pick_device
from tarflowlm.errors import UserError
from tarflowlm.evaluation.ngram import ngram_entropy
from tarflowlm.generation import generate
from tarflowlm.model import FlowConfig
from tarflowlm.presets import preset
from tarflowlm.training.config import RunConfig
from tarflowlm.training.progressive import check_new, train
from tarflowlm.training.signals import stop_on_signals
from tarflowlm.training.timing import TIMED_STEPS, seconds_per_step

TRAINING_SHARE = 0.72
"""Of the minutes asked for; the rest is start-up, validation, test, and sampling."""
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
    corpus = cached_corpus(run.data.source, run.data.tokenizer)
    with ProgressReporter(progress) as reporter:
        reporter.notice(f"timing {TIMED_STEPS} steps of every stage on {device}")
        run = fit_to_time(run, 60 * args.minutes * TRAINING_SHARE, device)
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


def fit_to_time(run: RunConfig, seconds: float, device: torch.device) -> RunConfig:
    """The run with its stages' steps set so that training takes about `seconds`; their shares of time stay.

    A few steps of every stage are timed on throw-away models, so the steps, and with them the result, depend on the
    machine; the steps chosen stand in config.json.
    """
    corpus = cached_corpus(run.data.source, run.data.tokenizer)
    assert isinstance(run.model, FlowConfig)
    model_config = replace(run.model, vocab_size=corpus.tokenizer.vocab_size)
    sampler = WindowSampler(
        corpus.split("train"), window=model_config.context, batch=run.train.batch_size, seed=run.seed
    )
    shares = [steps / sum(run.train.stage_steps) for steps in run.train.stage_steps]
    steps = []
    for stage, share in enumerate(shares):
        per_step = seconds_per_step(replace(run, model=model_config), stage, sampler.next, device)
        steps.append(max(1, int(share * seconds / per_step)))
    return replace(run, train=replace(run.train, stage_steps=tuple(steps)))
