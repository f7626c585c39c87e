"""What a sampler is given: a stream of random numbers for every row, changed mixture weights, and templates."""

import math
import re

import torch
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.errors import UserError
from tarflowlm.flow.couplings import AdjustWeights

BLANK = -1
"""Stands in a template for a token that is to be drawn."""


def encode_template(tokenizer: Tokenizer, text: str, blank: str = "_") -> Tensor:
    """Token ids [n] of a text in which every `blank` stands for one token to be drawn (BLANK).

    What stands between blanks is encoded piece by piece. Raises UserError for an empty template, a blank that is not
    a single character or that the tokenizer's alphabet has as a symbol of its own, and unknown characters.
    """
    if len(blank) != 1:
        raise UserError(f"blank {blank!r}: must be a single character")
    if not text:
        raise UserError("the template is empty: give text with at least one token or blank")
    if tokenizer.kind == "char" and blank in tokenizer.symbols:
        raise UserError(f"blank {blank!r} is a character of the model's alphabet: choose another with --blank")
    pieces: list[int] = []
    for piece in re.split(f"({re.escape(blank)})", text):
        pieces += [BLANK] if piece == blank else tokenizer.encode(piece).tolist() if piece else []
    return torch.tensor(pieces)


def row_generators(num: int, generator: torch.Generator) -> list[torch.Generator]:
    """One CPU generator per row; that of row b depends on `generator` and b alone, not on `num`.

    CPU generators, so that a seed gives the same noise whatever device the model is on.
    """
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    return [torch.Generator().manual_seed(seed + row) for row in range(num)]


def row_normal(generators: list[torch.Generator], *shape: int) -> Tensor:
    """Standard normal noise [B, *shape], float32."""
    return torch.stack([torch.randn(*shape, generator=g) for g in generators])


def row_uniform(generators: list[torch.Generator], *shape: int) -> Tensor:
    """Uniform numbers [B, *shape] in [0, 1), float64."""
    return torch.stack([torch.rand(*shape, generator=g, dtype=torch.float64) for g in generators])


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
