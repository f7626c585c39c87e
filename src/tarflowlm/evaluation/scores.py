"""Bits of every token of one text: exact for the baseline, the shares of a bound for a flow."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.config import checked_seed
from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import bits, runs, windows_per_batch
from tarflowlm.flow.numerics import log_standard_normal
from tarflowlm.flow.transformer import full_precision
from tarflowlm.generation import generate
from tarflowlm.generation.window import spans
from tarflowlm.language_model import LanguageModel, as_integer, check_model
from tarflowlm.model import as_flow
from tarflowlm.objective import check_tokens
from tarflowlm.progress import SILENT, Progress


@dataclass(frozen=True)
class Scores:
    """Bits of the T tokens of a text, on the CPU in float64."""

    bits: Tensor
    """[T]: -log2 p(x_t | x_<t) of the baseline; of a flow, what falls on token t of a bound on -log2 p(x)."""
    blocks: Tensor | None
    """[L, T]: log2|det J| of every block at every token, block 1 first; None for the baseline."""
    exact: bool
    """Whether the bits are exact. Else they sum to an upper bound, and those of one token are no bound alone."""

    @property
    def total(self) -> float:
        """Bits of the whole text."""
        return self.bits.sum().item()

    @property
    def per_token(self) -> float:
        """Mean bits per token."""
        return self.bits.mean().item()


@torch.no_grad()
def score(
    model: LanguageModel, tokens: Tensor, *, samples: int = 8, seed: int = 0, progress: Progress = SILENT
) -> Scores:
    r"""How many bits each of the `tokens` [T] of a text takes; one token is enough.

    For a flow these are the terms of the negative ELBO (docs/math.md, eq. 11a) at token t, in the mean over `samples`
    posterior samples:

        log q(z_t | x_t) - log p(x_t | z_t) - log N(u_t; 0, I) - sum_l log|det J_l|_t

    The blocks of a flow read in both directions, so a token's share depends on tokens on both sides of it. With P > 1
    the log-determinant of a position is spread evenly over its P tokens. An incomplete last patch is filled up with
    tokens that the model draws; their bits count with the last token, so that the sum remains a bound.

    A text beyond the trained context is scored in windows. The baseline and flows of one block see the last half of
    the window before as context; flows of several blocks begin every window anew, as no bound is known for them else.

    The baseline needs no samples. Same seed, same result; the noise is that of `evaluate`. `progress`
    advances by windows, each counted once per sample. UserError for no tokens, tokens that are
    not [T] or outside the vocabulary, and `samples` below 1.
    """
    check_model(model)
    samples, seed = as_integer(samples, "samples"), checked_seed(as_integer(seed, "seed"))
    if samples < 1:
        raise UserError(f"samples {samples}: must be at least 1")
    check_tokens(model, tokens, shape="[T]")
    generator = torch.Generator(device=model.device).manual_seed(seed)
    windows = _windows(model, len(tokens))
    whole = _with_drawn_end(model, tokens, windows[-1][0], seed)
    draws, found = 1 if model.is_exact else samples, []
    # the windows of one batch have the same length and number of given tokens
    alike = [(end - start, given) for start, end, given in windows]
    for some in runs(alike, windows_per_batch(alike[0][0])):
        rows = torch.stack([whole[start:end] for start, end, _ in windows[some]]).to(model.device)
        nats = torch.zeros(())
        for _ in range(draws):
            nats = nats + _shares(model, rows, generator).cpu().double() / draws
            progress.advance(len(rows))
        found.append(nats[:, :, alike[some.start][1] :].flatten(1))
    shares, beyond = bits(torch.cat(found, dim=1)).split([len(tokens), len(whole) - len(tokens)], dim=1)
    if not model.is_exact:
        # what fills the last patch of a flow counts with the last token
        shares[:, -1] += beyond.sum(1)
    return Scores(bits=shares[0], blocks=None if model.is_exact else shares[1:], exact=model.is_exact)


def _windows(model: LanguageModel, num_tokens: int) -> list[tuple[int, int, int]]:
    """(start, end, given) of every window of a text, in whole patches; `given` tokens of it are context only."""
    config = model.config
    num_tokens += -num_tokens % config.patch
    if model.num_blocks > 1:
        starts = range(0, num_tokens, config.context)
        return [(start, min(start + config.context, num_tokens), 0) for start in starts]
    found = list(spans(config, num_tokens))
    scored = [0, *(end for _, end in found)]
    return [(start, end, before - start) for (start, end), before in zip(found, scored, strict=False)]


def _with_drawn_end(model: LanguageModel, tokens: Tensor, start: int, seed: int) -> Tensor:
    """The text with its last patch completed, on the CPU; `start` is where its last window begins.

    A flow has densities of whole patches only, so its model draws likely tokens for the end, given the last window.
    In the baseline nothing after a token has an influence on it: any token will do.
    """
    missing = -len(tokens) % model.config.patch
    if not missing or model.is_exact:
        return F.pad(tokens.cpu(), (0, missing))
    num, generator = len(tokens) - start + missing, torch.Generator().manual_seed(seed)
    drawn = generate(model, num_tokens=num, prompt=tokens[start:], generator=generator)
    return torch.cat((tokens.cpu(), drawn.tokens[0, -missing:].cpu()))


def _shares(model: LanguageModel, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Nats of every token of texts [B, T] and, of a flow, the log-determinant of every block at it: [1 + L, B, T]."""
    if isinstance(model, TokenLM):
        return -model.token_log_prob(tokens)[None]
    flow, noise, patch = as_flow(model), model.draw_noise(tokens, generator), model.config.patch
    with full_precision(noise):
        z = flow.codebook.encode(tokens, noise)
        # log q(z_t | x_t) - log p(x_t | z_t)
        nats = flow.codebook.log_normaliser(z)
    states, by_position = flow.prior.states(z)
    log_dets = [log_det.repeat_interleave(patch, dim=1) / patch for log_det in by_position]
    base = log_standard_normal(states[-1]).sum(-1)
    return torch.stack([nats - base - sum(log_dets), *log_dets])
