"""One flow block, and the prior: a stack of blocks of alternating direction over patches of tokens.

Shape legend: B batch, T tokens, P patch, N = T / P positions, d latent channels per token, C = P d, D width.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.flow.bijection import Bijection, Compose, zero_log_det
from tarflowlm.flow.couplings import Coupling
from tarflowlm.flow.layers import ChannelMix, Direction, Patch
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.flow.precision import widen
from tarflowlm.flow.transformer import KVCache, Transformer, TransformerConfig


class InputMap(nn.Module):
    """Latents [..., C] to Transformer inputs [..., D]: x -> A x + B gelu(E x).

    The linear path alone confines V token embeddings to the C-dimensional span of the codebook, which starves the
    Transformer where C is small (docs/log.md); the second path lifts that at the price of one small product.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, width)
        self.lift = nn.Linear(channels, width)
        self.out = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.linear.weight, std=channels**-0.5)
        nn.init.normal_(self.lift.weight, std=2.0 * channels**-0.5)
        nn.init.normal_(self.out.weight, std=width**-0.5)
        nn.init.zeros_(self.linear.bias)
        nn.init.normal_(self.lift.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.out(F.gelu(self.lift(x)))


class FlowBlock(Bijection):
    """f^(l): an autoregressive flow over N positions of C channels (docs/math.md, eq. 5).

    Position t (in the block's own direction) is transformed with parameters that depend on positions t' < t and,
    inside the position, on earlier channels. `order` mixes channels and reverses positions on the way in and is
    undone on the way out, so that every state keeps the layout of the tokens and can be decoded by the codebook.
    """

    def __init__(
        self,
        *,
        trunk: TransformerConfig,
        num_layers: int,
        channels: int,
        coupling: Coupling,
        reverse: bool,
        mix: int,
    ) -> None:
        super().__init__()
        self.direction = Direction(reverse)
        self.order = Compose((ChannelMix(channels, mix), self.direction))
        self.keeps_order = not reverse and mix == 0
        self.input = InputMap(channels, trunk.width)
        self.start = nn.Parameter(torch.randn(trunk.width))
        self.transformer = Transformer(trunk, num_layers)
        self.coupling = coupling

    def _features(self, h: Tensor) -> Tensor:
        """Features [B, N, D] of the past of every position: a start vector, then the inputs shifted by one."""
        return self.features_of(None, h[:, :-1], first=True)

    def forward(self, z: Float[Tensor, "B N C"]) -> tuple[Float[Tensor, "B N C"], Float[Tensor, " B"]]:
        h = self.order(z)[0]
        u, log_det = self.coupling(h, self._features(h))
        return self.order.inverse(u), log_det

    def log_prob(
        self, z: Float[Tensor, "B N C"], *, equal_cotangents: bool = False, relative: bool = False
    ) -> Float[Tensor, " B"]:
        """log p(z) with N(0, I) behind this block, in nats: cheaper than `forward`, for no noise is computed.

        `relative`, of a tied Mix-d block alone: log p(z) - sum_t log sum_k N_k(z_t), in one sweep over the codebook.
        """
        h = self.order(z)[0]
        if relative:
            assert isinstance(self.coupling, MixDCoupling)
            assert self.coupling.is_tied
            return self.coupling.log_prob(h, self._features(h), equal_cotangents=equal_cotangents, relative=True)
        return self.coupling.log_prob(h, self._features(h), equal_cotangents=equal_cotangents)

    def position_log_prob(self, z: Float[Tensor, "B N C"]) -> Float[Tensor, "B N"]:
        """log p(z_n | positions before n in the block's order) with N(0, I) behind this block, in nats."""
        h = self.order(z)[0]
        rows = h.flatten(0, 1)[:, None], self._features(h).flatten(0, 1)[:, None]
        log_p = self.coupling.log_prob(*rows).view(*h.shape[:2], 1)
        return self.direction.inverse(log_p).squeeze(-1)

    def features_at(self, cache: KVCache, previous: Tensor | None, batch: int) -> Float[Tensor, "B D"]:
        """Features of the next position, given the latents [B, C] of the one before it (None at the start)."""
        x = self.start.expand(batch, -1) if previous is None else widen(self.input(previous))
        return self.transformer(x[:, None], cache)[:, 0]

    def features_of(
        self, cache: KVCache | None, past: Float[Tensor, "B M C"], *, first: bool
    ) -> Float[Tensor, "B n D"]:
        """Features of the next positions after the cached ones, given the latents of the position before each.

        n = M, or M + 1 where the `first` of them begins the sequence and has nothing before it.
        """
        x = widen(self.input(past))
        if first:
            x = torch.cat((self.start.expand(len(past), 1, -1), x), dim=1)
        return self.transformer(x, cache)

    def inverse(self, u: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """Latents, position by position with the KV cache: exact. See also `generation/inversion.py`."""
        noise = self.order(u)[0]
        cache = self.transformer.allocate_cache(len(u), u.shape[1], self.start.to(u.dtype))
        previous: Tensor | None = None
        h: list[Tensor] = []
        for u_t in noise.unbind(1):
            previous = self.coupling.invert(u_t, self.features_at(cache, previous, len(u)))
            h.append(previous)
        return self.order.inverse(torch.stack(h, dim=1))


class Prior(Bijection):
    """p(z): f = f^(L) o ... o f^(1) on patches, u = f(z) ~ N(0, I) (docs/math.md, eq. 4). z, u [B, T, d]."""

    def __init__(self, patch: int, blocks: Iterable[FlowBlock]) -> None:
        super().__init__()
        self.patch = Patch(patch)
        self.blocks = nn.ModuleList(blocks)

    @property
    def is_one_tied_mixture(self) -> bool:
        """True for a single block that is Mix-d over the encoder's codebook: the decoder has the same components."""
        coupling = self.blocks[0].coupling if len(self.blocks) == 1 else None
        return isinstance(coupling, MixDCoupling) and coupling.is_tied

    def states(self, z: Float[Tensor, "B T d"]) -> tuple[list[Tensor], list[Tensor]]:
        """h^(0) = z, h^(1), ..., h^(L) = u, each [B, T, d], and the L log-determinants [B]."""
        h = self.patch(z)[0]
        states, log_dets = [z], []
        for block in self.blocks:
            h, log_det = block(h)
            states.append(self.patch.inverse(h))
            log_dets.append(log_det)
        return states, log_dets

    def forward(self, z: Float[Tensor, "B T d"]) -> tuple[Float[Tensor, "B T d"], Float[Tensor, " B"]]:
        states, log_dets = self.states(z)
        return states[-1], sum(log_dets, start=zero_log_det(z))

    def inverse(self, u: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        h = self.patch(u)[0]
        for block in reversed(self.blocks):
            h = block.inverse(h)  # type: ignore[operator]
        return self.patch.inverse(h)

    def log_prob(
        self,
        z: Float[Tensor, "B T d"],
        *,
        frozen: int = 0,
        equal_cotangents: bool = False,
        above: int = 0,
        relative: bool = False,
    ) -> Float[Tensor, " B"]:
        """log p(z) in nats, the last block by its density alone; of the state z = h^(above) where that is given.

        The first `frozen` blocks are evaluated without a graph: they get no gradient and keep no activations.
        `equal_cotangents`: see `Coupling.log_prob`. `relative` (see `FlowBlock.log_prob`) takes off the decoder's
        normaliser as well, for a stack that `is_one_tied_mixture`.
        """
        assert self.is_one_tied_mixture or not relative
        h = self.patch(z)[0]
        log_prob = zero_log_det(z)
        blocks = self.blocks[above:]
        for index, block in enumerate(blocks[:-1], above):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= frozen):
                h, log_det = block(h)
            log_prob = log_prob + log_det
        if not len(blocks):
            return standard_normal_log_prob(h)
        last = blocks[-1].log_prob(h, equal_cotangents=equal_cotangents, relative=relative)  # type: ignore[operator]
        return log_prob + last
