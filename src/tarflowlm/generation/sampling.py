"""Parts of a sampler: a random stream per row, draws of tokens, adjusted weights, and estimated ones.

Shape legend: B rows, T tokens, d channels per token, V tokens of the vocabulary, S draws per token.
"""

import logging
import math
from collections.abc import Iterable

import torch
from torch import Generator, Tensor

from tarflowlm.data.prompts import BLANK as BLANK
from tarflowlm.errors import UserError
from tarflowlm.flow import wide_dtype
from tarflowlm.flow.channelwise import AffineCoupling
from tarflowlm.flow.codebook import Codebook
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.flow.numerics import held_rows, log_standard_normal
from tarflowlm.language_model import as_integer, as_number
from tarflowlm.model import TarFlowLM

LARGEST_VOCABULARY = 1024
"""Tokens of the vocabulary up to which their probabilities are estimated one by one."""
DRAWS = 4
"""Latents S per token of the vocabulary. Each estimate of a probability is unbiased for any S, but its power
1 / tau and the order of tokens are not: S draws shrink that error. With sharp codes one draw would do."""
MOST_LOST, NOTED = 0.05, 0.001
"""Temperature in block 1 ignores the upper blocks. It is refused if these know more nats per token than the first
number, and said if more than the second."""
logger = logging.getLogger("tarflowlm")


def row_generators(rows: Iterable[int], generator: Generator) -> list[Generator]:
    """One generator per row, from `generator` and the row alone; on the CPU, for the same noise on every device."""
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    return [Generator().manual_seed(seed + row) for row in rows]


def row_normal(generators: list[Generator], *shape: int) -> Tensor:
    """Standard normal noise [B, *shape] in float32, row b from generators[b]."""
    return torch.stack([torch.randn(*shape, generator=g) for g in generators])


def row_uniform(generators: list[Generator], *shape: int) -> Tensor:
    """Uniform numbers [B, *shape] in [0, 1) in float64, row b from generators[b]."""
    return torch.stack([torch.rand(*shape, generator=g, dtype=torch.float64) for g in generators])


def inverse_cdf(log_w: Tensor, uniform: Tensor) -> Tensor:
    """Indices [...] drawn by the log-weights [..., K], as the inverse of their CDF at numbers `uniform` [...]."""
    cumulative = log_w.softmax(-1, dtype=uniform.dtype).cumsum(-1)
    # above zero, where the first index may have no probability; NaN is found behind the last
    wanted = (uniform[..., None] * cumulative[..., -1:]).clamp(min=torch.finfo(uniform.dtype).tiny)
    return torch.searchsorted(cumulative, wanted).squeeze(-1).clamp(max=log_w.shape[-1] - 1)


def draw_tokens(codebook: Codebook, z: Tensor, generators: list[Generator]) -> Tensor:
    """Tokens [B, T] drawn from p(x|z) (docs/math.md, eq. 2), for latents z [B, T, d]; row b from generators[b]."""
    uniform = row_uniform(generators, z.shape[1]).to(z.device, wide_dtype(z)).flatten()
    rows = held_rows(codebook.vocab_size, z.device)
    parts = zip(z.flatten(0, 1).split(rows), uniform.split(rows), strict=True)
    return torch.cat([inverse_cdf(codebook.log_components(part), u) for part, u in parts]).view(z.shape[:2])


