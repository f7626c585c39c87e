"""Noise becomes latents, position by position, and given latents become noise."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tarflowlm.flow.fills import complete
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.flow.stack import FlowBlock
from tarflowlm.generation.decoder import Decoder
from tarflowlm.generation.sampling import Gumbel
from tarflowlm.requests import Adjustment


class Inversion(Decoder):
    """Texts whose `noise` [B, N, C] a block turns into latents, in its own order, and back where
    tokens are given (docs/math.md, eq. 21).

    The log-probability of a given token is log p(z_t | z_<t), minus its `log_normaliser`.
    """

    source: FlowBlock
    log_normaliser: Tensor | None = None
    """log sum_j N_j(z_t) of given tokens, [B, N, P], and 0 elsewhere; None: 0 everywhere."""

    def __init__(
        self,
        block: FlowBlock,
        noise: Tensor,
        adjust: Adjustment | None = None,
        gumbel: Gumbel | None = None,
        *,
        known: Tensor | None = None,
        is_known: Tensor | None = None,
    ) -> None:
        """With `gumbel` numbers latents are drawn, and `noise` is not their noise.

        Tokens have the latents `known` [B, N, C] where `is_known` [B, N, P], on the CPU.
        """
        # an inverse needs the same features as the forward map; drawing does not
        is_drawn = gumbel is not None and known is None
        half = is_drawn and noise.is_cuda and noise.dtype == torch.float32
        super().__init__(block, noise.clone(), is_known, half=half)
        self.noise = noise
        self.adjust = adjust
        self.gumbel = gumbel
        self.known = self.values if known is None else known

    def read(self, end: int) -> Tensor:
        here = slice(None), slice(self.at, end)
        z = self.known[here]
        u, log_det = self.source.coupling(z, self.settle(z))
        self.noise[here] = u
        log_p = log_det.sum(-1) + standard_normal_log_prob(u)
        if self.log_normaliser is not None:
            log_p = log_p - self.log_normaliser[here].sum((1, 2))
        return log_p

    def step(self) -> Tensor | None:
        """As `Drawing.step`."""
        features, is_known = self.next_features()
        here = self.there, self.at
        gumbel = None if self.gumbel is None else self.gumbel.at(*here)
        coupling = self.source.coupling
        self.at += 1
        self.progress.advance()
        if is_known is None:
            self.values[here] = coupling.invert(
                self.noise[here], features, self.adjust, gumbel, self.weights
            )
            return None
        known = self.known[here]
        self.values[here], self.noise[here], log_p = complete(
            coupling, self.noise[here], features, known, is_known, self.adjust, gumbel
        )
        if self.log_normaliser is not None:
            log_p = log_p - self.log_normaliser[here]
        return self.of_all(log_p.sum(-1))

    @cached_property
    def weights(self) -> Any:
        """The coupling's, once there is a step."""
        return self.source.coupling.present_weights()

    def take(self, order: Tensor) -> None:
        super().take(order)
        self.noise[:, : self.at] = self.noise[order, : self.at]
