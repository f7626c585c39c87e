"""What a draft learns from, its loss, and how many tokens a pass it is worth.

The noise of a real text and the features along it come from one parallel pass of block 1, so nothing is sampled.
Every position can be a frontier: the draft reads the k positions before it and the noise of W positions from it on.

Shape legend: B sequences, N positions, P tokens per position, C channels, D width of block 1, F frontiers per
sequence, R = B F, k positions read, W drafted, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflowlm.draft import Draft
from tarflowlm.model import TarFlowLM

OUTSIDE = -100
"""The target of a position behind the end of a text."""
LEAST_WEIGHT = 0.02
"""Of a position in the loss, however seldom a decoder gets there at present."""


@dataclass(frozen=True)
class Pairs:
    """A batch of texts as block 1 sees them."""

    tokens: Tensor
    """[B, N, P]."""
    z: Tensor
    """Latents [B, N, C]."""
    features: Tensor
    """c_n [B, N, D]."""
    u: Tensor
    """Noise h^(1) [B, N, C] of these latents."""


@torch.no_grad()
def pairs_of(model: TarFlowLM, tokens: Tensor, generator: torch.Generator) -> Pairs:
    """One draw of q(z|x) for tokens [B, T], and what block 1 makes of it."""
    block = model.prior.block(0)
    z = model.prior.patch(model.codebook.encode(tokens, model.draw_noise(tokens, generator)))[0]
    features = block.features_of(None, z[:, :-1], first=True)
    return Pairs(tokens.unflatten(1, (z.shape[1], -1)), z, features, block.coupling(z, features)[0])


def guesses(draft: Draft, pairs: Pairs, front: Tensor, past: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits [R, k - 1 + W, P, V] from frontiers `front` [B, F], and the tokens [R, k - 1 + W, P] they should give.

    The last W are the drafts. Those before guess a single position ahead, at each of the past positions. `past`: k,
    by default as many as a decoder reads.
    """
    k, W = past or draft.config.past, draft.config.ahead
    known = draft.read_past(F.pad(pairs.features, (0, 0, k, 0)), F.pad(pairs.z, (0, 0, k, 0)))
    noise = draft.read_noise(F.pad(pairs.u, (0, 0, k - 1, W)))
    row = torch.arange(len(front), device=front.device)[:, None, None]
    before = front[:, :, None] + torch.arange(k, device=front.device)
    ahead = front[:, :, None] + torch.arange(k - 1 + W, device=front.device)
    logits = draft(known[row, before].flatten(0, 1), noise[row, ahead].flatten(0, 1))
    targets = F.pad(pairs.tokens, (0, 0, k - 1, W), value=OUTSIDE)[row, ahead]
    return logits, targets.flatten(0, 1)


def right_before(right: Tensor) -> Tensor:
    """From which drafts [R, W] are right: whether all drafts before each of them are."""
    return F.pad(right.long().cumprod(1)[:, :-1], (1, 0), value=1)


def draft_loss(logits: Tensor, targets: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
    """The loss in nats per token, and for every offset the share [W] of frontiers whose drafts are right so far.

    Cross-entropy, in which an offset has the weight of the share of frontiers that get there: a draft behind a wrong
    one is worth nothing. All guesses of the position behind a known one share the weight of the first offset.
    """
    inside, drafts = targets != OUTSIDE, slice(-ahead, None)
    nats = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none", ignore_index=OUTSIDE)
    with torch.no_grad():
        right = ((logits[:, drafts].argmax(-1) == targets[:, drafts]) | ~inside[:, drafts]).all(-1)
        share = right_before(right).double().mean(0).clamp(min=LEAST_WEIGHT)
        dense = targets.shape[1] - ahead + 1
        weight = torch.cat((share[:1].expand(dense) / dense, share[1:]))[:, None] * inside
        weight /= weight.sum().clamp(min=1e-9)
    return (nats.view(targets.shape) * weight.to(nats.dtype)).sum(), right.long().cumprod(1).double().mean(0)


@torch.no_grad()
def tokens_per_pass(draft: Draft, pairs: Pairs, *, at_once: int = 16) -> float:
    """Tokens that a pass of block 1 over W + 1 positions makes final, with guesses from this draft.

    On real text and its noise: a round goes from a frontier to the first wrong draft, which the pass corrects.
    """
    B, N, P = pairs.tokens.shape
    steps = []
    for first in range(0, N, at_once):
        front = torch.arange(first, min(first + at_once, N), device=pairs.z.device).expand(B, -1)
        logits, targets = (x[:, -draft.config.ahead :] for x in guesses(draft, pairs, front))
        right = ((logits.argmax(-1) == targets) & (targets != OUTSIDE)).all(-1)
        steps.append(right.long().cumprod(1).sum(1).view(B, -1) + 1)
    advance = torch.cat(steps, 1).tolist()
    passes = 0
    for row in advance:
        at = 0
        while at < N:
            at, passes = at + row[at], passes + 1
    return B * N * P / passes
