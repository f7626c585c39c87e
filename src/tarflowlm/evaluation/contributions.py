"""What every block and every term brings to the bound on a text."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.model import TarFlowLM
from tarflowlm.objective import elbo_and_states, posterior_noise


@dataclass(frozen=True)
class Contributions:
    """The ELBO of docs/math.md, eq. 11, taken apart: nats per token, means over the windows.

    bound = -reconstruction + log_q - bases[L] - sum_l log_dets[l]
    """

    reconstruction: float
    """log p(x | z)."""
    log_q: float
    """log q(z | x)."""
    log_dets: tuple[float, ...]
    """log|det J| of every block, block 1 first."""
    bases: tuple[float, ...]
    """log N(h^(l); 0, I) of the state after l = 0 .. L blocks; the last is the base of the whole model."""
    windows: int
    tokens: int
    characters: int

    @cached_property
    def bounds(self) -> tuple[float, ...]:
        """The bound of the first l = 0 .. L blocks with the standard normal on top; the last is the model's."""
        free = -self.reconstruction + self.log_q
        return tuple(free - base - sum(self.log_dets[:blocks]) for blocks, base in enumerate(self.bases))

    @property
    def gains(self) -> tuple[float, ...]:
        """By how much each block lowers the bound."""
        return tuple(before - after for before, after in zip(self.bounds, self.bounds[1:], strict=False))

    @property
    def kl(self) -> float:
        """KL(q(z|x) || p(z)), by the sample: log q - log p(z)."""
        return self.log_q - self.bases[-1] - sum(self.log_dets)

    def bpc(self, nats_per_token: float) -> float:
        """The same in bits per character of the text."""
        return nats_per_token * self.tokens / self.characters / math.log(2)


@torch.no_grad()
def contributions(
    model: TarFlowLM,
    windows: Tensor,
    characters_per_token: Tensor,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Contributions:
    """The parts of the bound over `windows` [N, T], with the noise that `evaluate` draws for the same seed."""
    batch = max(1, 8192 // windows.shape[1])
    device = model.codebook.mean.device
    generator = torch.Generator(device=device).manual_seed(seed)
    rows = []
    for start in range(0, len(windows), batch):
        tokens = windows[start : start + batch].to(device)
        eps = posterior_noise(model, tokens, generator)
        terms, states = elbo_and_states(model, tokens, eps)
        bases = [standard_normal_log_prob(state) for state in states]
        rows.append(torch.stack([terms.reconstruction, terms.log_q, *terms.log_dets, *bases]).double().cpu())
        if progress is not None:
            progress(min(start + batch, len(windows)), len(windows))
    means = (torch.cat(rows, dim=1).mean(1) / windows.shape[1]).tolist()
    return Contributions(
        reconstruction=means[0],
        log_q=means[1],
        log_dets=tuple(means[2 : 2 + model.num_blocks]),
        bases=tuple(means[2 + model.num_blocks :]),
        windows=len(windows),
        tokens=windows.numel(),
        characters=int(characters_per_token[windows].sum()),
    )
