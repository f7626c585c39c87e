"""Likelihood of a text: the ELBO and the importance-weighted bound over its windows, and the bits
of every token. Shape legend: W windows of T tokens, S posterior samples for each, V token types.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import groupby
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.checks import as_integer, check_model, check_tokens, checked_seed
from tarflowlm.device import keep_freed_memory
from tarflowlm.flow import full_precision
from tarflowlm.flow.numerics import log_standard_normal
from tarflowlm.generation import generate
from tarflowlm.generation.writing import spans
from tarflowlm.language_model import LanguageModel
from tarflowlm.model import as_flow
from tarflowlm.objective import importance_weighted, log_importance_weights
from tarflowlm.progress import SILENT, Progress

Nats = TypeVar("Nats", float, Tensor)


def bits(nats: Nats) -> Nats:
    """Nats as bits: divided by ln 2."""
    return nats / math.log(2)


def sign_of(bound: str) -> str:
    """The sign before a number with this `bound`: = for "exact", <= for the others."""
    return "=" if bound == "exact" else "<="


def windows_per_batch(num_tokens: int) -> int:
    """Windows that are evaluated at once: 8,192 tokens keep two cores or a small GPU busy."""
    return max(1, 8192 // num_tokens)


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of a text under a model. Unless `bound` is exact, every number is an
    upper bound.
    """

    bound: str  # exact (the baseline), elbo, or iw-S
    nats_per_token: float
    bpc: float  # bits per character of the text
    ppl: float  # exp(nats_per_token): perplexity per token
    stderr: float  # standard error of nats_per_token over the windows; NaN for one window
    samples: int  # posterior samples per window
    windows: int
    tokens: int  # tokens that were scored, each once
    characters: int
    bytes: int | None = None  # UTF-8 bytes of the text; None without `bytes_per_token`
    bits_per_byte: float | None = None
    elbo: float | None = None
    """Negative ELBO in nats per token, the mean over all samples, and its error; None for the
    baseline.
    """
    elbo_stderr: float | None = None
    elbo_sampling_stderr: float | None = None
    """The part of it that comes from posterior sampling, and would change with the seed. Needs 2
    samples.
    """
    gap: float | None = None
    """elbo - nats_per_token, at least 0: what the importance weights gain, and its error. Needs 2
    samples.
    """
    gap_stderr: float | None = None

    @property
    def sign(self) -> str:
        """The sign before the numbers: = for exact ones, <= for bounds."""
        return sign_of(self.bound)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    windows: Int[Tensor, "W T"],
    characters_per_token: Tensor,
    *,
    bytes_per_token: Tensor | None = None,
    given: Int[Tensor, " W"] | None = None,
    samples: int = 1,
    seed: int = 0,
    batch: int | None = None,
    weigh: Callable[..., Tensor] = log_importance_weights,
    progress: Progress = SILENT,
) -> Likelihood:
    """Likelihood of the windows of a text, in nats and bits; each window has a fresh context.

    With one sample this is the ELBO (docs/math.md, eq. 3). With S > 1 it is the importance-weighted
    bound (eq. 13), and the ELBO of the same samples beside it. The first `given` tokens of a window
    are context and are not scored (`sliding_windows`): the baseline and flows of one block allow
    this (`conditional_bound`). `characters_per_token` and `bytes_per_token` [V] give bits per
    character and per byte. `batch` windows are evaluated at once. `weigh` computes the log-weights
    of a batch; training passes a parallel one. `progress` advances by windows. Same seed, same
    result. Raises UserError for `samples` below 1, for windows that are no texts of the model, and
    for `given` tokens with a flow of several blocks.
    """
    check_tokens(model, windows, name="windows")
    given = torch.zeros(len(windows), dtype=torch.int64) if given is None else given
    how: dict[str, Any] = {
        "samples": samples,
        "seed": seed,
        "batch": batch,
        "weigh": weigh,
        "progress": progress,
    }
    log_w = log_weights(model, windows, given, **how)
    is_scored = torch.arange(windows.shape[1]) >= given[:, None]
    scored = windows.cpu()[is_scored]
    characters = int(characters_per_token[scored].sum())
    num_bytes = None if bytes_per_token is None else int(bytes_per_token[scored].sum())

    tokens, weighted, elbo = is_scored.sum(1).double(), importance_weighted(log_w), -log_w.mean(0)
    (nats, stderr), (elbo_nats, elbo_stderr) = (
        _per_token(weighted, tokens),
        _per_token(elbo, tokens),
    )
    gap, gap_stderr = _per_token(elbo - weighted, tokens)
    total_bits, num_samples = bits(weighted.sum().item()), len(log_w)
    several = num_samples > 1
    return Likelihood(
        bound="exact" if model.is_exact else f"iw-{num_samples}" if several else "elbo",
        nats_per_token=nats,
        bpc=total_bits / characters,
        ppl=math.exp(nats),
        stderr=stderr,
        samples=num_samples,
        windows=len(windows),
        tokens=len(scored),
        characters=characters,
        bytes=num_bytes,
        bits_per_byte=None if num_bytes is None else total_bits / num_bytes,
        elbo=None if model.is_exact else elbo_nats,
        elbo_stderr=None if model.is_exact else elbo_stderr,
        elbo_sampling_stderr=math.sqrt(log_w.var(0).sum().item() / num_samples) / len(scored)
        if several
        else None,
        gap=gap if several else None,
        gap_stderr=gap_stderr if several else None,
    )


