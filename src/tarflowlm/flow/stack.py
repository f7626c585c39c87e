"""Invertible maps: their interface, the two that only reorder latents, a flow block, and the prior,
a stack of blocks of alternating direction over patches of tokens.

Shape legend: B batch, T tokens, P patch, N = T / P positions, d channels per token, C = P d, D
width.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.errors import UserError
from tarflowlm.flow import widen
from tarflowlm.flow.codebook import Codebook, NoisyCodebook
from tarflowlm.flow.couplings import Coupling
from tarflowlm.flow.numerics import log_standard_normal
from tarflowlm.flow.transformer import KVCache, Transformer
from tarflowlm.model_config import TransformerConfig

Invert = Callable[[int, Tensor], Tensor]
"""Maps the index of a block (0-based) and its noise [B, N, C] to its latents [B, N, C]."""


class Bijection(nn.Module):
    """An invertible map between latents z and noise u, both [B, N, C]; a subclass has `forward` and
    `inverse`.
    """

    @abstractmethod
    def forward(
        self, z: Float[Tensor, "B N C"]
    ) -> tuple[Float[Tensor, "B ..."], Float[Tensor, "B ..."]]:
        """Latents to noise, in parallel over positions: u, and log|det du/dz| in nats.

        The log-determinant is that of the sequence, [B], or for a flow block its parts by position,
        [B, N].
        """

    @abstractmethod
    def inverse(self, u: Float[Tensor, "B N C"]) -> Float[Tensor, "B ..."]:
        """Noise to latents, without a log-determinant."""


class Patch(Bijection):
    """Joins P neighbouring tokens into one position: [B, T, d] <-> [B, N, C] (docs/math.md, eq.
    14); UserError if P does not divide T.
    """

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(
        self, z: Float[Tensor, "B T d"]
    ) -> tuple[Float[Tensor, "B N C"], Float[Tensor, " B"]]:
        B, T, d = z.shape
        if T % self.patch:
            raise UserError(f"patch {self.patch} does not divide the {T} tokens of the sequence")
        return z.reshape(B, T // self.patch, self.patch * d), z.new_zeros(B)

    def inverse(self, u: Float[Tensor, "B N C"]) -> Float[Tensor, "B T d"]:
        B, N, C = u.shape
        return u.reshape(B, N * self.patch, C // self.patch)


class Order(Bijection):
    """pi_l, the order in which a block sees its input: channels mixed, positions reversed
    (docs/math.md, eqs. 5, 15).

    Channels become [even-indexed, odd-indexed], `mix` times. This interleaves the channels of the
    tokens in a patch: a later block models them in another order. With `reverse` the positions run
    right to left.
    """

    channels: Tensor
    undo: Tensor

    def __init__(self, num_channels: int, *, reverse: bool = False, mix: int = 0) -> None:
        super().__init__()
        order = list(range(num_channels))
        for _ in range(mix):
            order = order[0::2] + order[1::2]
        self.reverse, self.mixes = reverse, order != sorted(order)
        self.register_buffer("channels", torch.tensor(order), persistent=False)
        self.register_buffer("undo", torch.tensor(order).argsort(), persistent=False)

    def forward(
        self, z: Float[Tensor, "B N C"]
    ) -> tuple[Float[Tensor, "B N C"], Float[Tensor, " B"]]:
        return self.positions(z[..., self.channels] if self.mixes else z), z.new_zeros(len(z))

    def inverse(self, u: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        u = self.positions(u)
        return u[..., self.undo] if self.mixes else u

    def positions(self, x: Float[Tensor, "B N ..."]) -> Float[Tensor, "B N ..."]:
        """x with its positions in the block's order, or back in that of the tokens."""
        return x.flip(1) if self.reverse else x


