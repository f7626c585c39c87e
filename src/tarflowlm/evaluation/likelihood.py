"""Likelihood of a text: the ELBO or the importance-weighted bound over its windows, in every usual unit."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.checkpoint import Model
from tarflowlm.errors import UserError
from tarflowlm.objective import importance_weighted_bound


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
    characters: int

    @property
    def sign(self) -> str:
        return "=" if self.bound == "exact" else "<="

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: Model,
    windows: Tensor,
    characters_per_token: Tensor,
    *,
    samples: int = 1,
    seed: int = 0,
    batch: int | None = None,
    bound: Callable[..., Tensor] = importance_weighted_bound,
    progress: Callable[[int, int], None] | None = None,
) -> Likelihood:
    """Bound over `windows` [N, T] of token ids, each with a fresh context.

    With `samples` K = 1 this is the ELBO (docs/math.md, eq. 3), with K > 1 the importance-weighted bound (eq. 13).
    `characters_per_token` [V] turns nats per token into bits per character. Same seed, same result. `bound` may give
    the values of a batch in another way, such as over several processes.
    """
    if samples < 1:
        raise UserError(f"samples {samples}: must be at least 1")
    exact = isinstance(model, TokenLM)
    # 8,192 tokens at a time keep two cores or a small GPU busy
    batch = batch or max(1, 8192 // windows.shape[1])
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    nats = []
    for start in range(0, len(windows), batch):
        tokens = windows[start : start + batch].to(device)
        values = bound(model, tokens, samples=1 if exact else samples, generator=generator)
        nats.append(values.cpu().double())
        if progress is not None:
            progress(min(start + batch, len(windows)), len(windows))
    per_window = torch.cat(nats)
    tokens_per_window = windows.shape[1]
    characters = float(characters_per_token[windows].sum())
    mean = per_window.mean().item() / tokens_per_window
    spread = per_window.std().item() if len(per_window) > 1 else math.nan
    return Likelihood(
        bound="exact" if exact else "elbo" if samples == 1 else f"iw-{samples}",
        nats_per_token=mean,
        bpc=per_window.sum().item() / characters / math.log(2),
        ppl=math.exp(mean),
        stderr=spread / math.sqrt(len(per_window)) / tokens_per_window,
        samples=1 if exact else samples,
        windows=len(windows),
        tokens=windows.numel(),
        characters=round(characters),
    )
