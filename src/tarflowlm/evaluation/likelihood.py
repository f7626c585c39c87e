"""Likelihood of a text: the ELBO and the importance-weighted bound over its windows, in every usual unit."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tarflowlm.errors import UserError
from tarflowlm.language_model import LanguageModel
from tarflowlm.objective import importance_weighted, log_importance_weights


@dataclass(frozen=True)
class Likelihood:
    """What a model gives a text. Bounds are upper bounds on the exact value: read each number with "<="."""

    bound: str
    """exact (the baseline), elbo, or iw-K."""
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
    """UTF-8 bytes of the text; None where they were not asked for."""
    bits_per_byte: float | None = None
    elbo: float | None = None
    """Negative ELBO in nats per token, the mean over all samples; None for the baseline, which needs no bound."""
    elbo_stderr: float | None = None
    """Its standard error over the windows."""
    elbo_sampling_stderr: float | None = None
    """The part of it that posterior sampling causes: what another seed would change. Needs 2 samples."""
    gap: float | None = None
    """elbo - nats_per_token, at least 0: what the importance weights bring. Needs 2 samples."""
    gap_stderr: float | None = None
    """Its standard error over the windows."""

    @property
    def sign(self) -> str:
        return "=" if self.bound == "exact" else "<="

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    windows: Tensor,
    characters_per_token: Tensor,
    *,
    bytes_per_token: Tensor | None = None,
    given: Tensor | None = None,
    samples: int = 1,
    seed: int = 0,
    batch: int | None = None,
    weigh: Callable[..., Tensor] = log_importance_weights,
    progress: Callable[[int, int], None] | None = None,
) -> Likelihood:
    """Bound over `windows` [N, T] of token ids, each with a fresh context.

    With `samples` K = 1 this is the ELBO (docs/math.md, eq. 3), with K > 1 the importance-weighted bound (eq. 13)
    with the ELBO of the same samples beside it. `given` [N]: tokens at the head of each window that are context and
    not scored (`sliding_windows`); the baseline and flows of one block take it (`conditional_bound`).
    `characters_per_token` and `bytes_per_token` [V] turn nats per token into bits per character and per byte.
    Same seed, same result. `weigh` may give the log-weights of a batch in another way, as over several processes.
    """
    if samples < 1:
        raise UserError(f"samples {samples}: must be at least 1")
    given = torch.zeros(len(windows), dtype=torch.int64) if given is None else given
    batch = batch or max(1, 8192 // windows.shape[1])  # 8,192 tokens keep two cores or a small GPU busy
    device = model.device
    generator = torch.Generator(device=device).manual_seed(seed)
    parts, characters, num_bytes = [], 0, 0
    for start, end, head in _batches(given, batch):
        tokens = windows[start:end]
        weights = weigh(model, tokens.to(device), samples=samples, generator=generator, given=head)
        parts.append(weights.cpu().double())
        characters += int(characters_per_token[tokens[:, head:]].sum())
        if bytes_per_token is not None:
            num_bytes += int(bytes_per_token[tokens[:, head:]].sum())
        if progress is not None:
            progress(end, len(windows))
    return _summary(
        torch.cat(parts, dim=1),
        windows.shape[1] - given.double(),
        exact=model.is_exact,
        characters=characters,
        num_bytes=num_bytes if bytes_per_token is not None else None,
    )


def _batches(given: Tensor, batch: int) -> Iterator[tuple[int, int, int]]:
    """Runs (start, end, context) of at most `batch` neighbouring windows of one length of context."""
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
    """All numbers from the log-weights [K, N] of the windows and their scored tokens [N]."""
    num_samples, num_windows = log_weights.shape
    num_tokens = tokens.sum().item()
    weighted = importance_weighted(log_weights)
    elbo = -log_weights.mean(0)
    nats, stderr = _per_token(weighted, tokens)
    bits = weighted.sum().item() / math.log(2)
    several = num_samples > 1
    elbo_nats, elbo_stderr = _per_token(elbo, tokens)
    gap, gap_stderr = _per_token(elbo - weighted, tokens)
    sampling = math.sqrt(log_weights.var(0).sum().item() / num_samples) / num_tokens if several else None
    return Likelihood(
        bound="exact" if exact else f"iw-{num_samples}" if several else "elbo",
        nats_per_token=nats,
        bpc=bits / characters,
        ppl=math.exp(nats),
        stderr=stderr,
        samples=num_samples,
        windows=num_windows,
        tokens=round(num_tokens),
        characters=characters,
        bytes=num_bytes,
        bits_per_byte=bits / num_bytes if num_bytes is not None else None,
        elbo=None if exact else elbo_nats,
        elbo_stderr=None if exact else elbo_stderr,
        elbo_sampling_stderr=sampling,
        gap=gap if several else None,
        gap_stderr=gap_stderr if several else None,
    )


def _per_token(nats: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Nats per token over all windows, and its standard error (of a ratio; NaN for one window)."""
    count, total = len(nats), tokens.sum().item()
    mean = nats.sum().item() / total
    if count < 2:
        return mean, math.nan
    spread = (nats - mean * tokens).square().sum().item() * count / (count - 1)
    return mean, math.sqrt(spread) / total
