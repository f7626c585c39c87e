"""Likelihood of a text: the ELBO and the importance-weighted bound over its windows, and the bits
of every token. Shape legend: W windows of T tokens, S posterior samples for each, V token types.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm import chunks
from tarflowlm.checks import as_integer, check_tokens, checked_seed
from tarflowlm.device import keep_freed_memory
from tarflowlm.language_model import LanguageModel
from tarflowlm.objective import importance_weighted, log_importance_weights
from tarflowlm.progress import SILENT, Progress

Nats = TypeVar("Nats", float, Tensor)


def bits(nats: Nats) -> Nats:
    """Nats as bits: divided by ln 2."""
    return nats / math.log(2)


def sign_of(bound: str) -> str:
    """The sign before a number with this `bound`: = for "exact", <= for the others."""
    return "=" if bound == "exact" else "<="


def windows_per_batch(num_tokens: int) -> int:
    """Windows that are evaluated at once."""
    return chunks.rows_at_once(num_tokens, chunks.EVALUATED_TOKENS)


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of a text under a model. Unless `bound` is exact, every number is an
    upper bound.
    """

    bound: str  # exact (the baseline), elbo, or iw-S
    nats_per_token: float
    bpc: float  # bits per character of the text
    ppl: float  # exp(nats_per_token): perplexity per token
    stderr: float  # standard error of nats_per_token over the windows; NaN for one window
    samples: int  # posterior samples per window
    windows: int
    tokens: int  # tokens that were scored, each once
    characters: int
    bytes: int | None = None  # UTF-8 bytes of the text; None without `bytes_per_token`
    bits_per_byte: float | None = None
    elbo: float | None = None
    """Negative ELBO in nats per token, the mean over all samples, and its error; None for the
    baseline.
    """
    elbo_stderr: float | None = None
    elbo_sampling_stderr: float | None = None
    """The part of it that comes from posterior sampling, and would change with the seed. Needs 2
    samples.
    """
    gap: float | None = None
    """elbo - nats_per_token, at least 0: what the importance weights gain, and its error. Needs 2
    samples.
    """
    gap_stderr: float | None = None

    @property
    def sign(self) -> str:
        """The sign before the numbers: = for exact ones, <= for bounds."""
        return sign_of(self.bound)

    def to_json(self) -> dict[str, Any]:
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
    progress: Progress = SILENT,
) -> Likelihood:
    """Likelihood of the windows of a text, in nats and bits; each window has a fresh context.

    With one sample this is the ELBO (docs/math.md, eq. 3). With S > 1 it is the importance-weighted
    bound (eq. 13), and the ELBO of the same samples beside it. The first `given` tokens of a window
    are context and are not scored (`sliding_windows`): the baseline and flows of one block allow
    this (`conditional_bound`). `characters_per_token` and `bytes_per_token` [V] give bits per
    character and per byte. `batch` windows are evaluated at once. `weigh` computes the log-weights
    of a batch; training passes a parallel one. `progress` advances by windows. Same seed, same
    result. Raises UserError for `samples` below 1, for windows that are no texts of the model, and
    for `given` tokens with a flow of several blocks.
    """
    check_tokens(model, windows, name="windows")
    given = torch.zeros(len(windows), dtype=torch.int64) if given is None else given
    how: dict[str, Any] = {
        "samples": samples,
        "seed": seed,
        "batch": batch,
        "weigh": weigh,
        "progress": progress,
    }
    log_w = log_weights(model, windows, given, **how)
    is_scored = torch.arange(windows.shape[1]) >= given[:, None]
    scored = windows.cpu()[is_scored]
    characters = int(characters_per_token[scored].sum())
    num_bytes = None if bytes_per_token is None else int(bytes_per_token[scored].sum())

    tokens, weighted, elbo = is_scored.sum(1).double(), importance_weighted(log_w), -log_w.mean(0)
    (nats, stderr), (elbo_nats, elbo_stderr) = (
        _per_token(weighted, tokens),
        _per_token(elbo, tokens),
    )
    gap, gap_stderr = _per_token(elbo - weighted, tokens)
    total_bits, num_samples = bits(weighted.sum().item()), len(log_w)
    several = num_samples > 1
    return Likelihood(
        bound="exact" if model.is_exact else f"iw-{num_samples}" if several else "elbo",
        nats_per_token=nats,
        bpc=total_bits / characters,
        ppl=math.exp(nats),
        stderr=stderr,
        samples=num_samples,
        windows=len(windows),
        tokens=len(scored),
        characters=characters,
        bytes=num_bytes,
        bits_per_byte=None if num_bytes is None else total_bits / num_bytes,
        elbo=None if model.is_exact else elbo_nats,
        elbo_stderr=None if model.is_exact else elbo_stderr,
        elbo_sampling_stderr=math.sqrt(log_w.var(0).sum().item() / num_samples) / len(scored)
        if several
        else None,
        gap=gap if several else None,
        gap_stderr=gap_stderr if several else None,
    )


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
    progress: Progress = SILENT,
) -> Float[Tensor, "S W"]:
    """log p(x, z^r) / q(z^r | x) of every window, in nats and float64 on the CPU; arguments as in
    `evaluate`.
    """
    keep_freed_memory()
    generator = torch.Generator(device=model.device).manual_seed(
        checked_seed(as_integer(seed, "seed"))
    )
    parts = []
    # one batch has one number of given tokens
    for some in runs(given.tolist(), batch or windows_per_batch(windows.shape[1])):
        tokens, head = windows[some].to(model.device), int(given[some.start])
        parts.append(
            weigh(model, tokens, samples=samples, generator=generator, given=head).cpu().double()
        )
        progress.advance(len(tokens))
    return torch.cat(parts, dim=1)


def runs(values: Iterable[Any], longest: int) -> Iterator[slice]:
    """Slices of at most `longest` neighbours that are equal, from left to right."""
    start = 0
    for _, equal in groupby(values):
        end = start + len(list(equal))
        yield from (slice(i, min(i + longest, end)) for i in range(start, end, longest))
        start = end


def _per_token(nats: Float[Tensor, " W"], tokens: Float[Tensor, " W"]) -> tuple[float, float]:
    """Nats per token over all windows of `tokens` scored tokens, and the standard error of this
    ratio.
    """
    count, total = len(nats), tokens.sum().item()
    mean = nats.sum().item() / total
    if count < 2:
        return mean, math.nan
    spread = (nats - mean * tokens).square().sum().item() * count / (count - 1)
    return mean, math.sqrt(spread) / total
