"""Likelihood of a text: the ELBO and the importance-weighted bound over its windows, in every usual unit.

Shape legend: W windows of T tokens, S posterior samples for each, V token types.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm.config import checked_seed
from tarflowlm.device import keep_freed_memory
from tarflowlm.errors import UserError
from tarflowlm.language_model import LanguageModel, as_integer
from tarflowlm.objective import check_tokens, importance_weighted, log_importance_weights

Nats = TypeVar("Nats", float, Tensor)
Progress = Callable[[int, int], None]
"""Called with the number of parts done and their total."""


TIMED_WINDOWS = 8
"""Windows that a CPU is timed with."""


def bits(nats: Nats) -> Nats:
    """Nats as bits: divided by ln 2."""
    return nats / math.log(2)


def sign_of(bound: str) -> str:
    """How to print what has this `bound`: = for "exact", <= for the others."""
    return "=" if bound == "exact" else "<="


def windows_per_batch(num_tokens: int) -> int:
    """Windows that are evaluated at once: 8,192 tokens keep two cores or a small GPU busy."""
    return max(1, 8192 // num_tokens)


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of a text under a model. Unless `bound` is exact, every number is an upper bound."""

    bound: str
    """exact (the baseline), elbo, or iw-S."""
    nats_per_token: float
    bpc: float
    """Bits per character of the text."""
    ppl: float
    """exp(nats_per_token): perplexity per token."""
    stderr: float
    """Standard error of nats_per_token over the windows."""
    samples: int
    """Posterior samples per window."""
    windows: int
    tokens: int
    """Tokens that were scored, each once."""
    characters: int
    bytes: int | None = None
    """UTF-8 bytes of the text; None without `bytes_per_token`."""
    bits_per_byte: float | None = None
    elbo: float | None = None
    """Negative ELBO in nats per token, the mean over all samples; None for the baseline, which needs no bound."""
    elbo_stderr: float | None = None
    """Its standard error over the windows."""
    elbo_sampling_stderr: float | None = None
    """The part of it that comes from posterior sampling, and would change with the seed. Needs 2 samples."""
    gap: float | None = None
    """elbo - nats_per_token, at least 0: how much the importance weights tighten the bound. Needs 2 samples."""
    gap_stderr: float | None = None
    """Its standard error over the windows."""

    @property
    def sign(self) -> str:
        """How to print the numbers: = for exact ones, <= for bounds."""
        return sign_of(self.bound)

    def to_json(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    windows: Int[Tensor, "W T"],
    characters_per_token: Tensor,
    *,
    bytes_per_token: Tensor | None = None,
    given: Int[Tensor, " W"] | None = None,
    samples: int = 1,
    seed: int = 0,
    batch: int | None = None,
    weigh: Callable[..., Tensor] = log_importance_weights,
    progress: Progress | None = None,
) -> Likelihood:
    """Likelihood of the windows of a text, in nats and bits; each window has a fresh context.

    With one sample this is the ELBO (docs/math.md, eq. 3). With S > 1 it is the importance-weighted bound (eq. 13),
    and the ELBO of the same samples beside it. The first `given` tokens of a window are context and are not scored
    (`sliding_windows`): the baseline and flows of one block allow this (`conditional_bound`).
    `characters_per_token` and `bytes_per_token` [V] give bits per character and per byte. `batch` windows are
    evaluated at once. `weigh` replaces the function that computes the log-weights of a batch, for instance by a
    parallel one. `progress` gets the number of windows done and their total. Same seed, same result.

    Raises UserError for `samples` below 1, for windows that are no texts of the model, and as `conditional_bound`.
    """
    check_tokens(model, windows, name="windows")
    given = torch.zeros(len(windows), dtype=torch.int64) if given is None else given
    batch = batch or windows_per_batch(windows.shape[1])
    weights = log_weights(
        model, windows, given, samples=samples, seed=seed, batch=batch, weigh=weigh, progress=progress
    )
    characters, num_bytes = 0, 0
    for start, end, head in _batches(given, batch):
        tokens = windows[start:end, head:]
        characters += int(characters_per_token[tokens].sum())
        if bytes_per_token is not None:
            num_bytes += int(bytes_per_token[tokens].sum())
    return _summary(
        weights,
        windows.shape[1] - given.double(),
        exact=model.is_exact,
        characters=characters,
        num_bytes=num_bytes if bytes_per_token is not None else None,
    )


