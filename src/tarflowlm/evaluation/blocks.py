"""The work of each block of a flow: its share of the bound, and the geometry of the state after it.

The states h^(0) = z, ..., h^(L) = u are [B, T, d].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm import chunks
from tarflowlm.errors import SILENT, Progress
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.model import ElboTerms, TarFlowLM


def mean_cosine(states: Float[Tensor, "B T d"]) -> Float[Tensor, " B"]:
    """Mean of cos(h_s, h_t) over the pairs s < t of a sequence.

    A zero vector has cosine 0. NaN for T = 1.
    """
    T = states.shape[1]
    unit = F.normalize(states, dim=-1)
    # |sum_t n_t|^2 = sum_t |n_t|^2 + 2 sum_{s<t} n_s n_t
    pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
    return pairs / (T * (T - 1)) if T > 1 else pairs * torch.nan


def participation_ratio(states: Float[Tensor, "B T d"]) -> Float[Tensor, " B"]:
    """The effective number of directions of a sequence, from 1 to d.

    (sum_i l_i)^2 / sum_i l_i^2 with the eigenvalues l of the d x d covariance of the T centred
    vectors. NaN where all vectors are equal.
    """
    centred = states - states.mean(1, keepdim=True)
    covariance = centred.mT @ centred
    # the trace is the sum of the eigenvalues, the squared Frobenius norm the sum of their squares
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace.square() / covariance.square().sum((-2, -1))


def state_metrics(states: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """The metrics [B] of consecutive states [B, T, d].

    norm is (1/T) sum_t |h_t|, centroid_shift |mean_t after_t - mean_t before_t|.
    """
    metrics = [
        {
            "norm": state.norm(dim=-1).mean(-1),
            "cosine": mean_cosine(state),
            "participation_ratio": participation_ratio(state),
        }
        for state in states
    ]
    for values, (before, after) in zip(metrics[1:], pairwise(states), strict=True):
        values["centroid_shift"] = (after.mean(1) - before.mean(1)).norm(dim=-1)
    return metrics


@dataclass(frozen=True)
class Spread:
    """Mean over sequences and their standard deviation (NaN for one sequence)."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Float[Tensor, " W"]) -> "Spread":
        values = values.double()
        return cls(values.mean().item(), values.std().item() if len(values) > 1 else math.nan)


@dataclass(frozen=True, kw_only=True)
class StateReport:
    """State h^(l) after l blocks (0: the latents z) over a set of sequences.

    Terms of the bound are in nats per token, for a prior that ends after block l with the standard
    normal on top of it:

        kl    = E_q[ log q(z|x) - base - sum_{k <= l} log_det_k ]
        nelbo = kl - E_q[ log p(x|z) ]
    """

    block: int
    norm: Spread
    cosine: Spread
    participation_ratio: Spread
    centroid_shift: Spread | None = None
    """From the state before; None for z, as every other difference."""
    log_det: Spread | None = None
    """log|det J| of block l."""
    base: Spread
    """log N(h^(l); 0, I)."""
    kl: Spread
    """KL divergence from q(z|x) to the prior."""
    kl_gain: Spread | None = None
    """How far block l lowers the KL divergence."""
    nelbo: Spread


@torch.no_grad()
def latent_report(
    model: TarFlowLM,
    windows: Int[Tensor, "W T"],
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[StateReport]:
    """The report of every state of a text's windows, with one posterior sample for each.

    The gains add up to kl(0) - kl(L). Same seed, same result, with the noise of `evaluate`.
    `progress` advances by windows.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    batches: list[list[dict[str, Tensor]]] = []
    for rows in windows.split(chunks.rows_at_once(windows.shape[1], chunks.EVALUATED_TOKENS)):
        tokens = rows.to(model.device)
        terms, states = model.terms(tokens, model.draw_noise(tokens, generator))
        batches.append(_measures(terms.of_texts(), states))
        progress.advance(len(rows))
    reports = []
    for block, of_state in enumerate(zip(*batches, strict=True)):
        spreads = {
            name: Spread.of(torch.cat([part[name] for part in of_state])) for name in of_state[0]
        }
        reports.append(StateReport(block=block, **spreads))
    return reports


def _measures(terms: ElboTerms, states: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """The values [B] of every field of `StateReport` that a state has, on the CPU."""
    num_tokens = states[0].shape[1]
    measures = state_metrics(states)
    below = terms.log_q  # log q(z|x) - sum of the log-determinants so far
    for block, (values, state) in enumerate(zip(measures, states, strict=True)):
        if block:
            log_det = terms.log_dets[block - 1]
            below = below - log_det
            values["log_det"] = log_det / num_tokens
        base = standard_normal_log_prob(state)
        values["base"] = base / num_tokens
        values["kl"] = (below - base) / num_tokens
        values["nelbo"] = values["kl"] - terms.reconstruction / num_tokens
        if block:
            values["kl_gain"] = measures[block - 1]["kl"] - values["kl"]
    return [{name: value.cpu() for name, value in values.items()} for values in measures]
