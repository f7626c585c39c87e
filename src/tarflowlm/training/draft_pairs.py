"""What a draft learns from, its loss, and how many tokens a pass it is worth.

The features along a real text come from one parallel pass of block 1, so nothing is sampled. Every position can be a
frontier from which W more are drafted.

Shape legend: B sequences, N positions, F frontiers, P tokens per position, C channels, D width of block 1, W drafted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflowlm.draft import Draft
from tarflowlm.model import TarFlowLM

FADING = 0.8
"""Weight of an offset over that of the offset before it: about the share of drafts that are right, and a draft behind
a wrong one is worth nothing."""
FEATURES = 0.3
"""Weight of the distance between features beside the divergence between the distributions they give."""


@dataclass(frozen=True)
class Pairs:
    """A batch of texts as block 1 sees them."""

    tokens: Tensor
    """[B, N, P]."""
    z: Tensor
    """Latents [B, N, C]."""
    features: Tensor
    """c_n [B, N, D]."""


@torch.no_grad()
def pairs_of(model: TarFlowLM, tokens: Tensor, generator: torch.Generator) -> Pairs:
    """One draw of q(z|x) for tokens [B, T], and what block 1 makes of it."""
    block = model.prior.block(0)
    z = model.prior.patch(model.codebook.encode(tokens, model.draw_noise(tokens, generator)))[0]
    return Pairs(tokens.unflatten(1, (z.shape[1], -1)), z, block.features_of(None, z[:, :-1], first=True))


def draw_frontiers(draft: Draft, pairs: Pairs, count: int, generator: torch.Generator) -> Tensor:
    """`count` random frontiers of each sequence with a position to draft behind them, [B, F]."""
    B, N, _ = pairs.z.shape
    last = max(1, N - min(draft.config.ahead, N - 1))
    return torch.randint(last, (B, count), generator=generator).to(pairs.z.device)


def _start(draft: Draft, pairs: Pairs, front: Tensor) -> Tensor:
    """The state of a draft with positions `front` [B, F] as the last known ones, [B, F, E]."""
    k = draft.config.past
    row, before = torch.arange(len(front), device=front.device)[:, None, None], torch.arange(k, device=front.device)
    return draft.start(F.pad(pairs.features, (0, 0, k - 1, 0))[row, front[..., None] + before])


def guesses(draft: Draft, pairs: Pairs, front: Tensor) -> Iterator[Tensor]:
    """Guessed features [B, F, D] of positions `front` + i, with `front` [B, F] as the last known ones, i = 1, ..., W.

    The latents on the way are those of the text, since a draft behind a wrong one is worth nothing.
    """
    row = torch.arange(len(front), device=front.device)[:, None]
    state, features = _start(draft, pairs, front), pairs.features[row, front]
    for i in range(min(draft.config.ahead, pairs.z.shape[1] - 1)):
        state, features = draft.step(state, features, pairs.z[row, front + i])
        yield features


def draft_loss(model: TarFlowLM, draft: Draft, pairs: Pairs, front: Tensor) -> Tensor:
    """How far features guessed from frontiers `front` [B, F] are from those of block 1: nats, plus a distance.

    The nats are the divergence of the distributions which the coupling makes of both (`Coupling.divergence`).
    """
    row = torch.arange(len(front), device=front.device)[:, None]
    coupling, total, weights = model.prior.block(0).coupling, pairs.z.new_zeros(()), 0.0
    for i, guessed in enumerate(guesses(draft, pairs, front), 1):
        features, z = pairs.features[row, front + i], pairs.z[row, front + i]
        distance = F.smooth_l1_loss(guessed, features)
        weight = FADING ** (i - 1)
        total = total + weight * (coupling.divergence(features, guessed, z).mean() + FEATURES * distance)
        weights += weight
    return total / max(weights, 1e-9)


@torch.no_grad()
def tokens_per_pass(model: TarFlowLM, draft: Draft, pairs: Pairs) -> float:
    """Tokens that a pass of block 1 over W + 1 positions makes final, with guesses from this draft.

    On real text and its noise: a round goes from a frontier to the first wrong draft, which the pass corrects.
    """
    coupling, (B, N, P) = model.prior.block(0).coupling, pairs.tokens.shape
    noise = coupling(pairs.z, pairs.features)[0].flatten(0, 1)
    tokens, z, features = (part.flatten(0, 1) for part in (pairs.tokens, pairs.z, pairs.features))
    # only from frontiers whose drafts were all right so far, and not behind the end, is drafted on
    front = torch.arange(B * N, device=z.device)
    state = _start(draft, pairs, front.remainder(N).view(B, N)).flatten(0, 1)
    gained = torch.ones_like(front)
    for i in range(1, draft.config.ahead + 1):
        inside = front.remainder(N) + i < N
        front, state, features, z = (part[inside] for part in (front, state, features, z))
        if not len(front):
            break
        state, features = draft.step(state, features, z)
        z = coupling.invert(noise[front + i], features)
        right = (model.codebook.decode(z.unflatten(-1, (P, -1))) == tokens[front + i]).all(-1)
        front, state, features, z = (part[right] for part in (front, state, features, z))
        gained[front] += 1
    # the first pass has nothing known before it, and finishes one position
    passes = 0
    for row in gained.view(B, N).tolist():
        at = 1
        while at < N:
            at += row[at - 1]
            passes += 1
    return B * N * P / (passes + B)