def adjust_weights(
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> AdjustWeights | None:
    """The map that a sampler applies to log-weights of tokens [..., K], or None for the identity (docs/math.md, 7).

    It raises weights to the power 1 / `temperature`, keeps the `top_k` largest, then the smallest set of the largest
    whose probability reaches `top_p`. Dropped tokens get the lowest finite log-weight: probability zero.
    UserError for settings out of range, and for what is no number.
    """
    temperature = as_number(temperature, "temperature")
    top_k = None if top_k is None else as_integer(top_k, "top-k")
    top_p = None if top_p is None else as_number(top_p, "top-p")
    greedy = "top-k 1 takes the most probable token"
    for name, value, is_right, rule in (
        ("temperature", temperature, math.isfinite(temperature) and temperature > 0, f"above 0 and finite; {greedy}"),
        ("top-k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top-p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
    ):
        if not is_right:
            raise UserError(f"{name} {value}: must be {rule}")
    if top_p == 1.0:
        top_p = None  # rounding lets the cumulative sum reach 1 before the last tokens
    if temperature == 1.0 and top_k is None and top_p is None:
        return None

    def adjust(log_w: Tensor) -> Tensor:
        log_w, least = torch.log_softmax(log_w / temperature, dim=-1), torch.finfo(log_w.dtype).min
        if top_k is not None and top_k < log_w.shape[-1]:
            # by index, so that ties do not keep more than top_k
            drop = torch.ones_like(log_w, dtype=torch.bool).scatter(-1, log_w.topk(top_k, dim=-1).indices, False)
            log_w = log_w.masked_fill(drop, least)
        if top_p is not None:
            ordered, order = log_w.softmax(-1).sort(dim=-1, descending=True)
            # a token is kept when the mass before it has not reached top_p
            is_behind = ordered.cumsum(-1) - ordered >= top_p
            log_w = log_w.masked_fill(torch.zeros_like(is_behind).scatter(-1, order, is_behind), least)
        return log_w

    return adjust


def check_estimable(model: TarFlowLM, settings: str) -> None:
    """UserError where tokens cannot be chosen by probability; `settings` names what asks for it: "top-k 3"."""
    name, V = model.config.blocks[0].coupling, model.config.vocab_size
    is_affine = isinstance(model.prior.block(0).coupling, AffineCoupling)
    if is_affine or V > LARGEST_VOCABULARY:
        too_many = f"and all {V} of them are too many to estimate, at most {LARGEST_VOCABULARY}"
        why = "to change" if is_affine else too_many
        rule = "sample at temperature 1 without top-k and top-p, or use a model whose block 1 is mixd"
        raise UserError(f"{settings}: block 1 ({name}) has no weights of tokens {why}: {rule}")


def check_lost_information(model: TarFlowLM, h: Tensor, log_p: Tensor) -> None:
    """UserError where tokens cannot be chosen in block 1, because the blocks above it do a part of the work; a notice
    where they do a little.

    What they know is E[log p_{>1}(h) - log N(h; 0, I)], the divergence of their noise for block 1 from the normal
    noise that a choice assumes. `h` [rows, T, d] are draws of it, `log_p` [rows] their log-densities.
    """
    nats = 0.0 if model.num_blocks == 1 else float((log_p - log_standard_normal(h).sum((1, 2))).mean()) / h.shape[1]
    what = "temperature, top-k and top-p choose tokens in block 1 and ignore what the blocks above it know"
    known = f"{what}, in this model {nats / math.log(2):.3g} bits a token"
    if nats > MOST_LOST:
        raise UserError(f"{known}: sample it at temperature 1 without top-k and top-p")
    if nats > NOTED:
        logger.warning(known)


class EstimatedTokens:
    r"""Draws tokens by their adjusted probabilities given everything before (docs/math.md, eq. 18a).

        log p(x = k | past)  ~  log mean_s p(z_ks | past) / sum_j N_j(z_ks),    z_ks = mu_k + sigma_k eps_s

    The noise eps_s is the same for all k, so that its errors cancel in part between tokens. `adjust` changes these
    log-weights; the inverse of their CDF gives the token k, and one of its S latents is taken by weight.
    """

    def __init__(
        self, model: TarFlowLM, adjust: AdjustWeights, generators: list[Generator], particles: int, num_tokens: int
    ) -> None:
        """Noise for `num_tokens` tokens of `particles` rows per generator, all of it drawn here."""
        book = self.codebook = model.codebook
        self.coupling, self.adjust = model.prior.block(0).coupling, adjust
        eps = row_normal(generators, particles, num_tokens, DRAWS, model.config.latent_dim).flatten(0, 1)
        uniform = row_uniform(generators, particles, num_tokens, 2).flatten(0, 1)
        self.eps, self.uniform = eps.to(book.mean), uniform.to(book.mean.device, wide_dtype(book.mean))
        num_components = book.vocab_size * DRAWS * max(model.config.blocks[0].components, 1)
        self.held = held_rows(num_components, book.mean.device)

    def __call__(self, features: Tensor, earlier: Tensor, rows: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Token t of some `rows`: tokens [rows] and their latents [rows, d].

        From the features c_n [rows, D] of their position, and the latents `earlier` [rows, a d] of its tokens so far.
        """
        parts = zip(features.split(self.held), earlier.split(self.held), rows.split(self.held), strict=True)
        tokens, latents = zip(*(self._draw(*part, t) for part in parts), strict=True)
        return torch.cat(tokens), torch.cat(latents)

    def _draw(self, features: Tensor, earlier: Tensor, rows: Tensor, t: int) -> tuple[Tensor, Tensor]:
        book, each = self.codebook, torch.arange(len(rows), device=rows.device)
        z = book.mean[:, None] + book.log_std.exp()[:, None, None] * self.eps[rows, t, None]
        flat, (first, second) = z.flatten(1, 2), self.uniform[rows, t].unbind(-1)
        log_p = self.coupling.candidate_log_prob(flat, features, earlier) - book.log_normaliser(flat)
        by_draw = log_p.view(z.shape[:3])
        tokens = inverse_cdf(self.adjust(by_draw.logsumexp(-1) - math.log(DRAWS)), first)
        return tokens, z[each, tokens, inverse_cdf(by_draw[each, tokens], second)]
