"""The bits of every token of a text, and of many texts at once."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from tarflowlm import chunks
from tarflowlm.baseline import TokenLM
from tarflowlm.errors import SILENT, Progress
from tarflowlm.evaluation.likelihood import bits, runs, windows_per_batch
from tarflowlm.flow import full_precision
from tarflowlm.flow.numerics import log_standard_normal
from tarflowlm.model import LanguageModel, as_flow, check_tokens
from tarflowlm.schema import Count, Seed, checked


@dataclass(frozen=True, repr=False)
class Scores:
    """Bits of the T tokens of a text, on the CPU in float64."""

    bits: Tensor
    """[T]: -log2 p(x_t | x_<t) of the baseline; of a flow, the part of token t in its bound."""
    blocks: Tensor | None
    """[L, T]: log2|det J| of every block at every token, block 1 first; None for the baseline."""

    @property
    def exact(self) -> bool:
        """Whether the bits are exact; else only their sum is an upper bound."""
        return self.blocks is None

    @property
    def total(self) -> float:
        """Bits of the whole text."""
        return self.bits.sum().item()

    @property
    def per_token(self) -> float:
        """Mean bits per token."""
        return self.bits.mean().item()

    @property
    def sign(self) -> str:
        """The sign before the bits of the whole text: = or <=."""
        return "=" if self.exact else "<="

    def __repr__(self) -> str:
        return f"<Scores of {len(self.bits)} tokens: {self.sign} {self.total:.1f} bits>"


def score(
    model: LanguageModel,
    tokens: Tensor,
    *,
    samples: int = 8,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Scores:
    r"""How many bits each of the `tokens` [T] of a text takes; one token is enough.

    For a flow these are the terms of the negative ELBO (docs/math.md, eq. 11a) at token t, in the
    mean over `samples` posterior samples:

        log q(z_t | x_t) - log p(x_t | z_t) - log N(u_t; 0, I) - sum_l log|det J_l|_t

    The blocks of a flow read in both directions, so a token's share depends on tokens on both sides
    of it. With P > 1 the log-determinant of a position is spread evenly over its P tokens.

    An incomplete last patch of a flow is filled up with the first tokens y of the text. Their bits
    count with the last token, so that the sum stays a bound: -log p(x) <= -log p(x, y) for any y.

    A text beyond the trained context is scored in windows. The baseline and flows of one block see
    half a window as context; flows of several blocks begin every window anew, as no bound is known
    for them else. Same seed, same result; the noise is that of `evaluate`. `progress` advances by
    windows, each counted once per sample.
    """
    return scores(model, [tokens], samples=samples, seed=seed, progress=progress)[0]


@torch.no_grad()
def scores(
    model: LanguageModel,
    texts: Sequence[Tensor],
    *,
    samples: int = 8,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[Scores]:
    """`score` of each of many texts; texts of equal length share a batch.

    The results are those of one text after the other, as each draws the noise of `seed` for itself.
    """
    samples = checked(samples, Count, "samples")
    seed = checked(seed, Seed, "seed")
    for tokens in texts:
        check_tokens(model, tokens, shape="[T]")
    draws = 1 if model.is_exact else samples
    alike: dict[int, list[int]] = defaultdict(list)
    for index, tokens in enumerate(texts):
        alike[len(tokens)].append(index)
    found: dict[int, Scores] = {}
    for length, indices in alike.items():
        for some in chunks.row_ranges(len(indices), length, chunks.EVALUATED_TOKENS):
            rows = torch.stack([texts[index] for index in indices[some]])
            nats = _mean_nats(model, rows, draws, seed, progress)
            for index, of_text in zip(indices[some], nats, strict=True):
                shares, beyond = bits(of_text).tensor_split([length], dim=1)
                blocks = None
                if not model.is_exact:
                    # what fills the last patch of a flow counts with the last token
                    shares[:, -1] += beyond.sum(1)
                    blocks = shares[1:]
                found[index] = Scores(shares[0], blocks)
    return [found[index] for index in range(len(texts))]


def _mean_nats(
    model: LanguageModel, tokens: Int[Tensor, "B T"], draws: int, seed: int, progress: Progress
) -> Float[Tensor, "B rows T_filled"]:
    """`_shares` of texts in windows, in the mean over `draws` posterior samples."""
    patch = model.config.patch
    context = model.config.context
    filler = tokens.repeat(1, patch)[:, : -tokens.shape[1] % patch]
    whole = torch.cat((tokens, filler), dim=1).to(model.device)
    kept = context // patch // 2 * patch if model.num_blocks == 1 else 0
    starts = range(0, max(1, whole.shape[1] - kept), context - kept)
    windows = [whole[:, start : start + context] for start in starts]
    givens = [min(start, kept) for start in starts]
    alike = [(window.shape[1], given) for window, given in zip(windows, givens, strict=True)]
    generators = [Generator(device=model.device).manual_seed(seed) for _ in tokens]
    found = []
    for some in runs(alike, windows_per_batch(windows[0].shape[1])):
        rows = torch.stack(windows[some], dim=1)  # [B, windows, T]
        nats = torch.zeros(())
        for _ in range(draws):
            noise = torch.cat(list(map(model.draw_noise, rows, generators)))
            shares = _shares(model, rows.flatten(0, 1), noise)
            nats = nats + shares.cpu().double() / draws
            progress.advance(rows.shape[0] * rows.shape[1])
        scored = nats.unflatten(1, rows.shape[:2])[..., givens[some.start] :]
        found.append(scored.flatten(2))
    return torch.cat(found, dim=2).transpose(0, 1)


def _shares(
    model: LanguageModel, tokens: Int[Tensor, "B T"], noise: Float[Tensor, "B T d"]
) -> Float[Tensor, "rows B T"]:
    """Nats of every token, and for a flow every block's log-determinant at it."""
    if isinstance(model, TokenLM):
        return -model.token_log_prob(tokens)[None]
    flow = as_flow(model)
    patch = model.config.patch
    with full_precision(noise):
        z = flow.codebook.encode(tokens, noise)
        # log q(z_t | x_t) - log p(x_t | z_t)
        nats = flow.codebook.log_normaliser(z)
    states, by_position = flow.prior.states(z)
    log_dets = [log_det.repeat_interleave(patch, dim=1) / patch for log_det in by_position]
    return torch.stack([nats - log_standard_normal(states[-1]).sum(-1) - sum(log_dets), *log_dets])
