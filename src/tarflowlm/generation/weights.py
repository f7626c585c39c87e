"""What a sampler may do to the weights of a mixture or the logits of the baseline."""

import math

import torch
from torch import Tensor

from tarflowlm.errors import UserError
from tarflowlm.flow.couplings import AdjustWeights


def adjust_weights(
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> AdjustWeights | None:
    """The map log_w [..., K] -> log_w of a sampler, or None where it would change nothing.

    Weights to the power 1 / temperature; then only the `top_k` largest; then the smallest set of the largest
    whose probability reaches `top_p`. What is left out gets the lowest finite log-weight, which is probability zero.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise UserError(f"temperature {temperature}: must be above 0 (1.0 is the model itself)")
    if top_k is not None and top_k < 1:
        raise UserError(f"top-k {top_k}: must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top-p {top_p}: must be above 0 and at most 1")
    if top_p == 1.0:
        top_p = None  # a rounded cumulative sum reaches 1 before the last components
    if temperature == 1.0 and top_k is None and top_p is None:
        return None

    def adjust(log_w: Tensor) -> Tensor:
        log_w = torch.log_softmax(log_w / temperature, dim=-1)
        if top_k is not None and top_k < log_w.shape[-1]:
            # by index: equal weights must not let more than top_k through
            kept = log_w.topk(top_k, dim=-1).indices
            drop = torch.ones_like(log_w, dtype=torch.bool).scatter(-1, kept, False)
            log_w = log_w.masked_fill(drop, torch.finfo(log_w.dtype).min)
        if top_p is not None:
            ordered, order = log_w.softmax(-1).sort(dim=-1, descending=True)
            # a component is kept when the mass before it has not reached top_p
            drop = torch.zeros_like(ordered, dtype=torch.bool).scatter(
                -1, order, ordered.cumsum(-1) - ordered >= top_p
            )
            log_w = log_w.masked_fill(drop, torch.finfo(log_w.dtype).min)
        return log_w

    return adjust
