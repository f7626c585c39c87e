"""Speed of evaluation: seconds per token of the bound that `tarflowlm eval` prints, for models against the first."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tarflowlm.bench.arguments import EvaluationArgs
from tarflowlm.bench.measure import median_ratio, seconds_per_call
from tarflowlm.data import encode_text_source, eval_windows
from tarflowlm.device import pick_device
from tarflowlm.evaluation.likelihood import Likelihood, evaluate, sign_of
from tarflowlm.runs.checkpoint import Checkpoint, load_checkpoint
from tarflowlm.terminal.bars import StageProgress, no_progress


def run(args: EvaluationArgs, progress: StageProgress = no_progress) -> dict[str, Any]:
    """{"models", "device", "threads", "torch"}: one row per model, with medians over rounds.

    `ratio` is the median over rounds of the seconds per token over those of the first model in the same round.
    Raises UserError as `load_checkpoint` and `eval_windows`.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    calls = [_evaluation(load_checkpoint(d, device), args) for d in args.directories]
    seconds: list[list[float]] = [[] for _ in calls]
    results = [call() for call in calls]  # warms up
    for index in range(args.rounds):
        progress("evaluation, rounds", index, args.rounds)
        for times, call, result in zip(seconds, calls, results, strict=True):
            times.append(seconds_per_call(call, 1, device) / result.tokens)
    rows = [
        {
            "name": str(directory),
            "bound": result.bound,
            "nats_per_token": result.nats_per_token,
            "seconds_per_token": statistics.median(times),
            "ratio": median_ratio(times, seconds[0]),
        }
        for directory, result, times in zip(args.directories, results, seconds, strict=True)
    ]
    return {"models": rows, "device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__}


def _evaluation(checkpoint: Checkpoint, args: EvaluationArgs) -> Callable[[], Likelihood]:
    """The likelihood of the windows as a call."""
    source = checkpoint.run.data.source if args.data is None else args.data
    tokens = encode_text_source(source, checkpoint.tokenizer, ("test",))["test"]
    windows = eval_windows(tokens, checkpoint.run.model.context, args.windows)
    characters = torch.from_numpy(checkpoint.tokenizer.characters_per_token)
    return partial(evaluate, checkpoint.model, windows, characters, samples=args.samples)


def print_result(result: dict[str, Any], console: Console) -> None:
    """The table of `run`'s result."""
    title = f"evaluation, {result['device']}, {result['threads']} threads"
    table = Table("", "bound", "nats per token", "us per token", "over the first", title=title, title_justify="left")
    for row in result["models"]:
        sign = sign_of(row["bound"])
        nats, micros = f"{sign} {row['nats_per_token']:.4f}", f"{1e6 * row['seconds_per_token']:.1f}"
        table.add_row(row["name"], row["bound"], nats, micros, f"{row['ratio']:.2f}")
    console.print(table)