@torch.no_grad()
def seconds_per_window(model: LanguageModel, windows: Int[Tensor, "W T"]) -> float:
    """How long `evaluate` will take for a window and a sample, from a few of the windows: within a factor of two."""
    size = windows_per_batch(windows.shape[1]) if model.device.type != "cpu" else TIMED_WINDOWS
    few = windows[:size].to(model.device)
    noise = model.draw_noise(few)
    model.bound(few[:1], noise[:1])  # what only the first call takes
    start = time.perf_counter()
    model.bound(few, noise).sum().item()
    return (time.perf_counter() - start) / len(few)


@torch.no_grad()
def log_weights(
    model: LanguageModel,
    windows: Int[Tensor, "W T"],
    given: Int[Tensor, " W"],
    *,
    samples: int,
    seed: int,
    batch: int | None = None,
    weigh: Callable[..., Tensor] = log_importance_weights,
    progress: Progress | None = None,
) -> Float[Tensor, "S W"]:
    """The log-weights of every window, in nats and float64 on the CPU: what `evaluate` sums up, its arguments."""
    samples, seed = as_integer(samples, "samples"), checked_seed(as_integer(seed, "seed"))
    if samples < 1:
        raise UserError(f"samples {samples}: must be at least 1")
    keep_freed_memory()
    generator = torch.Generator(device=model.device).manual_seed(seed)
    parts = []
    for start, end, head in _batches(given, batch or windows_per_batch(windows.shape[1])):
        tokens = windows[start:end].to(model.device)
        parts.append(weigh(model, tokens, samples=samples, generator=generator, given=head).cpu().double())
        if progress is not None:
            progress(end, len(windows))
    return torch.cat(parts, dim=1)


def _batches(given: Tensor, batch: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, given) of runs of at most `batch` neighbouring windows with the same number of given tokens."""
    heads, start = given.tolist(), 0
    while start < len(heads):
        end = start + 1
        while end < len(heads) and end - start < batch and heads[end] == heads[start]:
            end += 1
        yield start, end, heads[start]
        start = end


def _summary(
    log_weights: Tensor, tokens: Tensor, *, exact: bool, characters: int, num_bytes: int | None
) -> Likelihood:
    """All numbers from the log-weights [S, W] of the windows and the number of scored tokens [W] of each."""
    num_samples, num_windows = log_weights.shape
    num_tokens = tokens.sum().item()
    weighted = importance_weighted(log_weights)
    elbo = -log_weights.mean(0)
    nats, stderr = _per_token(weighted, tokens)
    total_bits = bits(weighted.sum().item())
    several = num_samples > 1
    elbo_nats, elbo_stderr = _per_token(elbo, tokens)
    gap, gap_stderr = _per_token(elbo - weighted, tokens)
    sampling = math.sqrt(log_weights.var(0).sum().item() / num_samples) / num_tokens if several else None
    return Likelihood(
        bound="exact" if exact else f"iw-{num_samples}" if several else "elbo",
        nats_per_token=nats,
        bpc=total_bits / characters,
        ppl=math.exp(nats),
        stderr=stderr,
        samples=num_samples,
        windows=num_windows,
        tokens=round(num_tokens),
        characters=characters,
        bytes=num_bytes,
        bits_per_byte=total_bits / num_bytes if num_bytes is not None else None,
        elbo=None if exact else elbo_nats,
        elbo_stderr=None if exact else elbo_stderr,
        elbo_sampling_stderr=sampling,
        gap=gap if several else None,
        gap_stderr=gap_stderr if several else None,
    )


def _per_token(nats: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Nats per token over all windows, and the standard error of this ratio (NaN for one window).

    `nats` [W]; `tokens` [W] counts the scored tokens of each window.
    """
    count, total = len(nats), tokens.sum().item()
    mean = nats.sum().item() / total
    if count < 2:
        return mean, math.nan
    spread = (nats - mean * tokens).square().sum().item() * count / (count - 1)
    return mean, math.sqrt(spread) / total