@torch.no_grad()
def log_weights(
    model: LanguageModel,
    windows: Int[Tensor, "W T"],
    given: Int[Tensor, " W"],
    *,
    samples: int,
    seed: int,
    batch: int | None = None,
    weigh: Callable[..., Tensor] = log_importance_weights,
    progress: Progress = SILENT,
) -> Float[Tensor, "S W"]:
    """log p(x, z^r) / q(z^r | x) of every window, in nats and float64 on the CPU; arguments as in
    `evaluate`.
    """
    keep_freed_memory()
    generator = torch.Generator(device=model.device).manual_seed(
        checked_seed(as_integer(seed, "seed"))
    )
    parts = []
    # one batch has one number of given tokens
    for some in runs(given.tolist(), batch or windows_per_batch(windows.shape[1])):
        tokens, head = windows[some].to(model.device), int(given[some.start])
        parts.append(
            weigh(model, tokens, samples=samples, generator=generator, given=head).cpu().double()
        )
        progress.advance(len(tokens))
    return torch.cat(parts, dim=1)


def runs(values: Iterable[Any], longest: int) -> Iterator[slice]:
    """Slices of at most `longest` neighbours that are equal, from left to right."""
    start = 0
    for _, equal in groupby(values):
        end = start + len(list(equal))
        yield from (slice(i, min(i + longest, end)) for i in range(start, end, longest))
        start = end


def _per_token(nats: Float[Tensor, " W"], tokens: Float[Tensor, " W"]) -> tuple[float, float]:
    """Nats per token over all windows of `tokens` scored tokens, and the standard error of this
    ratio.
    """
    count, total = len(nats), tokens.sum().item()
    mean = nats.sum().item() / total
    if count < 2:
        return mean, math.nan
    spread = (nats - mean * tokens).square().sum().item() * count / (count - 1)
    return mean, math.sqrt(spread) / total


@dataclass(frozen=True)
class Scores:
    """Bits of the T tokens of a text, on the CPU in float64."""

    # [T]: -log2 p(x_t | x_<t) of the baseline; of a flow, the part of token t in a bound on -log2
    # p(x)
    bits: Tensor
    blocks: (
        Tensor | None
    )  # [L, T]: log2|det J| of every block at every token, block 1 first; None for the baseline
    # whether the bits are exact; else they sum to an upper bound, and those of one token are no
    # bound
    exact: bool
    symbols: Sequence[str] | None = None  # [T]: the tokens, shown in notebooks

    @property
    def total(self) -> float:
        """Bits of the whole text."""
        return self.bits.sum().item()

    @property
    def per_token(self) -> float:
        """Mean bits per token."""
        return self.bits.mean().item()

    def _repr_html_(self) -> str | None:
        if self.symbols is None:
            return None
        spans = ""
        for symbol, bits in zip(self.symbols, self.bits.tolist(), strict=True):
            ground = f"rgba(213,94,0,{min(max(bits, 0) / 12, 1):.2f})"
            spans += (
                f'<span style="background:{ground}" title="{bits:.2f} bits">{escape(symbol)}</span>'
            )
        return f"<pre>{spans}\n{sign_of('exact' if self.exact else 'elbo')} {self.total:.1f} bits</pre>"


