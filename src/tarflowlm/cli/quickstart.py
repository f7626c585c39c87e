"""`tarflowlm quickstart`: train, evaluate and sample a TarFlowLM on the built-in corpus within a
few minutes.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from tarflowlm.cli.options import Device, PrintJson, arg
from tarflowlm.errors import UserError
from tarflowlm.presets import preset

SAMPLING_SHARE, SAMPLING_MINUTES = 0.06, 0.15
"""Share of --minutes spent on sampling, and minutes kept for it at least, but at most 30 % of
--minutes.
"""
BASELINES = {
    "bz2_bpc": "bz2",
    "trigram_bpc": "trigrams of characters",
}
"""Rows of the table below the model's."""
NUM_SAMPLES, SAMPLE_LENGTH = 2, 192


@dataclass(frozen=True)
class Args:
    """Train, evaluate and sample a small model on the built-in corpus, on any CPU, in a few
    minutes.
    """

    out: Annotated[Path, arg("PATH")] = Path("runs/quickstart")  # Run directory to create.
    minutes: float = 5.0  # Total time, including evaluation and sampling.
    seed: int = 0  # Seed of the weights, data order, noise and samples.
    device: Device = "auto"
    json: PrintJson = False

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf:
            raise UserError(f"minutes {self.minutes}: must be above 0 and finite")


def run(args: Args) -> None:
    import bz2
    import time

    import numpy as np
    import torch
    from rich.console import Console

    from tarflowlm.cli.main import stop_on_signals
    from tarflowlm.data import cached_corpus
    from tarflowlm.device import pick_device
    from tarflowlm.evaluation.quality import ngram_entropy
    from tarflowlm.generation import generate
    from tarflowlm.generation.writing import num_positions
    from tarflowlm.runs.checkpoint import load_checkpoint
    from tarflowlm.terminal.bars import (
        Bars,
        ProgressReporter,
        print_json,
        print_notice,
        print_table,
    )
    from tarflowlm.terminal.texts import print_samples, samples_to_json
    from tarflowlm.training.train import is_begun, train

    start = time.perf_counter()
    if is_begun(args.out):
        raise UserError(f"{args.out} exists already: choose another --out")
    device = pick_device(args.device)
    config = replace(preset("quickstart"), seed=args.seed)
    with (reporter := ProgressReporter()):
        corpus = cached_corpus(config.data.source, config.data.tokenizer, progress=reporter)
        # before the training, which gets the time that is left
        text = corpus.tokenizer.decode(np.asarray(corpus.split("test")).tolist())
        baselines = {"unigram_bpc": ngram_entropy(text, 1), "trigram_bpc": ngram_entropy(text, 3)}
        baselines["bz2_bpc"] = 8 * len(bz2.compress(text.encode("utf-8"), 9)) / len(text)
        sampling = max(SAMPLING_SHARE * args.minutes, min(SAMPLING_MINUTES, 0.3 * args.minutes))
        left = args.minutes - sampling - (time.perf_counter() - start) / 60
        # however little is left, every stage takes at least one step
        config = replace(config, train=replace(config.train, minutes=max(left, args.minutes / 100)))
        summary = train(
            config, args.out, device=device, reporter=reporter, stop_requests=stop_on_signals
        )
    test = summary["test"]
    checkpoint = load_checkpoint(args.out, device)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    length = min(SAMPLE_LENGTH, config.model.context)
    with Bars("sampling, positions", num_positions(model, length)) as bars:
        noise = torch.Generator().manual_seed(args.seed)
        options: Any = {"generator": noise, "temperature": config.temperature, "progress": bars}
        result = generate(model, num_tokens=length, num=NUM_SAMPLES, **options)
    seconds = time.perf_counter() - start
    print_samples(Console(), result, tokenizer)
    rows = [("this model, test text", f"<= {test['bpc']:.3f} bits per character")]
    rows += [(label, f"{baselines[name]:.3f}") for name, label in BASELINES.items()]
    rows += [("time", f"{seconds:.0f} s in total"), ("run directory", str(args.out))]
    print_table("quickstart", rows)
    print_notice(f"next: tarflowlm sample {args.out} --prompt 'the people of '")
    if args.json:
        found: dict[str, Any] = {
            "bpc": test["bpc"],
            "bound": test["bound"],
            **baselines,
            "seconds": seconds,
        }
        samples = samples_to_json(result, tokenizer)
        print_json(
            found | {"samples": samples, "out": str(args.out), "test_tokens": test["tokens"]}
        )
