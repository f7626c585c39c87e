r"""Floating-point operations of a model of a given configuration. A multiply-add counts as two.

All counts are per sequence of `context` tokens. There are two conventions:

- `paper`: the terms of the paper's appendix H. A Transformer of L layers and width D over N = T / P positions costs
      4 D N + L (6 D^2 N + 2 D N^2 + 2 D^2 N + 16 D^2 N),    and an LM head 2 D V T.
  A masked autoregressive head costs, per position of c = P d channels and with D_m = 2 `head_hidden`,
      6 E (c - 1)^2 + D_m c (D + E (c - 1)) + D_m c^2 (outputs per channel: 3 K; 2 for affine).
  The product of attention weights and values is left out. The appendix does not cover Mix-d blocks; they are given
  their weight head, 2 D K per token.
- `full`: every matrix product of the real modules, counted by PyTorch on meta tensors (shapes without numbers).
  Attention counts over the whole square of positions. Elementwise operations do not count.

Training costs three forward passes of what is trained, and one of the frozen blocks. What the backward pass computes
a second time (attention weights, codebook tiles, checkpointed layers) does not count.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tarflowlm.baseline import BaselineConfig, TokenLM
from tarflowlm.flow.stack import FlowBlock
from tarflowlm.flow.transformer import TransformerConfig
from tarflowlm.model import FlowConfig, TarFlowLM
from tarflowlm.objective import negative_bound
from tarflowlm.runs.checkpoint import Model, build_model

Convention = Literal["paper", "full"]
Config = FlowConfig | BaselineConfig


def forward_flops(config: Config, convention: Convention = "full") -> int:
    """One evaluation of the training loss over a sequence of `config.context` tokens."""
    if convention == "full":
        return _counted_forward(config)
    if isinstance(config, BaselineConfig):
        D, T = config.trunk.width, config.context
        body = _paper_transformer(config.trunk, config.layers, T // config.patch)
        return 4 * D * T + body + 2 * D * config.vocab_size * T
    return sum(_paper_block(config, index) for index in range(len(config.couplings)))


def training_flops(config: Config, *, frozen: int = 0, convention: Convention = "full") -> int:
    """Forward and backward pass of the training loss over one sequence; the first `frozen` blocks are not trained."""
    whole = 3 * forward_flops(config, convention)
    if not frozen:
        return whole
    assert isinstance(config, FlowConfig), "the baseline has no blocks to freeze"
    if convention == "paper":
        return whole - 2 * sum(_paper_block(config, index) for index in range(frozen))
    return whole - 2 * _counted_below(config, frozen)


def generation_flops(config: Config, convention: Convention = "full") -> int:
    """`config.context` tokens, generated position by position with a KV cache, and decoded.

    The paper has no count of its own for this: its convention takes the forward pass.
    """
    return forward_flops(config, "paper") if convention == "paper" else _counted_generation(config)


def _paper_transformer(trunk: TransformerConfig, num_layers: int, positions: int) -> int:
    D, L, N = trunk.width, num_layers, positions
    return L * (6 * D * D * N + 2 * D * N * N + 2 * D * D * N + 4 * trunk.mlp_ratio * D * D * N)


def _paper_block(config: FlowConfig, index: int) -> int:
    """One flow block: input map, Transformer and head."""
    N, D, c = config.context // config.patch, config.trunk.width, config.patch * config.latent_dim
    body = 4 * D * N + _paper_transformer(config.trunk, config.layers[index], N)
    coupling, components = config.couplings[index], config.components[index] or config.vocab_size
    if coupling == "mixd":
        return body + 2 * D * components * config.context
    # with one token per position, token-affine sees none of the position's channels; with more it counts as affine
    sees_channels = coupling != "token-affine" or config.patch > 1
    E, D_m = config.head_features if sees_channels else 0, 2 * config.head_hidden
    outputs = 3 * components if coupling == "mix1" else 2
    return body + N * (6 * E * (c - 1) ** 2 + D_m * c * (D + E * (c - 1)) + D_m * c * c * outputs)


@cache
def _counted_forward(config: Config) -> int:
    model, tokens = _on_meta(config)
    noise = _latents(model, config.context) if isinstance(model, TarFlowLM) else None
    return _count(lambda: negative_bound(model, tokens, noise=noise, equal_cotangents=True))


@cache
def _counted_below(config: FlowConfig, frozen: int) -> int:
    """What progressive training does not train of the forward pass: the codebook and the first blocks."""
    model, _ = _on_meta(config)
    assert isinstance(model, TarFlowLM)
    z = _latents(model, config.context)

    def forward() -> None:
        model.codebook.log_normaliser(z)
        h = model.prior.patch(z)[0]
        for block in model.prior.blocks[:frozen]:
            h = block(h)[0]

    return _count(forward)


@cache
def _counted_generation(config: Config) -> int:
    """The features of a position cost an amount affine in the number of keys, all else is the same for each."""
    model, tokens = _on_meta(config)
    num_positions, patch = config.context // config.patch, tokens[:, : config.patch]
    choose = _count(lambda: _choose_patch(model, patch))
    first, second, last = (_count(lambda n=n: _features_at(model, patch, n)) for n in (0, 1, num_positions - 1))  # type: ignore[misc]
    return num_positions * choose + first + (num_positions - 1) * (second + last) // 2


def _features_at(model: Model, patch: Tensor, num_cached: int) -> None:
    """The Transformers' step after `num_cached` positions, with the latents or tokens [1, P] of the last of them."""
    if isinstance(model, TokenLM):
        cache = model.transformer.allocate_cache(1, num_cached + 1, model.start)
        cache.length = num_cached
        model.features_at(cache, patch if num_cached else None, 1)
        return
    [h] = model.prior.patch(_latents(model, patch.shape[1]))[0].unbind(1)
    for block in model.prior.blocks:
        assert isinstance(block, FlowBlock)
        cache = block.transformer.allocate_cache(1, num_cached + 1, block.start)
        cache.length = num_cached
        block.features_at(cache, h if num_cached else None, 1)


