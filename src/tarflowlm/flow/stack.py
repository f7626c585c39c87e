"""One flow block, and the prior: a stack of blocks of alternating direction over patches of tokens.

Shape legend: B batch, T tokens, P patch, N = T / P positions, d latent channels per token, C = P d, D width.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.flow.bijection import Bijection, Compose, zero_log_det
from tarflowlm.flow.couplings import AdjustWeights, Coupling, standard_normal_log_prob
from tarflowlm.flow.layers import ChannelMix, Direction, Patch
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
        self.order = Compose((ChannelMix(channels, mix), Direction(reverse)))
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

    def log_prob(self, z: Float[Tensor, "B N C"], *, equal_cotangents: bool = False) -> Float[Tensor, " B"]:
        """log p(z) with N(0, I) behind this block, in nats: cheaper than `forward`, for no noise is computed."""
        h = self.order(z)[0]
        return self.coupling.log_prob(h, self._features(h), equal_cotangents=equal_cotangents)

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

    def inverse(
        self,
        u: Float[Tensor, "B N C"],
        *,
        adjust: AdjustWeights | None = None,
        known: Float[Tensor, "B n"] | None = None,
        tick: Callable[[], None] | None = None,
    ) -> Float[Tensor, "B N C"]:
        """Latents, position by position with the KV cache: exact.

        `known` gives the first n latent channels of the sequence (row by row, position after position) in place of
        their noise; it asks for a block that neither reverses nor mixes. `tick` is called after every position.
        """
        assert known is None or self.keeps_order, "known latents need a block in the order of the tokens"
        noise = self.order(u)[0]
        cache = self.transformer.allocate_cache(len(u), u.shape[1], self.start.to(u.dtype))
        previous: Tensor | None = None
        h: list[Tensor] = []
        channels = u.shape[2]
        for t, u_t in enumerate(noise.unbind(1)):
            here = None if known is None else known[:, t * channels : (t + 1) * channels]
            features = self.features_at(cache, previous, len(u))
            if here is not None and here.shape[1] == channels:
                previous = here
            else:
                previous = self.coupling.invert(u_t, features, adjust, here)
            h.append(previous)
            if tick is not None:
                tick()
        return self.order.inverse(torch.stack(h, dim=1))


class Prior(Bijection):
    """p(z): f = f^(L) o ... o f^(1) on patches, u = f(z) ~ N(0, I) (docs/math.md, eq. 4). z, u [B, T, d]."""

    def __init__(self, patch: int, blocks: Iterable[FlowBlock]) -> None:
        super().__init__()
        self.patch = Patch(patch)
        self.blocks = nn.ModuleList(blocks)

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
        self, z: Float[Tensor, "B T d"], *, frozen: int = 0, equal_cotangents: bool = False
    ) -> Float[Tensor, " B"]:
        """log p(z) in nats, the last block by its density alone.

        The first `frozen` blocks are evaluated without a graph: they get no gradient and keep no activations.
        `equal_cotangents`: see `Coupling.log_prob`.
        """
        h = self.patch(z)[0]
        log_prob = zero_log_det(z)
        for index, block in enumerate(self.blocks[:-1]):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= frozen):
                h, log_det = block(h)
            log_prob = log_prob + log_det
        if not len(self.blocks):
            return standard_normal_log_prob(h)
        last = self.blocks[-1].log_prob(h, equal_cotangents=equal_cotangents)  # type: ignore[operator]
        return log_prob + last
