"""Seconds and peak memory of the Mix-d loss over a vocabulary, beside cross-entropy over the same head.

N tokens, K components or classes, d latent channels, E features per token; forward and backward, float32.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tarflowlm.bench.measure import high_water_mark
from tarflowlm.flow.numerics import mixture_log_prob_from_features
from tarflowlm.terminal.bars import StageProgress


@dataclass(frozen=True)
class LossProblem:
    """Sizes of the problem, and what it runs on."""

    vocabulary: int
    tokens: int
    width: int
    latent_dim: int
    threads: int
    seed: int


def losses(problem: LossProblem, rounds: int, progress: StageProgress) -> list[dict[str, Any]]:
    """Rows {"name", "seconds", "peak_gb", "over_recomputed", "over_in_forward"}, one per loss.

    Seconds are medians; the ratios, to the two cross-entropies, are medians of the rounds' own.
    """
    inputs = _inputs(problem)

    def job(loss: Callable[[dict[str, Tensor]], None]) -> Callable[[], None]:
        def call() -> None:
            for t in inputs.values():
                t.grad = None
            loss(inputs)

        return call

    jobs = {name: job(loss) for name, loss in _LOSSES.items()}
    seconds = interleave(jobs, rounds, partial(progress, "losses, rounds"))
    recomputed, fastest = seconds["cross-entropy, recomputed"], seconds["cross-entropy, gradient in forward"]
    rows = []
    for i, (name, times) in enumerate(seconds.items()):
        progress("peak memory, losses", i, len(seconds))
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            peak = fresh.submit(peak_memory, problem, name).result()
        row = {"name": name, "seconds": statistics.median(times), "peak_gb": peak}
        for label, base in (("over_recomputed", recomputed), ("over_in_forward", fastest)):
            row[label] = statistics.median(a / b for a, b in zip(times, base, strict=True))
        rows.append(row)
    return rows


def interleave(
    jobs: dict[Any, Callable[[], Any]], rounds: int, progress: Callable[[int, int], None]
) -> dict[Any, list[float]]:
    """Seconds of every job in every round, one job after the other within a round."""
    for job in jobs.values():
        job()
    seconds: dict[Any, list[float]] = {name: [] for name in jobs}
    for i in range(rounds):
        progress(i, rounds)
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(problem: LossProblem, name: str) -> float:
    """GB (1e9 bytes) by which one forward and backward raises this process's peak, gradients included.

    To be called in a fresh process: the peak is the operating system's high-water mark, and never falls.
    """
    torch.set_num_threads(problem.threads)
    # Libraries load their kernels at first use; a tiny problem takes that out of the difference.
    _LOSSES[name](_inputs(replace(problem, vocabulary=64, tokens=8)))
    inputs = _inputs(problem)
    before = high_water_mark()
    _LOSSES[name](inputs)
    return high_water_mark() - before


def _inputs(problem: LossProblem) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(problem.seed)
    k, n = problem.vocabulary, problem.tokens
    inputs = {
        "z": torch.randn(n, problem.latent_dim, generator=g),
        "features": torch.randn(n, problem.width, generator=g),
        "weight": 0.05 * torch.randn(k, problem.width, generator=g),
        "bias": torch.zeros(k),
        "mean": torch.randn(k, problem.latent_dim, generator=g),
        "log_std": torch.full((k,), -1.2),
    }
    return {name: t.requires_grad_() for name, t in inputs.items()} | {"target": torch.randint(k, (n,), generator=g)}


def _mixd(x: dict[str, Tensor], equal: bool) -> None:
    args = (x["z"], x["features"], x["weight"], x["bias"], x["mean"], x["log_std"])
    (-mixture_log_prob_from_features(*args, equal_cotangents=equal).mean()).backward()


def _cross_entropy_recomputed(x: dict[str, Tensor], chunk: int = 256) -> None:
    """Chunks under torch.utils.checkpoint: what one writes with autograd alone."""

    def loss(features: Tensor, target: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(features, x["weight"], x["bias"])
        return torch.nn.functional.cross_entropy(logits, target, reduction="sum")

    parts = [
        checkpoint(loss, f, t, use_reentrant=False)
        for f, t in zip(x["features"].split(chunk), x["target"].split(chunk), strict=True)
    ]
    (sum(parts) / len(x["target"])).backward()


def _cross_entropy_in_forward(x: dict[str, Tensor], chunk: int = 256) -> None:
    """Chunks whose gradients are formed by hand as they pass, as fused cross-entropy kernels do."""
    with torch.no_grad():
        features, weight, bias, target = x["features"], x["weight"], x["bias"], x["target"]
        of_features = torch.empty_like(features)
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for i in range(0, len(target), chunk):
            part = slice(i, min(i + chunk, len(target)))
            share = torch.addmm(bias, features[part], weight.T).log_softmax(-1).exp_()
            share[torch.arange(len(share)), target[part]] -= 1
            share /= len(target)
            of_features[part] = share @ weight
            of_weight.addmm_(share.T, features[part])
            of_bias += share.sum(0)
        features.grad, weight.grad, bias.grad = of_features, of_weight, of_bias


_LOSSES: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "Mix-d, recomputed": lambda x: _mixd(x, equal=False),
    "Mix-d, equal cotangents": lambda x: _mixd(x, equal=True),
    "cross-entropy, recomputed": _cross_entropy_recomputed,
    "cross-entropy, gradient in forward": _cross_entropy_in_forward,
}
