"""Exact sampling position by position with the KV cache."""

from collections.abc import Callable

import torch
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.flow.couplings import AdjustWeights

Tick = Callable[[], None]


def sample_baseline(
    model: TokenLM,
    uniform: Tensor,
    *,
    prompt: Tensor | None = None,
    adjust: AdjustWeights | None = None,
    tick: Tick | None = None,
) -> Tensor:
    """Tokens [B, T] of the discrete baseline, with the KV cache; `prompt` [n] comes first.

    Token t of row b is the inverse of its cumulative distribution at `uniform` [B, T].
    """
    P, (num, num_tokens) = model.config.patch, uniform.shape
    given = 0 if prompt is None else len(prompt)
    # some devices have no float64
    wide = torch.float32 if model.start.device.type == "mps" else torch.float64
    uniform = uniform.to(model.start.device, wide)
    cache = model.transformer.allocate_cache(num, num_tokens // P, model.start)
    tokens = torch.zeros(num, num_tokens, dtype=torch.long, device=model.start.device)
    if prompt is not None:
        tokens[:, :given] = prompt.to(tokens.device)
    previous: Tensor | None = None
    for start in range(0, num_tokens, P):
        features = model.features_at(cache, previous, num)[:, None]
        patch = tokens[:, start : start + P].clone()
        for j in range(P):
            if start + j >= given:
                # in-patch weights of token j see tokens < j alone, so the zeros after it have no effect
                logits = model.patch_logits(features, patch)[:, 0, j]
                logits = logits if adjust is None else adjust(logits)
                cumulative = logits.to(wide).softmax(-1).cumsum(-1)
                patch[:, j] = (cumulative < uniform[:, start + j, None] * cumulative[:, -1:]).sum(-1)
        tokens[:, start : start + P] = patch
        previous = patch
        if tick is not None:
            tick()
    return tokens
