"""Parts of a sampler: a random stream per row, draws of tokens, and adjusted weights.

Shape legend: B rows, T tokens, d channels per token.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from tarflowlm.config import Decoder
from tarflowlm.data.prompts import BLANK as BLANK
from tarflowlm.errors import Progress
from tarflowlm.flow import wide_dtype
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.flow.transformer import KVCache
from tarflowlm.model import LanguageModel, as_flow
from tarflowlm.schema import Count, Temperature, TopP, checked


def row_generators(rows: Iterable[int], generator: Generator) -> list[Generator]:
    """A generator per row, from `generator` and the row; on the CPU, alike for every device."""
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    return [Generator().manual_seed(seed + row) for row in rows]


@dataclass
class Samples:
    """Samples to be drawn, each by R particles; `generate` describes the settings."""

    model: LanguageModel
    generators: list[Generator]
    """One per sample."""
    particles: int
    adjust: AdjustWeights | None
    progress: Progress

    def normal(self, *shape: int) -> Tensor:
        """Standard normal noise [num R, *shape], drawn in float32, as the model computes."""
        noise = [torch.randn(self.particles, *shape, generator=g) for g in self.generators]
        return torch.cat(noise).to(next(self.model.parameters()))

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers [num R, *shape] in [0, 1), in float64 on the CPU."""
        numbers = [
            torch.rand(self.particles, *shape, generator=g, dtype=torch.float64)
            for g in self.generators
        ]
        return torch.cat(numbers)

    def draws(self, decoder: Decoder, num_tokens: int) -> Tensor | None:
        """Uniform numbers [num R, N, G] to draw block L by; None unless it is drawn."""
        if decoder != "draw":
            return None
        prior = as_flow(self.model).prior
        block = prior.block(-1)
        groups = len(block.order.channels) // block.coupling.group
        uniform = self.uniform(num_tokens // prior.patch.patch, groups)
        return uniform.to(block.start.device, wide_dtype(block.start))


def without_ended(rows: Tensor | slice, ended: Tensor, cache: KVCache) -> Tensor | slice:
    """The `rows` that a cache has, without those that `ended` [B] once they are a quarter."""
    goes_on = ~ended[rows]
    if not 0 < goes_on.sum() <= 0.75 * len(goes_on):
        return rows
    cache.keep(goes_on.nonzero()[:, 0])
    return torch.arange(len(ended))[rows][goes_on]


def num_leading(mask: Tensor) -> int:
    """How many places at the start of `mask` [N] are True."""
    return int(mask.long().cumprod(0).sum())


def adjust_weights(
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> AdjustWeights | None:
    """A map of log-weights of tokens [..., K], or None for the identity (docs/math.md, 7).

    It raises weights to the power 1 / `temperature`, keeps the `top_k` largest, then the smallest
    set of the largest whose probability reaches `top_p`. Dropped tokens get the lowest finite
    log-weight: probability zero. UserError for settings out of range.
    """
    temperature = checked(temperature, Temperature, "temperature")
    top_k = checked(top_k, Count | None, "top_k")
    top_p = checked(top_p, TopP | None, "top_p")
    if top_p == 1.0:
        top_p = None  # rounding lets the cumulative sum reach 1 before the last tokens
    if temperature == 1.0 and top_k is None and top_p is None:
        return None

    def adjust(log_w: Tensor) -> Tensor:
        least = torch.finfo(log_w.dtype).min
        log_w = torch.log_softmax(log_w / temperature, dim=-1)
        if top_k is not None and top_k < log_w.shape[-1]:
            # by index, so that ties do not keep more than top_k
            kept = log_w.topk(top_k, dim=-1).indices
            is_dropped = torch.ones_like(log_w, dtype=torch.bool).scatter(-1, kept, False)
            log_w = log_w.masked_fill(is_dropped, least)
        if top_p is not None:
            ordered, order = log_w.softmax(-1).sort(dim=-1, descending=True)
            # a token is kept when the mass before it has not reached top_p
            is_behind = ordered.cumsum(-1) - ordered >= top_p
            is_dropped = torch.zeros_like(is_behind).scatter(-1, order, is_behind)
            log_w = log_w.masked_fill(is_dropped, least)
        return log_w

    return adjust
