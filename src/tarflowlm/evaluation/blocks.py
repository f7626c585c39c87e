"""The work of each block of a flow: its share of the bound, and the geometry of the state after it.

Both come from one pass over the windows of a text, with one posterior sample z ~ q(z|x) for each.
The states h^(0) = z, ..., h^(L) = u are [B, T, d]. "After block l" means with the standard normal
on top of the first l blocks.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm.evaluation.likelihood import bits, windows_per_batch
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.model import TarFlowLM
from tarflowlm.progress import SILENT, Progress


def mean_norm(states: Float[Tensor, "B T d"]) -> Float[Tensor, " B"]:
    """(1/T) sum_t |h_t|: the mean L2 norm of the token vectors."""
    return states.norm(dim=-1).mean(-1)


def mean_cosine(states: Float[Tensor, "B T d"]) -> Float[Tensor, " B"]:
    """Mean of cos(h_s, h_t) over the pairs s < t of a sequence. A zero vector has cosine 0. NaN for
    T = 1.
    """
    T, unit = states.shape[1], F.normalize(states, dim=-1)
    # |sum_t n_t|^2 = sum_t |n_t|^2 + 2 sum_{s<t} n_s n_t
    pairs = (unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))) / 2
    return pairs / (T * (T - 1) / 2) if T > 1 else pairs * torch.nan


def participation_ratio(states: Float[Tensor, "B T d"]) -> Float[Tensor, " B"]:
    """(sum_i l_i)^2 / sum_i l_i^2, l the eigenvalues of the d x d covariance of the T centred
    vectors: the effective number of directions of a sequence, from 1 to d. NaN where all vectors
    are equal.
    """
    centred = states - states.mean(1, keepdim=True)
    covariance = centred.mT @ centred
    # the trace is the sum of the eigenvalues, the squared Frobenius norm that of their squares
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace.square() / covariance.square().sum((-2, -1))


def centroid_shift(
    before: Float[Tensor, "B T d"], after: Float[Tensor, "B T d"]
) -> Float[Tensor, " B"]:
    """|mean_t after_t - mean_t before_t|: how far a block moves the centre of a sequence."""
    return (after.mean(1) - before.mean(1)).norm(dim=-1)


def state_metrics(states: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """The metrics [B] of consecutive states [B, T, d], of texts or of samples: norm, cosine,
    participation_ratio and, except for the first state, centroid_shift.
    """
    kinds = {"norm": mean_norm, "cosine": mean_cosine, "participation_ratio": participation_ratio}
    metrics = [{name: metric(h) for name, metric in kinds.items()} for h in states]
    for values, (before, after) in zip(metrics[1:], pairwise(states), strict=True):
        values["centroid_shift"] = centroid_shift(before, after)
    return metrics


@dataclass(frozen=True)
class BoundParts:
    """The ELBO of docs/math.md, eq. 11, term by term: nats per token, means over the windows.
    bound = -reconstruction + log_q - bases[L] - sum_l log_dets[l]
    """

    reconstruction: float  # log p(x | z)
    log_q: float  # log q(z | x)
    log_dets: tuple[float, ...]  # log|det J| of every block, block 1 first
    bases: tuple[
        float, ...
    ]  # log N(h^(l); 0, I) after l = 0, ..., L blocks; the last is the base of the model
    windows: int
    tokens: int
    characters: int

    @cached_property
    def bounds(self) -> tuple[float, ...]:
        """The bound after l = 0, ..., L blocks; the last is the model's."""
        encoding = -self.reconstruction + self.log_q
        return tuple(
            encoding - base - sum(self.log_dets[:blocks]) for blocks, base in enumerate(self.bases)
        )

    @property
    def gains(self) -> tuple[float, ...]:
        """By how much each block lowers the bound."""
        return tuple(before - after for before, after in pairwise(self.bounds))

    @property
    def kl(self) -> float:
        """log q(z|x) - log p(z): a sample of the KL divergence from posterior to prior."""
        return self.log_q - self.bases[-1] - sum(self.log_dets)

    def bpc(self, nats_per_token: float) -> float:
        """Nats per token of this text as bits per character."""
        return bits(nats_per_token * self.tokens / self.characters)


