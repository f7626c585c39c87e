"""Likelihood of a text: the ELBO and the importance-weighted bound over its windows.

Shape legend: W windows of T tokens, S posterior samples for each.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm import chunks
from tarflowlm.errors import SILENT, Progress, UserError
from tarflowlm.model import LanguageModel, check_tokens
from tarflowlm.objective import importance_weighted, log_importance_weights
from tarflowlm.processes import ALONE, Processes
from tarflowlm.schema import Million, Seed, check_integers, check_type, checked

Nats = TypeVar("Nats", float, Tensor)


def bits(nats: Nats) -> Nats:
    """Nats as bits: divided by ln 2."""
    return nats / math.log(2)


def sign_of(bound: str) -> str:
    """The sign before a number with this `bound`."""
    return "=" if bound == "exact" else "<="


def in_bits(bound: str, test: Mapping[str, Any]) -> str:
    """The bits of a text in words, from `Likelihood.to_json`: per character, or per token under a
    tokenizer that loses characters.
    """
    if test["bpc"] is not None and math.isfinite(test["bpc"]):
        return f"{sign_of(bound)} {test['bpc']:.4f} bits per character"
    return f"{sign_of(bound)} {bits(test['nats_per_token']):.4f} bits per token"


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Negative log-likelihood of a text under a model.

    Every number is an upper bound, unless `bound` is exact. Standard errors are in nats per token.
    """

    bound: str
    """exact (the baseline), elbo, or iw-S: the importance-weighted bound from S samples."""
    nats_per_token: float
    stderr: float
    """Over the windows; NaN for one window."""
    samples: int
    """Posterior samples per window."""
    windows: int
    tokens: int
    """Scored tokens."""
    characters: int
    bytes: int | None
    """UTF-8 bytes of the text; None without `bytes_per_token`."""
    elbo: float | None
    """Negative ELBO in nats per token, the mean over all samples; None for the baseline."""
    elbo_stderr: float | None
    elbo_sampling_stderr: float | None
    """Standard error from sampling z alone; like the gap it needs two samples."""
    gap_stderr: float | None

    @property
    def ppl(self) -> float:
        """Perplexity per token."""
        # the exponential of a larger number exceeds float64
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def bpc(self) -> float:
        """Bits per character of the text; infinite if it has none, or its tokenizer loses some."""
        total = bits(self.nats_per_token) * self.tokens
        return total / self.characters if self.characters else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        if not self.bytes:
            return None if self.bytes is None else math.inf
        return bits(self.nats_per_token) * self.tokens / self.bytes

    @property
    def gap(self) -> float | None:
        """Gain of the importance weights over the ELBO in nats per token, at least 0."""
        if self.gap_stderr is None or self.elbo is None:
            return None
        return self.elbo - self.nats_per_token

    def to_json(self) -> dict[str, str | int | float | None]:
        derived = ("ppl", "bpc", "bits_per_byte", "gap")
        found = asdict(self) | {name: getattr(self, name) for name in derived}
        # NaN, the standard error of one window, is no JSON; it equals nothing
        return {name: value if value == value else None for name, value in found.items()}


def evaluate(
    model: LanguageModel,
    windows: Int[Tensor, "W T"],
    characters_per_token: Tensor,
    *,
    bytes_per_token: Tensor | None = None,
    given: Int[Tensor, " W"] | None = None,
    samples: int = 1,
    seed: int = 0,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
) -> Likelihood:
    """Likelihood of the windows of a text; each window has a fresh context.

    With one sample this is the ELBO (docs/math.md, eq. 3), with more the importance-weighted bound
    (eq. 13) and the ELBO of the same samples. `characters_per_token` and `bytes_per_token`, one for
    each token type, give bits per character and per byte. Same seed, same result.

    The first `given` tokens of a window are context and are not scored (`sliding_windows`). The
    baseline and flows of one block allow this (`conditional_bound`), other flows raise UserError.
    The `processes` share the windows. `progress` advances by windows.
    """
    vocab_size = model.config.vocab_size
    check_type(characters_per_token, "characters_per_token", Tensor, "give a tensor [V]")
    if characters_per_token.shape != (vocab_size,):
        what = f"characters_per_token of shape {list(characters_per_token.shape)}"
        raise UserError(f"{what}: give one number for each of the {vocab_size} tokens")
    if not (characters_per_token >= 0).all():
        raise UserError("characters_per_token has a number below 0, or a NaN: give counts")
    if given is not None:
        check_integers(given, "given", "[W]")
        if len(given) != len(windows):
            raise UserError(f"given of shape [{len(given)}]: give [{len(windows)}]")
    log_w = log_weights(
        model,
        windows,
        given=given,
        samples=samples,
        seed=seed,
        progress=progress,
        processes=processes,
    )
    return summarise(
        model, log_w, windows, characters_per_token, bytes_per_token=bytes_per_token, given=given
    )


