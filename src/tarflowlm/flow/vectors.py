"""A density of plain vectors, given a context if there is one: couplings without positions."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from tarflowlm.errors import UserError
from tarflowlm.flow.channelwise import ChannelCoupling, Mix1Coupling
from tarflowlm.flow.heads import HeadShape


class VectorFlow(nn.Module):
    r"""p(z | context) of vectors z [..., C]: u = f(z) ~ N(0, I) with f = f^(L) o ... o f^(1).

        log p(z | context) = log N(u; 0, I) + sum_l log|det J_l|

    A block is a coupling whose head sees the channels before a channel, and features [D] of the
    context [..., c], or learned ones without a context. Every second block sees the channels in
    reverse. Standardise the channels of your data first.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> flow = VectorFlow(2, context=3, blocks=2, components=4)
        >>> z, given = torch.randn(5, 2), torch.randn(5, 3)
        >>> u, log_det = flow(z, given)
        >>> torch.allclose(flow.inverse(u, given), z, atol=1e-4), flow.log_prob(z, given).shape
        (True, torch.Size([5]))
        >>> flow.sample(7, given[0]).shape
        torch.Size([7, 2])
    """

    def __init__(
        self,
        dim: int,
        *,
        context: int = 0,
        blocks: int = 3,
        coupling: Callable[..., ChannelCoupling] = Mix1Coupling,
        width: int = 64,
        hidden: int = 64,
        **options: Any,
    ) -> None:
        """With `dim` C channels, a `context` of c numbers, features of this `width` D, and `hidden`
        units for every channel. A `coupling` is made with `channels`, a `head` and the `options`;
        Mix-1 has 8 `components`, unless another number is given.
        """
        super().__init__()
        if min(dim, blocks, width, hidden) < 1 or context < 0:
            sizes = f"dim {dim}, blocks {blocks}, width {width}, hidden {hidden}"
            raise UserError(f"{sizes}, context {context}: all but context must be at least 1")
        if coupling is Mix1Coupling:
            options = {"components": 8} | options
        self.dim = dim
        head = HeadShape(width=width, hidden=hidden, features=max(4, 2 * hidden // dim))
        self.couplings = nn.ModuleList(
            coupling(channels=dim, head=head, **options) for _ in range(blocks)
        )
        self.start = nn.Parameter(torch.randn(width))
        self.reader = (
            nn.Sequential(nn.Linear(context, width), nn.GELU(), nn.Linear(width, width))
            if context
            else None
        )

    def forward(
        self, z: Float[Tensor, "... C"], context: Float[Tensor, "... c"] | None = None
    ) -> tuple[Float[Tensor, "... C"], Float[Tensor, "..."]]:
        """Noise u, and the sum of all log-determinants, in nats."""
        h, features = self._rows(z, context)
        log_det = h.new_zeros(h.shape[1])
        for coupling in self.couplings:
            h, part = coupling(h, features)
            h, log_det = h.flip(-1), log_det + part[0]
        return h.view(z.shape), log_det.view(z.shape[:-1])

    def log_prob(
        self, z: Float[Tensor, "... C"], context: Float[Tensor, "... c"] | None = None
    ) -> Float[Tensor, "..."]:
        """log p(z | context), in nats."""
        h, features = self._rows(z, context)
        *others, last = self.couplings
        log_p = h.new_zeros(h.shape[1])
        for coupling in others:
            h, part = coupling(h, features)
            h, log_p = h.flip(-1), log_p + part[0]
        assert isinstance(last, ChannelCoupling)
        return (log_p + last.log_prob(h, features)[0]).view(z.shape[:-1])

    @torch.no_grad()
    def inverse(
        self, u: Float[Tensor, "... C"], context: Float[Tensor, "... c"] | None = None
    ) -> Float[Tensor, "... C"]:
        """The vectors of noise u, without gradients."""
        rows, features = self._rows(u, context)
        h = rows[0]
        for coupling in reversed(self.couplings):
            assert isinstance(coupling, ChannelCoupling)
            h = coupling.invert(h.flip(-1), features[0])
        return h.view(u.shape)

    def sample(
        self,
        num: int,
        context: Float[Tensor, "... c"] | None = None,
        generator: Generator | None = None,
    ) -> Float[Tensor, "num C"]:
        """`num` draws, given a context [c] of all or [num, c] of each."""
        noise = torch.randn(num, self.dim, generator=generator, dtype=self.start.dtype)
        noise = noise.to(self.start.device)
        return self.inverse(noise, context)

    def _rows(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Vectors [1, R, C] as positions of one sequence, and their features [1, R, D]."""
        if z.shape[-1:] != (self.dim,):
            raise UserError(f"vectors of shape {list(z.shape)}: give [..., {self.dim}]")
        if (self.reader is None) != (context is None):
            wanted = "give none" if self.reader is None else "give one, [..., c]"
            raise UserError(f"context {'None' if context is None else 'given'}: {wanted}")
        features: Tensor = self.start
        if self.reader is not None:
            features = features + self.reader(context)
        features = features.expand(*z.shape[:-1], -1)
        return z.reshape(1, -1, self.dim), features.reshape(1, -1, features.shape[-1])