@dataclass(frozen=True)
class Spread:
    """Mean over sequences and their standard deviation (NaN for one sequence)."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Float[Tensor, " W"]) -> "Spread":
        values = values.double()
        return cls(values.mean().item(), values.std().item() if len(values) > 1 else float("nan"))


@dataclass(frozen=True, kw_only=True)
class StateReport:
    """State h^(l) after l blocks (0: the latents z) over a set of sequences."""

    block: int
    norm: Spread
    cosine: Spread
    participation_ratio: Spread
    centroid_shift: Spread | None = None  # from the state before; None for z
    log_det: Spread | None = None  # log|det J| of block l, nats per token; None for z
    # E_q[ log q(z|x) - log p_l(z) ], nats per token: KL divergence to a prior that ends after block
    # l
    kl: Spread
    kl_gain: Spread | None = None
    """By how much block l lowers it: log|det J_l| + log N(h^(l); 0, I) - log N(h^(l-1); 0, I). None
    for z.
    """
    # negative ELBO with a prior that ends after block l, nats per token: kl - E_q[ log p(x|z) ]
    nelbo: Spread

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bound_parts(
    model: TarFlowLM,
    windows: Int[Tensor, "W T"],
    characters_per_token: Tensor,
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> BoundParts:
    """The terms of the bound over the windows of a text, with the noise that `evaluate` draws for
    the same seed. `characters_per_token` [V]. `progress` advances by windows.
    """
    terms, _ = _measure(model, windows, seed, None, progress)
    reconstruction, log_q, *rest = (terms.double().mean(1) / windows.shape[1]).tolist()
    log_dets, bases = tuple(rest[: model.num_blocks]), tuple(rest[model.num_blocks :])
    counts = (len(windows), windows.numel(), int(characters_per_token[windows].sum()))
    return BoundParts(reconstruction, log_q, log_dets, bases, *counts)


def latent_report(
    model: TarFlowLM,
    windows: Int[Tensor, "W T"],
    *,
    seed: int = 0,
    batch: int | None = None,
    progress: Progress = SILENT,
) -> list[StateReport]:
    """Geometry and share of the likelihood of every state h^(0) = z, ..., h^(L) = u, over the
    windows of a text. The last entry's `nelbo` is that of the model; the gains add up to kl(0) -
    kl(L). Same seed, same result. `batch` windows are encoded at once. `progress` advances by
    windows.
    """
    terms, metrics = _measure(model, windows, seed, batch, progress)
    reconstruction, log_q, *rest = terms
    log_dets, bases = rest[: model.num_blocks], rest[model.num_blocks :]
    T, log_det_sums = windows.shape[1], accumulate(log_dets, initial=torch.zeros_like(log_q))
    kls = [(log_q - total - base) / T for total, base in zip(log_det_sums, bases, strict=True)]
    reports = []
    for block, (values, kl) in enumerate(zip(metrics, kls, strict=True)):
        values |= {"kl": kl, "nelbo": kl - reconstruction / T}
        if block:
            values |= {"log_det": log_dets[block - 1] / T, "kl_gain": kls[block - 1] - kl}
        reports.append(
            StateReport(block=block, **{name: Spread.of(value) for name, value in values.items()})
        )
    return reports


@torch.no_grad()
def _measure(
    model: TarFlowLM, windows: Int[Tensor, "W T"], seed: int, batch: int | None, progress: Progress
) -> tuple[Float[Tensor, "terms W"], list[dict[str, Tensor]]]:
    """log p(x|z), log q(z|x), L log|det J| and L + 1 log N(h; 0, I) of every window, in nats;
    metrics of states.
    """
    # the batches of `evaluate`, so that both draw the same noise
    batch = batch or windows_per_batch(windows.shape[1])
    generator = torch.Generator(device=model.device).manual_seed(seed)
    terms, metrics = [], []
    for rows in windows.split(batch):
        tokens = rows.to(model.device)
        found, states = model.elbo(tokens, model.draw_noise(tokens, generator))
        bases = [standard_normal_log_prob(state) for state in states]
        terms.append(
            torch.stack([found.reconstruction, found.log_q, *found.log_dets, *bases]).cpu()
        )
        metrics.append(
            [
                {name: value.cpu() for name, value in state.items()}
                for state in state_metrics(states)
            ]
        )
        progress.advance(len(rows))
    by_state = zip(*metrics, strict=True)
    joined = [
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in by_state
    ]
    return torch.cat(terms, dim=1), joined