class InputMap(nn.Module):
    """Latents x [..., C] to Transformer inputs [..., D]: linear(x) + out(gelu(lift(x)))
    (docs/math.md, eq. 5).

    The linear path alone would confine the inputs to a C-dimensional subspace, too little for the
    Transformer where C is small (docs/log.md). The nonlinear path removes that limit at the cost of
    one small product.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear, self.lift = nn.Linear(channels, width), nn.Linear(channels, width)
        self.out = nn.Linear(width, width, bias=False)
        for layer, std in (
            (self.linear, channels**-0.5),
            (self.lift, 2.0 * channels**-0.5),
            (self.out, width**-0.5),
        ):
            nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(self.linear.bias)
        nn.init.normal_(self.lift.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.out(F.gelu(self.lift(x)))


class FlowBlock(Bijection):
    """f^(l): an autoregressive flow over N positions of C channels (docs/math.md, eq. 5).

    Position n, counted in the block's own order, is transformed with parameters that depend on the
    positions before n and on the earlier channels of position n. `order` (pi_l) mixes channels and
    reverses positions on input and is undone on output, so every state keeps the layout of the
    tokens and can be decoded by the codebook.

    With a `codebook`, which needs channels that are not mixed, the Transformer also reads an
    embedding of the tokens that the latents before n decode to. They are a function of these
    latents, so the map stays a flow.
    """

    places: Tensor

    def __init__(
        self,
        *,
        trunk: TransformerConfig,
        num_layers: int,
        channels: int,
        coupling: Coupling,
        reverse: bool,
        mix: int,
        codebook: Codebook | NoisyCodebook | None = None,
    ) -> None:
        super().__init__()
        self.order = Order(channels, reverse=reverse, mix=mix)
        self.keeps_order = not reverse and mix == 0
        self.input = InputMap(channels, trunk.width)
        self.start = nn.Parameter(torch.randn(trunk.width))
        self.transformer = Transformer(trunk, num_layers)
        self.coupling = coupling
        self._codebook = (
            codebook,
        )  # in a tuple, so that its parameters are not registered a second time
        self.token_embedding: nn.Embedding | None = None
        if codebook is not None:
            assert not self.order.mixes
            # one embedding for every place of a patch, by the number of the place times V + token
            places = torch.arange(channels // codebook.mean.shape[1]) * codebook.vocab_size
            self.register_buffer("places", places, persistent=False)
            self.token_embedding = nn.Embedding(len(places) * codebook.vocab_size, trunk.width)

    def _inputs(self, h: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch D"]:
        """The Transformer's inputs for the latents of positions."""
        x, codebook = widen(self.input(h)), self._codebook[0]
        if codebook is None or self.token_embedding is None:
            return x
        with torch.no_grad():
            tokens = codebook.decode(h.unflatten(-1, (-1, codebook.mean.shape[1])))
        return x + self.token_embedding(tokens + self.places).sum(-2)

    def _features(self, h: Tensor) -> Tensor:
        return self.features_of(None, h[:, :-1], first=True)

    def forward(
        self, z: Float[Tensor, "B N C"]
    ) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B N"]]:
        """h^(l) from h^(l-1) = z, and the part of every position in log|det J_l|, in nats."""
        h = self.order(z)[0]
        u, log_det = self.coupling(h, self._features(h))
        return self.order.inverse(u), self.order.positions(log_det)

    def log_prob(
        self, z: Float[Tensor, "B N C"], *, relative: bool = False
    ) -> Float[Tensor, "B N"]:
        """log p(z_n | positions before n in the block's order) with this block as the last one, in
        nats.

        Cheaper than `forward`, since it needs no noise. `relative`: see `MixDCoupling.log_prob`.
        """
        h, options = self.order(z)[0], {"relative": True} if relative else {}
        return self.order.positions(self.coupling.log_prob(h, self._features(h), **options))

    def features_at(
        self, cache: KVCache, previous: Tensor | None, batch: int
    ) -> Float[Tensor, "B D"]:
        """Features c_n of the next position, given the latents [B, C] of the one before it (None at
        the start).
        """
        x = self.start.expand(batch, -1) if previous is None else self._inputs(previous)
        return cache.extend(x[:, None])[:, 0]

    def features_of(
        self, cache: KVCache | None, past: Float[Tensor, "B given C"], *, first: bool
    ) -> Tensor:
        """Features [B, next, D] of the positions after the cached ones, given the latents `past` of
        the ones before.

        With `first` they begin with those of the first position of the sequence: one more than
        there are in `past`.
        """
        x = self._inputs(past)
        if first:
            x = torch.cat((self.start.expand(len(past), 1, -1), x), dim=1)
        return self.transformer(x) if cache is None else cache.extend(x)

    def allocate_cache(self, batch: int, num_positions: int) -> KVCache:
        """An empty KV cache for `num_positions` positions of this block."""
        return KVCache(self.transformer, batch, num_positions, self.start)

    @torch.no_grad()
    def inverse(self, u: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """h^(l-1) from h^(l) = u, position by position, without gradients. Sweeps:
        `generation/inversion.py`.
        """
        cache, invert = self.allocate_cache(len(u), u.shape[1]), self.coupling.inverter()
        h: list[Tensor] = []
        for u_n in self.order(u)[0].unbind(1):
            h.append(invert(u_n, self.features_at(cache, h[-1] if h else None, len(u)), None))
        return self.order.inverse(torch.stack(h, dim=1))


class Prior(Bijection):
    """The prior p(z): u = f(z) ~ N(0, I) with f = f^(L) o ... o f^(1) (docs/math.md, eq. 4); z, u
    [B, T, d].

    The blocks act on positions of P tokens. All methods raise UserError if P does not divide T.
    """

    def __init__(self, patch: int, blocks: Iterable[FlowBlock]) -> None:
        super().__init__()
        self.patch = Patch(patch)
        self.blocks = nn.ModuleList(blocks)

    def block(self, index: int) -> FlowBlock:
        block = self.blocks[index]
        assert isinstance(block, FlowBlock)
        return block

    def states(self, z: Float[Tensor, "B T d"]) -> tuple[list[Tensor], list[Tensor]]:
        """The states h^(0) = z, ..., h^(L) = u, each [B, T, d], and the parts of log|det J_l| by
        position [B, N].
        """
        h = self.patch(z)[0]
        states, log_dets = [z], []
        for block in self.blocks:
            h, log_det = block(h)
            states.append(self.patch.inverse(h))
            log_dets.append(log_det)
        return states, log_dets

    def forward(
        self, z: Float[Tensor, "B T d"]
    ) -> tuple[Float[Tensor, "B T d"], Float[Tensor, " B"]]:
        """Noise u = h^(L), and the sum of all log-determinants, in nats."""
        states, log_dets = self.states(z)
        return states[-1], sum((log_det.sum(-1) for log_det in log_dets), start=z.new_zeros(len(z)))

    def descend(
        self,
        state: Float[Tensor, "B T d"],
        invert: Invert,
        *,
        top: int | None = None,
        bottom: int = 0,
    ) -> list[Tensor]:
        """Invert blocks top (by default L), ..., bottom + 1: h^(top) = `state`, ..., h^(bottom),
        each [B, T, d].
        """
        h, states = self.patch(state)[0], [state]
        for index in reversed(range(bottom, len(self.blocks) if top is None else top)):
            h = invert(index, h)
            states.append(self.patch.inverse(h))
        return states

    def inverse(self, u: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        """Latents z = h^(0), every block inverted position by position."""
        return self.descend(u, lambda index, h: self.block(index).inverse(h))[-1]

    def log_prob(
        self,
        z: Tensor,
        *,
        above: int = 0,
        frozen: int = 0,
        per_position: bool = False,
        relative: bool = False,
    ) -> Float[Tensor, "B ..."]:
        """log p(z) [B] of z [B, T, d], in nats: the log-determinants of all blocks but the last,
        and its density.

        `above` takes z as the state h^(above) and evaluates the prior that the blocks above it
        define. The first `frozen` blocks run without a graph: no gradients, no stored activations.
        `per_position` returns the parts [B, N] of log p(z) instead. `relative` subtracts the
        decoder's normaliser, if the last block `is_tied`.
        """
        h, parts = self.patch(z)[0], []
        for index in range(above, len(self.blocks) - 1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= frozen):
                h, log_det = self.block(index)(h)
            parts.append(log_det)
        flows = above < len(self.blocks)
        parts.append(
            self.block(-1).log_prob(h, relative=relative)
            if flows
            else log_standard_normal(h).sum(-1)
        )
        first, *rest = parts if per_position else [part.sum(-1) for part in parts]
        return sum(rest, start=first)
