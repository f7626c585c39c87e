"""What each block does to the latents: four geometric metrics of its state, and its share of the likelihood."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.model import TarFlowLM
from tarflowlm.objective import elbo_and_states, posterior_noise


def mean_norm(states: Float[Tensor, "B T d"]) -> Float[Tensor, " B"]:
    """(1/T) sum_t |h_t|: the mean L2 norm of the token vectors."""
    return states.norm(dim=-1).mean(-1)


def mean_cosine(states: Float[Tensor, "B T d"]) -> Float[Tensor, " B"]:
    """Mean of cos(h_s, h_t) over the pairs s < t of a sequence; a zero vector has cosine 0. NaN for T = 1."""
    T = states.shape[1]
    unit = F.normalize(states, dim=-1)
    # |sum_t n_t|^2 = sum_t |n_t|^2 + 2 sum_{s<t} n_s n_t
    pairs = (unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))) / 2
    return pairs / (T * (T - 1) / 2) if T > 1 else pairs * torch.nan


def participation_ratio(states: Float[Tensor, "B T d"]) -> Float[Tensor, " B"]:
    """(sum_i l_i)^2 / sum_i l_i^2, l the eigenvalues of the d x d covariance of the T centred vectors: 1 .. d.

    The number of directions that a sequence spreads into evenly. NaN where all vectors are equal.
    """
    centred = states - states.mean(1, keepdim=True)
    covariance = centred.mT @ centred
    # the trace is the sum of the eigenvalues, the squared Frobenius norm that of their squares
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace.square() / covariance.square().sum((-2, -1))


def centroid_shift(before: Float[Tensor, "B T d"], after: Float[Tensor, "B T d"]) -> Float[Tensor, " B"]:
    """|mean_t after_t - mean_t before_t|: how far a block moves the centre of a sequence."""
    return (after.mean(1) - before.mean(1)).norm(dim=-1)


@dataclass(frozen=True)
class Spread:
    """Mean over sequences and their standard deviation (NaN for one sequence)."""

    mean: float
    std: float


@dataclass(frozen=True)
class StateReport:
    """State h^(l) after l blocks (0: the latents z) over a set of sequences; nats per token where nats are said."""

    block: int
    norm: Spread
    cosine: Spread
    participation_ratio: Spread
    centroid_shift: Spread | None
    """From the state before; None for z."""
    log_det: Spread | None
    """log|det J| of block l, nats per token; None for z."""
    kl: Spread
    """E_q[ log q(z|x) - log p_l(z) ], nats per token: the KL divergence to a prior that ends after block l."""
    kl_gain: Spread | None
    """What block l takes off it: log|det J_l| + log N(h^(l); 0, I) - log N(h^(l-1); 0, I). None for z."""
    nelbo: Spread
    """Negative ELBO with a prior that ends after block l, nats per token: kl - E_q[ log p(x|z) ]."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def latent_report(
    model: TarFlowLM,
    windows: Tensor,
    *,
    seed: int = 0,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[StateReport]:
    """Every state h^(0) = z, ..., h^(L) = u of texts `windows` [N, T], encoded with one posterior sample each.

    The last entry's `nelbo` is that of the model; the gains add up to kl(0) - kl(L). Same seed, same result.
    """
    batch = batch or max(1, 8192 // windows.shape[1])
    device = model.codebook.mean.device
    generator = torch.Generator(device=device).manual_seed(seed)
    parts = []
    for start in range(0, len(windows), batch):
        tokens = windows[start : start + batch].to(device)
        parts.append(_measure(model, tokens, posterior_noise(model, tokens, generator)))
        if progress is not None:
            progress(min(start + batch, len(windows)), len(windows))
    reports = []
    for block in range(model.num_blocks + 1):
        joined = {name: torch.cat([part[block][name] for part in parts]) for name in parts[0][block]}
        spreads: dict[str, Any] = {name: _spread(values) for name, values in joined.items()}
        without: dict[str, Any] = dict.fromkeys(("centroid_shift", "log_det", "kl_gain"))
        reports.append(StateReport(block=block, **(without | spreads)))
    return reports


def state_metrics(states: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """The four metrics [B] of each of some consecutive states [B, T, d], of texts or of samples."""
    metrics = []
    for index, h in enumerate(states):
        values = {"norm": mean_norm(h), "cosine": mean_cosine(h), "participation_ratio": participation_ratio(h)}
        if index:
            values["centroid_shift"] = centroid_shift(states[index - 1], h)
        metrics.append(values)
    return metrics


def _measure(model: TarFlowLM, tokens: Tensor, noise: Tensor) -> list[dict[str, Tensor]]:
    """All quantities [B] of every state, for one batch."""
    T = tokens.shape[1]
    terms, states = elbo_and_states(model, tokens, noise)
    metrics = state_metrics(states)
    log_det_sum = torch.zeros_like(terms.log_q)
    for index, values in enumerate(metrics):
        if index:
            log_det_sum = log_det_sum + terms.log_dets[index - 1]
        kl = (terms.log_q - log_det_sum - standard_normal_log_prob(states[index])) / T
        values |= {"kl": kl, "nelbo": kl - terms.reconstruction / T}
        if index:
            values |= {"log_det": terms.log_dets[index - 1] / T, "kl_gain": metrics[index - 1]["kl"] - kl}
    return metrics


def _spread(values: Tensor) -> Spread:
    values = values.double().cpu()
    return Spread(values.mean().item(), values.std().item() if len(values) > 1 else float("nan"))
