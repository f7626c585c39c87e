r"""Floating-point operations of a model, from its configuration; a multiply-add counts two.

Two conventions, both per sequence, forward:

- `paper`: the terms of the paper's appendix H. Per block of L layers and width D over N = T / P positions
      4 D N + L (6 D^2 N + 2 D N^2 + 2 D^2 N + 16 D^2 N),    an LM head 2 D V T,
  and per position of a block with a masked autoregressive head, c = P d channels, D_m = 2 `head_hidden`,
      6 E (c - 1)^2 + D_m c (D + E (c - 1)) + D_m c^2 (outputs per channel: 3 K, affine 2).
  The product of attention and values is left out there. A Mix-d block, of which the appendix does not speak, is
  given its weight head, 2 D K per token.
- `full`: every matrix product of the modules as they are here, attention over the whole square of positions. What is
  computed a second time (attention scores and codebook tiles in the backward, checkpointed layers) does not count,
  nor do elementwise operations.

Training costs three times the forward of what is trained, and once that of the frozen blocks.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from tarflowlm.baseline import IN_PATCH_CHANNELS, BaselineConfig
from tarflowlm.flow.transformer import TransformerConfig
from tarflowlm.model import FlowConfig

Convention = Literal["paper", "full"]
Config = FlowConfig | BaselineConfig


@dataclass(frozen=True)
class Head:
    """Sizes of an `AutoregressiveHead`."""

    groups: int
    channels: int
    hidden: int
    features: int
    outputs: int
    """Of all output tensors together."""
    skip: int
    """Of the first of them, where it has linear paths; else 0."""

    def flops(self, width: int, *, cached: bool) -> int:
        """Per position. All groups at once use whole matrices under a mask, one by one what they need of them."""
        G, known = self.groups, self.groups - 1
        pairs = G * known // 2 if cached else G * known
        context = 2 * width * (G * self.hidden + self.skip)
        earlier = 2 * known * 3 * self.channels * self.features
        earlier += 2 * pairs * (self.hidden * self.features + self.channels * self.skip)
        return context + earlier + 2 * G * self.hidden * self.outputs


def forward_flops(config: Config, convention: Convention = "full") -> Counter[str]:
    """One evaluation of the training loss over a sequence of `config.context` tokens, by part."""
    if isinstance(config, BaselineConfig):
        return _baseline(config, convention, cached=False)
    # the sweep over the codebook that the density of a single tied Mix-d block takes gives the normaliser as well
    is_shared = config.couplings == ("mixd",) and config.components == (0,)
    total = _codebook(config) if convention == "full" and not is_shared else Counter()
    for index in range(len(config.couplings)):
        total += _block(config, index, convention, cached=False)
    return total


def training_flops(config: Config, *, frozen: int = 0, convention: Convention = "full") -> int:
    """Forward and backward of the training loss over one sequence; the first `frozen` blocks are not trained."""
    if isinstance(config, BaselineConfig):
        return 3 * forward_flops(config, convention).total()
    below = sum(_block(config, i, convention, cached=False).total() for i in range(frozen))
    codebook = _codebook(config).total() if frozen and convention == "full" else 0
    return 3 * forward_flops(config, convention).total() - 2 * (below + codebook)


def generation_flops(config: Config, convention: Convention = "full") -> int:
    """`config.context` tokens, position by position with a cache of keys and values, and their decoding.

    The paper's convention has no terms of its own for this: it is that of the forward pass.
    """
    if convention == "paper":
        return forward_flops(config, convention).total()
    if isinstance(config, BaselineConfig):
        return _baseline(config, convention, cached=True).total()
    blocks = (_block(config, i, convention, cached=True).total() for i in range(len(config.couplings)))
    return sum(blocks) + _codebook(config).total()


def _body(
    trunk: TransformerConfig, num_layers: int, positions: int, convention: Convention, cached: bool
) -> Counter[str]:
    D, L, N = trunk.width, num_layers, positions
    square = N * (N + 1) // 2 if cached else N * N
    return Counter(
        {
            "projections": 8 * L * D * D * N,
            "scores": 2 * L * D * square,
            "values": 0 if convention == "paper" else 2 * L * D * square,
            "mlp": 4 * trunk.mlp_ratio * L * D * D * N,
        }
    )


def _codebook(config: FlowConfig) -> Counter[str]:
    """The densities of all tokens at every latent vector."""
    return Counter({"codebook": 2 * (config.latent_dim + 2) * config.vocab_size * config.context})


def _block(config: FlowConfig, index: int, convention: Convention, *, cached: bool) -> Counter[str]:
    """One flow block; the last one is asked for its density alone."""
    N, D = config.context // config.patch, config.trunk.width
    channels = config.patch * config.latent_dim
    parts = _body(config.trunk, config.layers[index], N, convention, cached)
    coupling, components = config.couplings[index], config.components[index] or config.vocab_size
    if convention == "paper":
        parts["input"] = 4 * D * N
        parts["head"] = N * _paper_head(config, index)
        return parts
    parts["input"] = 2 * (2 * channels * D + D * D) * (N - 1)
    if coupling == "mixd":
        parts["head"] = N * _token_features(config.patch, config.latent_dim, D, config.in_patch, cached)
        parts["head"] += 2 * D * components * config.context
        last = index == len(config.couplings) - 1
        parts["codebook"] = 2 * (config.latent_dim + 2) * components * config.context if last and not cached else 0
        return parts
    group = config.latent_dim if coupling == "token-affine" else 1
    each, outputs = (components, 3 * components) if coupling == "mix1" else (group, 2 * group)
    head = Head(channels // group, group, group * config.head_hidden, config.head_features, outputs, each)
    parts["head"] = N * head.flops(D, cached=cached)
    return parts


def _paper_head(config: FlowConfig, index: int) -> int:
    """Per position."""
    coupling, components = config.couplings[index], config.components[index] or config.vocab_size
    D, c = config.trunk.width, config.patch * config.latent_dim
    if coupling == "mixd":
        return 2 * D * components * config.patch
    # token-affine with one token per position sees none of its channels; with more, it is counted as affine is
    blind = coupling == "token-affine" and config.patch == 1
    E, D_m = 0 if blind else config.head_features, 2 * config.head_hidden
    outputs = 3 * components if coupling == "mix1" else 2
    return 6 * E * (c - 1) ** 2 + D_m * c * (D + E * (c - 1)) + D_m * c * c * outputs


def _token_features(patch: int, channels: int, width: int, in_patch: str, cached: bool) -> int:
    """Per position: the features of each token of a patch."""
    if patch == 1:
        return 0
    head = Head(patch, channels, 2 * width, width, width, 0)
    own = head.flops(width, cached=cached) if in_patch == "autoregressive" else 0
    return 2 * patch * width * width + own


def _baseline(config: BaselineConfig, convention: Convention, *, cached: bool) -> Counter[str]:
    N, P, D = config.context // config.patch, config.patch, config.trunk.width
    parts = _body(config.trunk, config.layers, N, convention, cached)
    parts["head"] = 2 * D * config.vocab_size * config.context
    if convention == "paper":
        parts["input"] = 4 * D * config.context
        return parts
    parts["input"] = 2 * P * D * D * (N - 1 if cached else N) if P > 1 else 0
    parts["head"] += N * _token_features(P, IN_PATCH_CHANNELS, D, config.in_patch, cached=False)
    if cached:
        # the sampler runs the head for the whole patch at each of its tokens
        parts["head"] *= P
    return parts
