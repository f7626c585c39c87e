"""Draws of a component of a mixture, or of a token."""

import torch
from torch import Tensor


def inverse_cdf(log_w: Tensor, uniform: Tensor) -> Tensor:
    """Indices [...] where the CDF of the log-weights [..., K] reaches `uniform` [...]."""
    cumulative = log_w.softmax(-1, dtype=uniform.dtype).cumsum(-1)
    # above zero, where the first index may have no probability; NaN is found behind the last
    wanted = (uniform[..., None] * cumulative[..., -1:]).clamp(min=torch.finfo(uniform.dtype).tiny)
    return torch.searchsorted(cumulative, wanted).squeeze(-1).clamp(max=log_w.shape[-1] - 1)