@torch.no_grad()
def log_weights(
    model: LanguageModel,
    windows: Int[Tensor, "W T"],
    *,
    given: Int[Tensor, " W"] | None = None,
    samples: int,
    seed: int,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
) -> Float[Tensor, "S W"]:
    """log p(x, z^r) / q(z^r | x) of every window, in nats and float64 on the CPU.

    UserError where one is not finite. The `processes` share the batches, and each gets all
    log-weights.
    """
    check_tokens(model, windows, name="windows")
    generator = torch.Generator(device=model.device).manual_seed(checked(seed, Seed, "seed"))
    heads = [0] * len(windows) if given is None else given.tolist()
    draws = 1 if model.is_exact else checked(samples, Million, "samples")
    rows = chunks.rows_at_once(windows.shape[1], chunks.EVALUATED_TOKENS)

    def own() -> Iterator[Tensor]:
        # one batch has one number of given tokens
        for number, some in enumerate(chunks.equal_ranges(heads, rows)):
            tokens = windows[some].to(model.device)
            if number % processes.world != processes.rank:
                # draw the noise of other batches, too: then own noise is as in a single process
                for _ in range(draws):
                    model.draw_noise(tokens, generator)
                continue
            log_w = log_importance_weights(
                model, tokens, samples=draws, generator=generator, given=heads[some.start]
            )
            yield log_w.cpu().double()

    found = []
    for log_w in processes.in_turn(own()):
        found.append(log_w)
        progress.advance(log_w.shape[1])
    return finite(torch.cat(found, dim=1))


def finite(nats: Tensor) -> Tensor:
    """The same `nats`. UserError unless all are finite."""
    if not torch.isfinite(nats).all():
        raise UserError("the likelihood is not finite: the weights are too large, the run diverged")
    return nats


def summarise(
    model: LanguageModel,
    log_w: Float[Tensor, "S W"],
    windows: Int[Tensor, "W T"],
    characters_per_token: Tensor,
    *,
    bytes_per_token: Tensor | None = None,
    given: Int[Tensor, " W"] | None = None,
) -> Likelihood:
    """The likelihood of windows from their log-weights; arguments as in `evaluate`."""
    first = torch.zeros(len(windows)) if given is None else given
    is_scored = torch.arange(windows.shape[1]) >= first[:, None]
    scored = windows.cpu()[is_scored]
    tokens = is_scored.sum(1).double()
    weighted = importance_weighted(log_w)
    elbo = -log_w.mean(0)
    nats, stderr = _per_token(weighted, tokens)
    elbo_nats, elbo_stderr = (None, None) if model.is_exact else _per_token(elbo, tokens)
    bound = model.config.bound
    sampling_stderr = gap_stderr = None
    if len(log_w) > 1:
        bound = f"iw-{len(log_w)}"
        sampling_stderr = math.sqrt(log_w.var(0).sum().item() / len(log_w)) / len(scored)
        gap_stderr = _per_token(elbo - weighted, tokens)[1]
    return Likelihood(
        bound=bound,
        nats_per_token=nats,
        stderr=stderr,
        samples=len(log_w),
        windows=len(windows),
        tokens=len(scored),
        characters=int(characters_per_token[scored].sum()),
        bytes=None if bytes_per_token is None else int(bytes_per_token[scored].sum()),
        elbo=elbo_nats,
        elbo_stderr=elbo_stderr,
        elbo_sampling_stderr=sampling_stderr,
        gap_stderr=gap_stderr,
    )


def _per_token(nats: Float[Tensor, " W"], tokens: Float[Tensor, " W"]) -> tuple[float, float]:
    """Nats per scored token over all windows, and the standard error of this ratio."""
    count = len(nats)
    total = tokens.sum().item()
    mean = nats.sum().item() / total
    if count < 2:
        return mean, math.nan
    spread = (nats - mean * tokens).square().sum().item() * count / (count - 1)
    return mean, math.sqrt(spread) / total
