"""A flow block, and the prior: a stack of blocks of alternating direction over patches."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.flow import widen
from tarflowlm.flow.cache import Cache
from tarflowlm.flow.codebook import Codebook, NoisyCodebook
from tarflowlm.flow.conditioner import Conditioner
from tarflowlm.flow.couplings import ByPosition, Coupling, Features, Latents
from tarflowlm.flow.inputs import InputMap
from tarflowlm.flow.numerics import component_finder, log_standard_normal
from tarflowlm.flow.order import Order, Patch
from tarflowlm.flow.transformer import Embedder, Shape, Transformer


class FlowBlock(Conditioner):
    """f^(l): an autoregressive flow over N positions of C channels (docs/math.md, eq. 5).

    Position n, in the block's own order, is transformed with parameters that depend on the
    positions before it, through features

        c_1, ..., c_N = Transformer(start, input(h_1), ..., input(h_{N-1}))

    of which c_n sees a learned `start` and h_1, ..., h_{n-1}. The order is undone on output, so the
    codebook can decode every state.

    With a `codebook`, which needs channels that are not mixed, the Transformer also reads an
    embedding of the tokens that the latents decode to.
    """

    places: Tensor

    def __init__(
        self,
        *,
        trunk: Shape,
        num_layers: int,
        order: Order,
        coupling: Coupling,
        codebook: Codebook | NoisyCodebook | None = None,
        is_linear: bool = False,
    ) -> None:
        super().__init__()
        channels = len(order.channels)
        self.order = order
        self.input = InputMap(channels, trunk.width, is_linear=is_linear)
        self.start = nn.Parameter(torch.randn(trunk.width))
        self.transformer = Transformer(trunk, num_layers)
        self.coupling = coupling
        # in a tuple, so that it is not registered twice
        self._codebook = (codebook,)
        self.token_embedding: nn.Embedding | None = None
        if codebook is not None:
            assert not order.mixes
            # each place of a patch has embeddings of its own, at place times V + token
            places = torch.arange(channels // codebook.mean.shape[1]) * codebook.vocab_size
            self.register_buffer("places", places, persistent=False)
            self.token_embedding = nn.Embedding(len(places) * codebook.vocab_size, trunk.width)

    def embedder(self, cache: Cache | None = None) -> Embedder:
        codebook = self._codebook[0]
        embedding = self.token_embedding
        own = None if cache is None else cache.embedder(self.input, codebook, embedding)
        if own is not None:
            return own
        if codebook is None or embedding is None:
            return lambda past: widen(self.input(past))
        dim = codebook.mean.shape[1]
        tokens_of = component_finder(codebook.mean, codebook.log_std)

        def embed(past: Tensor) -> Tensor:
            tokens = tokens_of(past.unflatten(-1, (-1, dim)))
            return widen(self.input(past)) + embedding(tokens + self.places).sum(-2)

        return embed

    def features(self, h: Latents) -> Features:
        """Features c_n of all positions, each from the latents before it."""
        return self.features_of_all(h[:, :-1])

    def forward(self, z: Latents) -> tuple[Latents, ByPosition]:
        """h^(l) from h^(l-1) = z, and the part of every position in log|det J_l|, in nats."""
        h = self.order(z)
        u, log_det = self.coupling(h, self.features(h))
        return self.order.inverse(u), self.order.positions(log_det)

    def log_prob(self, z: Latents) -> ByPosition:
        """log p(z_n | positions before n in the block's order) of the last block, in nats."""
        h = self.order(z)
        return self.order.positions(self.coupling.log_prob(h, self.features(h)))

    @torch.no_grad()
    def inverse(self, u: Latents) -> Latents:
        """h^(l-1) from h^(l) = u, position by position, without gradients."""
        cache = self.allocate_cache(len(u), u.shape[1])
        weights = self.coupling.present_weights()
        h: list[Tensor] = []
        for u_n in self.order(u).unbind(1):
            features = self.features_at(cache, h[-1] if h else None)
            h.append(self.coupling.invert(u_n, features, weights=weights))
        return self.order.inverse(torch.stack(h, dim=1))


class Prior(nn.Module):
    """The prior p(z): u = f(z) ~ N(0, I) with f = f^(L) o ... o f^(1) (docs/math.md, eq. 4).

    z and u are [B, T, d]. All methods raise UserError if P does not divide T.

    Example:
        >>> from tarflowlm import FlowConfig, TarFlowLM
        >>> _ = torch.manual_seed(0)
        >>> prior = TarFlowLM(FlowConfig(vocab_size=27)).prior
        >>> noise = torch.randn(2, 6, 8)
        >>> z = prior.inverse(noise)
        >>> u, log_det = prior(z)
        >>> torch.allclose(u, noise, atol=1e-4), log_det.shape
        (True, torch.Size([2]))
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
        """States h^(0) = z, ..., h^(L) = u [B, T, d], and every log|det J_l| [B, N], in nats."""
        h = self.patch(z)
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

    def inverse(self, u: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        """Latents z = h^(0), every block inverted position by position."""
        h = self.patch(u)
        for index in reversed(range(len(self.blocks))):
            h = self.block(index).inverse(h)
        return self.patch.inverse(h)

    def log_prob(self, z: Float[Tensor, "B T d"], *, above: int = 0) -> Float[Tensor, " B"]:
        """log p(z), in nats; with `above` z is the state h^(above), under the blocks above it."""
        return self.log_prob_by_position(z, above=above).sum(-1)

    def log_prob_by_position(
        self, z: Float[Tensor, "B T d"], *, above: int = 0, frozen: int = 0
    ) -> Float[Tensor, "B N"]:
        """The part of every position in log p(z), in nats (docs/math.md, eqs. 4 and 6).

        That is log|det J_l| of all blocks but the last, and its density. The first `frozen` blocks
        run without a graph.
        """
        h = self.patch(z)
        if above == len(self.blocks):
            return log_standard_normal(h).sum(-1)
        log_dets = h.new_zeros(h.shape[:2])
        for index in range(above, len(self.blocks) - 1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= frozen):
                h, log_det = self.block(index)(h)
            log_dets = log_dets + log_det
        return log_dets + self.block(-1).log_prob(h)
