"""TarFlowLM: a Gaussian codebook and a prior of stacked autoregressive flows."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn

from tarflowlm.errors import UserError
from tarflowlm.flow.codebook import Codebook
from tarflowlm.flow.couplings import AffineCoupling, Coupling, Mix1Coupling
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.stack import FlowBlock, Prior
from tarflowlm.flow.transformer import TransformerConfig

CouplingName = Literal["affine", "token-affine", "mix1", "mixd"]
"""affine and token-affine: one Gaussian, channel after channel or for all channels of a token at once."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Shape of a TarFlowLM. The three tuples have one entry per block, block 1 (next to the tokens) first."""

    family: Literal["flow"] = "flow"
    """Kind of model; do not change it."""
    vocab_size: int = 0
    """Token types V; 0 takes it from the tokenizer."""
    context: int = 256
    """Tokens per sequence, in training and at most in generation."""
    latent_dim: int = 8
    """Latent channels d per token."""
    separation: float = 12.0
    """Typical distance of neighbouring codes over sigma at the start of training."""
    patch: int = 1
    """Tokens P per position; P divides the context."""
    trunk: TransformerConfig = field(default_factory=TransformerConfig)
    """The Transformer that all blocks share in shape, not in weights."""
    couplings: tuple[CouplingName, ...] = ("mixd", "mix1", "mix1")
    """Coupling of each block."""
    layers: tuple[int, ...] = (6, 1, 1)
    """Transformer layers of each block."""
    components: tuple[int, ...] = (0, 2, 2)
    """Mixture components K of each block; 0 in a mixd block ties them to the encoder's codebook."""
    head_hidden: int = 64
    """Hidden units per channel of the masked autoregressive head (D_m / 2 in the paper)."""
    channel_mix: bool = True
    """Reorder channels to [even, odd] between blocks."""
    in_patch: Literal["autoregressive", "independent"] = "autoregressive"
    """Mixture weights inside a patch of a mixd block: token j sees the latents of tokens < j, or none."""

    def __post_init__(self) -> None:
        if not len(self.couplings) == len(self.layers) == len(self.components) >= 1:
            raise UserError(
                f"couplings {self.couplings}, layers {self.layers} and components {self.components} need one entry "
                f"per block each, and at least one block"
            )
        for name, value, least in (
            ("context", self.context, 2), ("latent_dim", self.latent_dim, 1), ("patch", self.patch, 1),
            ("head_hidden", self.head_hidden, 1), ("layers", min(self.layers), 1), ("vocab_size", self.vocab_size, 0),
        ):  # fmt: skip
            if value < least:
                raise UserError(f"model.{name} {value}: must be at least {least}")
        if not 0 < self.separation < math.inf:
            raise UserError(f"model.separation {self.separation}: must be above 0 and finite")
        if self.context % self.patch:
            raise UserError(
                f"patch {self.patch} does not divide context {self.context}: choose a patch that does, "
                f"or a context that is a multiple of {self.patch}"
            )
        for index, (coupling, components) in enumerate(zip(self.couplings, self.components, strict=True)):
            self._check_components(index, coupling, components)

    def _check_components(self, index: int, coupling: CouplingName, components: int) -> None:
        where = f"components of block {index + 1} ({coupling})"
        if "affine" in coupling and components not in (0, 1):
            raise UserError(f"{where}: {components} has no effect, an affine coupling has one Gaussian; use 1")
        if coupling == "mix1" and components < 1:
            raise UserError(f"{where}: {components} must be at least 1")
        if coupling == "mixd" and (components < 0 or (components == 0 and index > 0)):
            raise UserError(f"{where}: {components}; 0 (tied to the codebook) is for block 1, others need K >= 1")

    @property
    def head_features(self) -> int:
        """E of the masked autoregressive head (the paper's appendix H with D_m = 2 head_hidden)."""
        channels = self.patch * self.latent_dim
        return min(max(1, int(9 * 2 * self.head_hidden / (16 * max(channels - 1, 1)))), 96)

    def first_blocks(self, num_blocks: int) -> "FlowConfig":
        """The same model cut to its first blocks: what a progressive stage trains."""
        n = num_blocks
        return replace(self, couplings=self.couplings[:n], layers=self.layers[:n], components=self.components[:n])


class TarFlowLM(nn.Module):
    """A language model in continuous space: q(z|x) and p(x|z) by `codebook`, p(z) by `prior` (docs/math.md).

    Construction draws its initial weights from PyTorch's global generator; wrap it in `seeded` to repeat it.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise UserError(f"model.vocab_size {config.vocab_size}: set it to the tokenizer's number of symbols")
        self.config = config
        self.codebook = Codebook(config.vocab_size, config.latent_dim, separation=config.separation)
        self.prior = Prior(config.patch, ())
        for _ in config.couplings:
            self.append_block()

    @property
    def num_blocks(self) -> int:
        return len(self.prior.blocks)

    def append_block(self) -> FlowBlock:
        """Build the next block of the configuration and put it on top of the stack."""
        config, index = self.config, self.num_blocks
        channels = config.patch * config.latent_dim
        block = FlowBlock(
            trunk=config.trunk,
            num_layers=config.layers[index],
            channels=channels,
            coupling=self._coupling(index, channels),
            reverse=index % 2 == 1,
            mix=index if config.channel_mix else 0,
        )
        self.prior.blocks.append(block.to(self.codebook.mean.device))
        return block

    def _coupling(self, index: int, channels: int) -> Coupling:
        config, width = self.config, self.config.trunk.width
        name, components, features = config.couplings[index], config.components[index], config.head_features
        if name == "affine" or name == "token-affine":
            return AffineCoupling(
                width=width,
                channels=channels,
                hidden=config.head_hidden,
                features=features,
                group=1 if name == "affine" else config.latent_dim,
            )
        if name == "mix1":
            coupling = Mix1Coupling(
                width=width,
                channels=channels,
                components=components,
                hidden=config.head_hidden,
                features=features,
                spread=0.95 if index == 0 else 0.3,
            )
            if index == 0 and components == config.vocab_size:
                coupling.start_from(self.codebook)
            return coupling
        return MixDCoupling(
            width=width,
            patch=config.patch,
            latent_dim=config.latent_dim,
            components=components,
            tied=self.codebook if components == 0 else None,
            in_patch=config.in_patch == "autoregressive",
        )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which PyTorch's global CPU generator starts from `seed`; it is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
