"""`tarflowlm quickstart`: in a few minutes, a small TarFlowLM that writes short stories."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tarflowlm.cli.options import Json, OnDevice, load_checkpoint
from tarflowlm.cli.signals import stop_on_signals
from tarflowlm.errors import UserError
from tarflowlm.evaluation.ngrams import baselines_on
from tarflowlm.options import Seeded, arg
from tarflowlm.presets import preset
from tarflowlm.schema import Positive
from tarflowlm.terminal.bars import Bars, print_json, print_notice, print_table, suggest

if TYPE_CHECKING:
    from tarflowlm.generation.texts import Written
    from tarflowlm.runs.checkpoint import Checkpoint

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
    from tarflowlm.runs.records import read_record
    from tarflowlm.terminal.texts import print_samples, samples_to_json

    start = time.perf_counter()
    found = _train(args, start)
    lm = load_checkpoint(args.out, args.device)
    stories, filled = _sample(args, lm)
    curve = read_record(args.out).valid["bpc"].tolist()
    found |= {
        "seconds": time.perf_counter() - start,
        "samples": samples_to_json(stories, lm),
        "filled": samples_to_json(filled, lm),
        "valid_bpc": curve,
        "out": str(args.out),
    }
    print_samples(stories, lm)
    print_notice(f"\n{TEMPLATE}")
    print_samples(filled, lm)
    rows = [
        ("unseen stories", f"<= {found['bpc']:.3f} bits per character; fewer are better"),
        ("bz2 on them", f"{found['bz2_bpc']:.3f}"),
        ("counting three letters", f"{found['trigram_bpc']:.3f}"),
        ("while it learnt", f"{curve[0]:.3f} {sparkline(curve)} {curve[-1]:.3f}"),
        ("time", f"{found['seconds']:.0f} s in total"),
        ("run directory", str(args.out)),
    ]
    print_table("quickstart", rows)
    suggest("sample", args.out, "--prompt", "Once upon a time")
    if args.json:
        print_json(found)


def _train(args: Args, start: float) -> dict[str, Any]:
    """The figures of the new model and of simple ones, on the stories that it has not seen."""
    from tarflowlm.data import infer_tokenizer, prepare_corpus
    from tarflowlm.device import pick_device
    from tarflowlm.training.directory import is_begun
    from tarflowlm.training.train import train

    if is_begun(args.out):
        raise UserError(f"{args.out} exists already: choose another --out")
    device = pick_device(args.device)
    config = replace(preset("quickstart"), seed=args.seed)
    # before reading the text, which takes long
    args.out.mkdir(parents=True, exist_ok=True)
    with Bars(keep=True) as bars:
        corpus = prepare_corpus(infer_tokenizer(config.data), progress=bars)
        baselines = baselines_on(corpus.tokenizer.decode(corpus.split("test").tolist()))
        spent = (time.perf_counter() - start) / 60
        # however little time is left, each stage takes a step
        minutes = max(TRAINING_SHARE * args.minutes - spent, args.minutes / 100)
        timed = replace(config, train=replace(config.train, minutes=minutes))
        summary = train(
            timed, args.out, device=device, reporter=bars, stop_requests=stop_on_signals
        )
    test = summary["test"]
    return {"bpc": test["bpc"], "bound": test["bound"], "test_tokens": test["tokens"], **baselines}


def _sample(args: Args, lm: "Checkpoint") -> "list[Written]":
    """Three stories, and a fourth that fills in the template."""
    from tarflowlm.generation.texts import Samples
    from tarflowlm.requests import Writing

    requests = (
        Writing(num=3, length=lm.model.config.context, seed=args.seed),
        Writing(template=TEMPLATE, seed=args.seed),
    )
    samples = [Samples(request, lm) for request in requests]
    with Bars("writing, tokens", sum(one.num_tokens for one in samples)) as bars:
        return [written for one in samples for written in one.batches(bars)]


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, the lowest of them the smallest."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / max(high - low, 1e-9)
    return "".join(BARS[round((value - low) * scale)] for value in values)
