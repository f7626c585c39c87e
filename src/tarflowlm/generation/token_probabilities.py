"""Temperature, top-k and top-p where block 1 has no weights of tokens: Mix-1, or Mix-d with components of its own.

Shape legend: B rows, T tokens, d channels per token, V tokens of the vocabulary, S draws per token.
"""

import math

import torch
from torch import Tensor

from tarflowlm.errors import UserError
from tarflowlm.flow.channelwise import AffineCoupling
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.flow.numerics import held_rows, log_standard_normal, wide_dtype
from tarflowlm.generation.sampling import inverse_cdf, row_normal, row_uniform
from tarflowlm.model import TarFlowLM

LARGEST_VOCABULARY = 1024
"""Tokens of the vocabulary up to which their probabilities are estimated one by one."""
DRAWS = 4
"""Latents S per token of the vocabulary. Each estimate of a probability is unbiased for any S, but its power
1 / tau and the order of tokens are not: S draws shrink that error. With sharp codes one draw would do."""

MOST_LOST = 1.0
"""Temperature in block 1 ignores the upper blocks. It is refused if these contribute more nats per token."""


def check_estimable(model: TarFlowLM, settings: str) -> None:
    """UserError where tokens cannot be chosen by probability; `settings` names what asks for it: "top-k 3"."""
    name, V = model.config.blocks[0].coupling, model.config.vocab_size
    if isinstance(model.prior.block(0).coupling, AffineCoupling):
        raise UserError(
            f"{settings}: block 1 ({name}) has no weights of tokens to change: sample at temperature 1 without top-k "
            f"and top-p, or use a model whose block 1 is mixd or mix1"
        )
    if V > LARGEST_VOCABULARY:
        raise UserError(
            f"{settings}: block 1 ({name}) has no weights of tokens, and would estimate all {V} of them for every "
            f"token, at most {LARGEST_VOCABULARY}: sample at temperature 1 without top-k and top-p, or use a model "
            f"whose block 1 is mixd"
        )


def check_lost_information(model: TarFlowLM, h: Tensor, log_p: Tensor) -> None:
    """UserError where tokens cannot be chosen in block 1, because the blocks above it do much of the work.

    What they know is E[log p_{>1}(h) - log N(h; 0, I)], the divergence of their noise for block 1 from the normal
    noise that a choice assumes. `h` [rows, T, d] are draws of it, `log_p` [rows] their log-densities.
    """
    nats = 0.0 if model.num_blocks == 1 else float((log_p - log_standard_normal(h).sum((1, 2))).mean()) / h.shape[1]
    if nats > MOST_LOST:
        raise UserError(
            f"temperature, top-k and top-p choose tokens in block 1 and ignore what the blocks above it know, in "
            f"this model {nats / math.log(2):.1f} bits a token: sample it at temperature 1 without top-k and top-p"
        )


class EstimatedTokens:
    r"""Draws tokens by their adjusted probabilities given everything before (docs/math.md, eq. 18a).

        log p(x = k | past)  ~  log mean_s p(z_ks | past) / sum_j N_j(z_ks),    z_ks = mu_k + sigma_k eps_s

    The noise eps_s is the same for all k, so that its errors cancel in part between tokens. `adjust` changes these
    log-weights; the inverse of their CDF gives the token k, and one of its S latents is taken by weight.
    """

    def __init__(
        self,
        model: TarFlowLM,
        adjust: AdjustWeights,
        generators: list[torch.Generator],
        particles: int,
        num_tokens: int,
    ) -> None:
        """Noise for `num_tokens` tokens of `particles` rows per generator, all of it drawn here."""
        book = self.codebook = model.codebook
        self.coupling, self.adjust = model.prior.block(0).coupling, adjust
        self.eps = row_normal(generators, particles, num_tokens, DRAWS, model.config.latent_dim)
        self.eps = self.eps.flatten(0, 1).to(book.mean)
        self.uniform = row_uniform(generators, particles, num_tokens, 2).flatten(0, 1)
        self.uniform = self.uniform.to(book.mean.device, wide_dtype(book.mean))
        components = max(model.config.blocks[0].components, 1)
        self.held = held_rows(book.vocab_size * DRAWS * components, book.mean.device)

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
        flat = z.flatten(1, 2)
        log_p = self.coupling.candidate_log_prob(flat, features, earlier) - book.log_normaliser(flat)
        by_draw = log_p.view(z.shape[:3])
        first, second = self.uniform[rows, t].unbind(-1)
        tokens = inverse_cdf(self.adjust(by_draw.logsumexp(-1) - math.log(DRAWS)), first)
        draws = inverse_cdf(by_draw[each, tokens], second)
        return tokens, z[each, tokens, draws]
