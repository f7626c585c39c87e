"""`tarflowlm quickstart`: in a few minutes, a small TarFlowLM that writes short stories."""

import bz2
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tarflowlm.cli.options import Json, OnDevice
from tarflowlm.errors import UserError
from tarflowlm.options import Seeded, arg
from tarflowlm.presets import preset
from tarflowlm.schema import Positive
from tarflowlm.terminal.bars import (
    Bars,
    print_json,
    print_notice,
    print_table,
    suggest,
)

TEMPLATE = "Once upon a time, there was a [...] who liked to [...]. One day"
"""The text that the model fills in."""
BARS = "▁▂▃▄▅▆▇█"
TRAINING_SHARE = 0.94
"""Share of --minutes until the end of training; the rest is for sampling."""


@dataclass(frozen=True, kw_only=True)
class Args(Json, OnDevice, Seeded):
    """Train a small model on short stories, on any CPU, in a few minutes; it writes three, and
    fills in a fourth.
    """

    out: Annotated[Path, arg("PATH")] = Path("runs/quickstart")
    """Run directory to create."""
    minutes: Positive = 5.0
    """Total time, including evaluation and sampling."""


def run(args: Args) -> None:
    from tarflowlm.cli.signals import stop_on_signals
    from tarflowlm.data import prepare_corpus, suited
    from tarflowlm.device import pick_device
    from tarflowlm.generation.texts import Samples
    from tarflowlm.requests import Writing
    from tarflowlm.runs.checkpoint import load_checkpoint
    from tarflowlm.runs.records import read_record
    from tarflowlm.terminal.texts import print_samples, samples_to_json
    from tarflowlm.training.directory import is_begun
    from tarflowlm.training.train import train

    start = time.perf_counter()
    if is_begun(args.out):
        raise UserError(f"{args.out} exists already: choose another --out")
    device = pick_device(args.device)
    config = replace(preset("quickstart"), seed=args.seed)
    # before reading the text, which takes long
    args.out.mkdir(parents=True, exist_ok=True)
    with Bars(keep=True) as reporter:
        corpus = prepare_corpus(suited(config.data), progress=reporter)
        baselines = baselines_on(corpus.tokenizer.decode(corpus.split("test").tolist()))
        spent = (time.perf_counter() - start) / 60
        # however little time is left, each stage takes a step
        minutes = max(TRAINING_SHARE * args.minutes - spent, args.minutes / 100)
        summary = train(
            replace(config, train=replace(config.train, minutes=minutes)),
            args.out,
            device=device,
            reporter=reporter,
            stop_requests=stop_on_signals,
        )
    lm = load_checkpoint(args.out, device)
    free = Samples(Writing(num=3, num_tokens=config.model.context, seed=args.seed), lm)
    gaps = Samples(Writing(template=TEMPLATE, seed=args.seed), lm)
    with Bars("writing, tokens", free.num_tokens + gaps.num_tokens) as bars:
        (stories,), (filled,) = free.batches(bars), gaps.batches(bars)
    test = summary["test"]
    curve = read_record(args.out).valid["bpc"].tolist()
    found = {
        "bpc": test["bpc"],
        "bound": test["bound"],
        "seconds": time.perf_counter() - start,
        "samples": samples_to_json(stories, lm),
        "filled": samples_to_json(filled, lm),
        "valid_bpc": curve,
        "out": str(args.out),
        "test_tokens": test["tokens"],
        **baselines,
    }
    print_samples(stories, lm)
    print_notice(f"\n{TEMPLATE}")
    print_samples(filled, lm)
    rows = [
        ("unseen stories", f"<= {test['bpc']:.3f} bits per character; fewer are better"),
        ("bz2 on them", f"{baselines['bz2_bpc']:.3f}"),
        ("counting three letters", f"{baselines['trigram_bpc']:.3f}"),
        ("while it learnt", f"{curve[0]:.3f} {sparkline(curve)} {curve[-1]:.3f}"),
        ("time", f"{found['seconds']:.0f} s in total"),
        ("run directory", str(args.out)),
    ]
    print_table("quickstart", rows)
    suggest("sample", args.out, "--prompt", "Once upon a time")
    if args.json:
        print_json(found)


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, the lowest of them the smallest."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / max(high - low, 1e-9)
    return "".join(BARS[round((value - low) * scale)] for value in values)


def baselines_on(text: str) -> dict[str, float]:
    """Bits per character of a text under simple models, by their names in the results."""
    return {
        "unigram_bpc": ngram_entropy(text, 1),
        "trigram_bpc": ngram_entropy(text, 3),
        "bz2_bpc": 8 * len(bz2.compress(text.encode("utf-8"), 9)) / len(text),
    }


def ngram_entropy(text: str, order: int) -> float:
    r"""Entropy of a character given the `order - 1` before it, from the counts of a text; in bits.

        H_n = - 1/M sum_{w, a} c(w a) log2( c(w a) / c(w) ),   c(w) = sum_a c(w a),   M = T - n + 1

    over the contexts w of n - 1 characters and the next character a. c counts the M n-grams of the
    text of T characters. No n-gram model of this order does better on this text.
    """
    counts = Counter(text[i : i + order] for i in range(len(text) - order + 1))
    contexts: Counter[str] = Counter()
    for gram, count in counts.items():
        contexts[gram[:-1]] += count
    total = sum(c * math.log2(contexts[gram[:-1]] / c) for gram, c in counts.items())
    return total / counts.total()
