r"""Floating-point operations of a model of a given configuration. A multiply-add counts as two.

All counts are per sequence of `context` tokens. There are three conventions:

- `figure7`: the paper's appendix H and figure 7 as they stand. A flow is one body, the layers of
all its blocks, over
  N = T / P positions, with one input map and one head: block 1's. A Transformer of L layers and
  width D costs
      4 D N + L (6 D^2 N + 2 D N^2 + 2 D^2 N + 16 D^2 N),    and an LM head 2 D V T.
  A masked autoregressive head costs, per position of c = P d channels and with D_m = 2
  `head_hidden`,
      6 E (c - 1)^2 + D_m c (D + E (c - 1)) + D_m c^2 (outputs per channel: 3 K; 2 for affine).
  The product of attention weights and values is left out. The appendix lacks Mix-d blocks: here 2 D
  K per token.
- `paper`: the same terms, with an input map and a head for every block, which the blocks of a flow
do have.
- `full`: every matrix product of the real modules, counted by PyTorch on meta tensors (shapes
without numbers).
  Attention counts over the whole square of positions. Elementwise operations do not count.

Training costs three forward passes of what is trained, and one of the frozen blocks. Work that the
backward pass repeats (attention weights, codebook tiles, checkpointed layers) does not count.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tarflowlm.language_model import LanguageModel
from tarflowlm.model import as_flow
from tarflowlm.model_config import COUPLINGS, BaselineConfig, FlowConfig, as_flow_config

Convention = Literal["figure7", "paper", "full"]
Config = FlowConfig | BaselineConfig

PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
}
PEAK_TFLOPS |= {"L4": 121.0, "RTX 4090": 165.0, "V100": 125.0}
"""Dense matrix products in half precision with float32 sums, as the maker states them; by a part of
the name.
"""


def peak_flops(device_name: str) -> float | None:
    """What the maker of a GPU of this name states (`PEAK_TFLOPS`), per second; None for other
    devices.
    """
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


def forward_flops(config: Config, convention: Convention = "full") -> int:
    """One evaluation of the training loss over a sequence of `config.context` tokens."""
    if convention == "full":
        return _counted_forward(config)
    if isinstance(config, BaselineConfig):
        D, T = config.trunk.width, config.context
        return 4 * D * T + _paper_transformer(config, config.layers) + 2 * D * config.vocab_size * T
    return sum(_paper_block(config, index, convention) for index in range(config.num_blocks))


def training_flops(config: Config, *, frozen: int = 0, convention: Convention = "full") -> int:
    """Forward and backward pass of the training loss over one sequence; the first `frozen` blocks
    are not trained.
    """
    whole = 3 * forward_flops(config, convention)
    if convention == "full" and frozen:
        return whole - 2 * _counted_below(config, frozen)
    return whole - 2 * sum(
        _paper_block(as_flow_config(config), index, convention) for index in range(frozen)
    )


def _paper_transformer(config: Config, L: int) -> int:
    N, D = config.context // config.patch, config.trunk.width
    return L * (
        6 * D * D * N + 2 * D * N * N + 2 * D * D * N + 4 * config.trunk.mlp_ratio * D * D * N
    )


def _paper_block(config: FlowConfig, index: int, convention: Convention) -> int:
    """Count one flow block: Transformer, and input map and head where the convention has them."""
    body = _paper_transformer(config, config.blocks[index].layers)
    if index and convention == "figure7":
        return body
    return (
        4 * config.trunk.width * (config.context // config.patch)
        + body
        + _paper_head(config, index)
    )


def _paper_head(config: FlowConfig, index: int) -> int:
    N, D, c = config.context // config.patch, config.trunk.width, config.patch * config.latent_dim
    block = config.blocks[index]
    coupling, components = block.coupling, block.components or config.vocab_size
    if coupling == "mixd":
        return 2 * D * components * config.context
    # with one token per position, token-affine sees none of the position's channels; with more it
    # counts as affine
    sees_channels = coupling != "token-affine" or config.patch > 1
    E, D_m = config.head_features if sees_channels else 0, 2 * config.head_hidden
    outputs = COUPLINGS[coupling].outputs(components)
    return N * (6 * E * (c - 1) ** 2 + D_m * c * (D + E * (c - 1)) + D_m * c * c * outputs)


@cache
def _counted_forward(config: Config) -> int:
    model, tokens = _on_meta(config)
    return _count(lambda: model.bound(tokens, model.draw_noise(tokens)))


@cache
def _counted_below(config: Config, frozen: int) -> int:
    """Count the part of the forward pass that progressive training does not train: codebook and
    first blocks.
    """
    flow = as_flow(_on_meta(config)[0])

    def forward() -> None:
        z = _latents(flow, config.context)
        flow.codebook.log_normaliser(z)
        h = flow.prior.patch(z)[0]
        for block in flow.prior.blocks[:frozen]:
            h = block(h)[0]

    return _count(forward)


def _on_meta(config: Config) -> tuple[LanguageModel, Tensor]:
    """The model and a sequence of tokens [1, T], as shapes alone."""
    with torch.device("meta"):
        # the counter fails on views of parameters that ask for a gradient and have no graph
        return config.build().requires_grad_(False), torch.zeros(
            1, config.context, dtype=torch.long
        )


def _latents(model: Any, num_tokens: int) -> Tensor:
    return torch.zeros(1, num_tokens, model.config.latent_dim, device="meta")


def _count(work: Callable[[], object]) -> int:
    """Operations of the matrix products in `work`, without a graph; attention by its definition,
    two products.
    """
    from torch.utils.flop_counter import FlopCounterMode

    # PyTorch's table lacks the product that adds in place
    in_place = {
        torch.ops.aten.addmm_: lambda _, left, right, **rest: 2 * left[0] * left[1] * right[1]
    }
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        work()
    return counter.get_total_flops()