def _choose_patch(model: Model, patch: Tensor) -> None:
    """From the features of a position to its tokens [1, P]: the heads, and the decoding of latents."""
    features = torch.zeros(1, model.config.trunk.width, device="meta")
    if isinstance(model, TokenLM):
        for _ in range(patch.shape[1]):
            # the sampler runs the head for the whole patch at each of its tokens
            model.patch_logits(features[:, None], patch)
        return
    z = _latents(model, patch.shape[1])
    [h] = model.prior.patch(z)[0].unbind(1)
    for block in model.prior.blocks:
        assert isinstance(block, FlowBlock)
        conditionals = block.coupling.walk(features)
        next(conditionals)
        for group in h.split(block.coupling.group, -1)[:-1]:
            conditionals.send(group)
    model.codebook.decode(z)


def _on_meta(config: Config) -> tuple[Model, Tensor]:
    """The model and a sequence of tokens [1, T], as shapes alone."""
    with torch.device("meta"):
        # the counter fails on views of parameters that ask for a gradient and have no graph
        return build_model(config).requires_grad_(False), torch.zeros(1, config.context, dtype=torch.long)


def _latents(model: TarFlowLM, num_tokens: int) -> Tensor:
    return torch.zeros(1, num_tokens, model.config.latent_dim, device="meta")


def _count(work: Callable[[], object]) -> int:
    """Operations of the matrix products in `work`, without a graph; attention by its definition, two products."""
    from torch.utils.flop_counter import FlopCounterMode

    # PyTorch's table lacks the product that adds in place
    in_place = {torch.ops.aten.addmm_: lambda _, left, right, **rest: 2 * left[0] * left[1] * right[1]}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        work()
    return counter.get_total_flops()