@torch.no_grad()
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
    of it. With P > 1 the log-determinant of a position is spread evenly over its P tokens. An
    incomplete last patch is filled up with tokens that the model draws; their bits count with the
    last token, so that the sum remains a bound.

    A text beyond the trained context is scored in windows. The baseline and flows of one block see
    the last half of the window before as context; flows of several blocks begin every window anew,
    as no bound is known for them else. The baseline needs no samples. Same seed, same result; the
    noise is that of `evaluate`. `progress` advances by windows, each counted once per sample.
    UserError for no tokens, for tokens that are not [T] or outside the vocabulary, and for
    `samples` below 1.
    """
    check_model(model)
    samples, seed = as_integer(samples, "samples", least=1), checked_seed(as_integer(seed, "seed"))
    check_tokens(model, tokens, shape="[T]")
    generator, windows = (
        torch.Generator(device=model.device).manual_seed(seed),
        _windows(model, len(tokens)),
    )
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
    shares, beyond = bits(torch.cat(found, dim=1)).split(
        [len(tokens), len(whole) - len(tokens)], dim=1
    )
    if not model.is_exact:
        # what fills the last patch of a flow counts with the last token
        shares[:, -1] += beyond.sum(1)
    return Scores(
        bits=shares[0], blocks=None if model.is_exact else shares[1:], exact=model.is_exact
    )


def _windows(model: LanguageModel, num_tokens: int) -> list[tuple[int, int, int]]:
    """(start, end, given) of every window of a text, in whole patches; `given` tokens of it are
    context only.
    """
    config = model.config
    num_tokens += -num_tokens % config.patch
    if model.num_blocks > 1:
        starts = range(0, num_tokens, config.context)
        return [(start, min(start + config.context, num_tokens), 0) for start in starts]
    found = list(spans(config, num_tokens))
    scored = [0, *(end for _, end in found)]
    return [
        (start, end, before - start) for (start, end), before in zip(found, scored, strict=False)
    ]


def _with_drawn_end(model: LanguageModel, tokens: Tensor, start: int, seed: int) -> Tensor:
    """The text with its last patch completed, on the CPU: by tokens that a flow draws, given its
    last window from `start` on, or by any token for the baseline, where nothing after a token has
    an influence on it.
    """
    missing = -len(tokens) % model.config.patch
    if not missing or model.is_exact:
        return F.pad(tokens.cpu(), (0, missing))
    num, generator = len(tokens) - start + missing, torch.Generator().manual_seed(seed)
    drawn = generate(model, num_tokens=num, prompt=tokens[start:], generator=generator)
    return torch.cat((tokens.cpu(), drawn.tokens[0, -missing:].cpu()))


def _shares(model: LanguageModel, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Nats of every token of texts [B, T] and, of a flow, the log-determinant of every block at it:
    [1 + L, B, T].
    """
    if isinstance(model, TokenLM):
        return -model.token_log_prob(tokens)[None]
    flow, noise, patch = as_flow(model), model.draw_noise(tokens, generator), model.config.patch
    with full_precision(noise):
        z = flow.codebook.encode(tokens, noise)
        # log q(z_t | x_t) - log p(x_t | z_t)
        nats = flow.codebook.log_normaliser(z)
    states, by_position = flow.prior.states(z)
    log_dets = [log_det.repeat_interleave(patch, dim=1) / patch for log_det in by_position]
    return torch.stack([nats - log_standard_normal(states[-1]).sum(-1) - sum(log_dets), *log_dets])
