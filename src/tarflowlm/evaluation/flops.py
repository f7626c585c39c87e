"""Floating-point operations of a model of a given configuration, for each sequence of its context.

PyTorch counts the matrix products of the real modules on meta tensors (shapes without numbers), a
multiply-add as two. Attention counts over the whole square of positions.

Training costs three forward passes of the trained blocks, and one of the frozen blocks. Work that
the backward pass repeats (attention weights, codebook tiles, checkpointed layers) does not count.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tarflowlm.model import as_flow
from tarflowlm.model_config import BaselineConfig, FlowConfig

Config = FlowConfig | BaselineConfig

PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "V100": 125.0,
}
"""Dense matrix products in half precision with float32 sums, as the maker states them, by parts of
a GPU's name: the first that fits counts.
"""


def peak_flops(device_name: str) -> float | None:
    """Operations per second of a GPU of this name; None for other devices."""
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


@cache
def training_flops(config: Config, *, frozen: int = 0) -> int:
    """Forward and backward pass of the training loss over a sequence of `config.context` tokens.

    The codebook and the first `frozen` blocks are not trained, unless `frozen` is 0.
    """
    with torch.device("meta"):
        # the counter fails on views of parameters that ask for a gradient and have no graph
        model = config.build().requires_grad_(False)
        tokens = torch.zeros(1, config.context, dtype=torch.long)
    whole = 3 * _count(lambda: model.bound(tokens, model.draw_noise(tokens)))
    if not frozen:
        return whole
    flow = as_flow(model)
    z = torch.zeros(1, config.context, flow.config.latent_dim, device="meta")

    def forward() -> None:
        flow.codebook.log_normaliser(z)
        h = flow.prior.patch(z)
        for block in flow.prior.blocks[:frozen]:
            h = block(h)[0]

    return whole - 2 * _count(forward)


def _count(work: Callable[[], object]) -> int:
    """Operations of the matrix products in `work`; attention counts as two products."""
    from torch.utils.flop_counter import FlopCounterMode

    # the product that adds in place, which PyTorch's table lacks
    missing = {torch.ops.aten.addmm_: lambda _, a, b, **options: 2 * a[0] * a[1] * b[1]}
    counter = FlopCounterMode(display=False, custom_mapping=missing)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        work()
    return counter.get_total_flops()
