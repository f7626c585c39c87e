r"""log p_mix, tile by tile: no [tokens, K] tensor ever exists, forward or backward.

    log p_n = logsumexp_k (x_nk + log N_nk) - logsumexp_k x_nk

with logits x from a `Logits` source and log N from the codebook's factors A . B (see `codebook`). The forward keeps
two running logsumexps per token, the backward recomputes each tile and spends it at once:

    d log p_n / d x_nk = r_nk - pi_nk,    d log p_n / d (A . B)_nk = r_nk     (posterior r, prior pi)

Where the density is wanted `relative` to the codebook's normaliser, the same tiles serve a third logsumexp:

    log p_n - logsumexp_k log N_nk,    d / d (A . B)_nk = r_nk - q_nk     (q the softmax of log N: the decoder)
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tarflowlm.flow.numerics.layout import LOWEST_EXPONENT

_TILE = {"cpu": (256, 1024)}
_TILE_ACCELERATOR = (1024, 16_384)
"""Tokens and components of a tile. On a CPU one tile of float32 and one of float64 stay in the second-level cache; an
accelerator wants matrix products large enough to fill it."""


class Buffers:
    """Storage reused by all tiles of one call: a fresh megabyte costs a CPU as much as what is done to it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, int], dtype: torch.dtype, index: int = 0) -> Tensor:
        """A contiguous [n, k] tensor, contents undefined, the same storage for the same name and index."""
        key, size = (name, index, dtype), shape[0] * shape[1]
        flat = self._flat.get(key)
        if flat is None or flat.numel() < size:
            flat = self._flat[key] = torch.empty(size, dtype=dtype, device=self._device)
        return flat[:size].view(shape)


class Logits(NamedTuple):
    """Where the weights' logits come from: a tensor, a linear head, or nothing (all weights one)."""

    log_w: Tensor | None = None
    """[N, K]."""
    features: Tensor | None = None
    """[N, E], in the format of the matrix product."""
    weight: Tensor | None = None
    """[K, E], same format."""
    bias: Tensor | None = None
    """[K] or None."""

    @property
    def empty(self) -> bool:
        """True where all logits are zero and the prior is not normalised."""
        return self.log_w is None and self.features is None

    def tile(self, rows: slice, columns: slice, out: Tensor, buffers: Buffers) -> None:
        """x [n, k] into `out`."""
        if self.log_w is not None:
            out.copy_(self.log_w[rows, columns])
        elif self.features is not None and self.weight is not None:
            features, weight = self.features[rows], self.weight[columns]
            if features.dtype != out.dtype:
                product = buffers("product", (out.shape[0], out.shape[1]), features.dtype)
                out.copy_(torch.mm(features, weight.T, out=product))
                if self.bias is not None:
                    out.add_(self.bias[columns])
            elif self.bias is None:
                torch.mm(features, weight.T, out=out)
            else:
                torch.addmm(self.bias[columns], features, weight.T, out=out)


class Factors(NamedTuple):
    """log N = points @ components.T, both in the wide format."""

    points: Tensor
    """[N, d + 2]."""
    components: Tensor
    """[K, d + 2]."""

    def tile(self, rows: slice, columns: slice, out: Tensor, buffers: Buffers) -> None:
        """log N [n, k] into `out`."""
        wide = buffers("wide", (out.shape[0], out.shape[1]), self.points.dtype)
        out.copy_(torch.mm(self.points[rows], self.components[columns].T, out=wide))


class Gradients(NamedTuple):
    """What the backward adds up; None where nobody asked."""

    points: Tensor | None
    components: Tensor | None
    log_w: Tensor | None
    features: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def row_slices(num_rows: int, num_components: int, device: torch.device, chunk: int | None) -> Iterator[slice]:
    """Row ranges of the tiles; `chunk` overrides the tokens per tile. Few components leave room for more rows."""
    rows, columns = _TILE.get(device.type, _TILE_ACCELERATOR)
    step = chunk or max(rows, rows * columns // max(1, num_components))
    for i in range(0, num_rows, step):
        yield slice(i, min(i + step, num_rows))


def column_slices(num_components: int, device: torch.device) -> Iterator[slice]:
    """Component ranges of the tiles."""
    step = _TILE.get(device.type, _TILE_ACCELERATOR)[1]
    for k in range(0, num_components, step):
        yield slice(k, min(k + step, num_components))


class _RunningLogSumExp:
    """logsumexp over K of the tiles of some rows, one after the other; [n]."""

    def __init__(self, num_rows: int, like: Tensor, dtype: torch.dtype) -> None:
        self._top = torch.full((num_rows,), -torch.inf, dtype=dtype, device=like.device)
        self._sum = torch.zeros(num_rows, dtype=dtype, device=like.device)

    def add_(self, x: Tensor, out: Tensor) -> None:
        """Takes one tile in; `out` is scratch of its shape and may be `x` itself."""
        top = torch.maximum(self._top, x.amax(1))
        # -inf - -inf is NaN: rows without any weight so far are shifted by zero instead.
        shift = torch.where(torch.isneginf(top), 0.0, top)
        part = torch.sub(x, shift[:, None], out=out).clamp_(min=LOWEST_EXPONENT[x.dtype]).exp_().sum(1)
        self._sum = self._sum * torch.exp(self._top - shift) + part
        self._top = top

    def value(self) -> Tensor:
        # The floor of the exponent makes the sum of a row of -inf positive; its logarithm is -inf all the same.
        return torch.where(torch.isneginf(self._top), self._top, self._top + torch.log(self._sum))


def log_sums(logits: Logits, factors: Factors, dtype: torch.dtype, chunk: int | None, relative: bool) -> Tensor:
    """logsumexp over K of x + log N, of x, and of log N: [3, N].

    The second is zero without logits, the third unless `relative`: log p is the first less the other two.
    """
    return _sweep(logits, factors, dtype, chunk, relative, None)


def log_sums_and_gradients(
    logits: Logits, factors: Factors, dtype: torch.dtype, out: Gradients, chunk: int | None, relative: bool
) -> Tensor:
    """`log_sums`, and in the same sweep the gradients of sum_n log p_n, added to `out`.

    One product with the head's weight less than `log_sums` and `pull_back`; holds two [chunk, K] tensors at a time.
    """
    return _sweep(logits, factors, dtype, chunk, relative, out)


def _tile_pair(
    logits: Logits, factors: Factors, rows: slice, columns: slice, dtype: torch.dtype, buffers: Buffers, index: int
) -> tuple[Tensor, Tensor | None]:
    """log N, and x where there are logits."""
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    log_n = buffers("log_n", shape, dtype, index)
    factors.tile(rows, columns, log_n, buffers)
    if logits.empty:
        return log_n, None
    x = buffers("logits", shape, dtype, index)
    logits.tile(rows, columns, x, buffers)
    return log_n, x


def _sweep(
    logits: Logits, factors: Factors, dtype: torch.dtype, chunk: int | None, relative: bool, out: Gradients | None
) -> Tensor:
    points, num_components = factors.points, factors.components.shape[0]
    sums = torch.zeros(3, points.shape[0], dtype=dtype, device=points.device)
    buffers = Buffers(points.device)
    for rows in row_slices(points.shape[0], num_components, points.device, chunk):
        joint, prior, code = (_RunningLogSumExp(rows.stop - rows.start, points, dtype) for _ in range(3))
        kept = []
        for j, columns in enumerate(column_slices(num_components, points.device)):
            log_n, x = _tile_pair(logits, factors, rows, columns, dtype, buffers, 0 if out is None else j)
            scratch = buffers("scratch", (log_n.shape[0], log_n.shape[1]), dtype)
            if relative:
                code.add_(log_n, scratch)
            if x is None:
                joint.add_(log_n, scratch)
            else:
                prior.add_(x, scratch)
                joint.add_(torch.add(log_n, x, out=scratch), scratch)
            kept.append((columns, log_n, x))
        sums[0, rows] = joint.value()
        if not logits.empty:
            sums[1, rows] = prior.value()
        if relative:
            sums[2, rows] = code.value()
        if out is not None:
            scale = torch.ones_like(sums[0, rows])
            for columns, log_n, x in kept:
                _spend(log_n, x, sums[:, rows], scale, logits, factors, rows, columns, relative, out, buffers)
    return sums


def pull_back(
    logits: Logits, factors: Factors, sums: Tensor, grad: Tensor, out: Gradients, chunk: int | None, relative: bool
) -> None:
    """Adds the gradients of sum_n grad_n log p_n to `out`, tile by tile; `sums` [3, N] are those of `log_sums`."""
    points, num_components = factors.points, factors.components.shape[0]
    buffers = Buffers(points.device)
    for rows in row_slices(points.shape[0], num_components, points.device, chunk):
        for columns in column_slices(num_components, points.device):
            log_n, x = _tile_pair(logits, factors, rows, columns, grad.dtype, buffers, 0)
            _spend(log_n, x, sums[:, rows], grad[rows], logits, factors, rows, columns, relative, out, buffers)


def _spend(
    log_n: Tensor,
    x: Tensor | None,
    sums: Tensor,
    scale: Tensor,
    logits: Logits,
    factors: Factors,
    rows: slice,
    columns: slice,
    relative: bool,
    out: Gradients,
    buffers: Buffers,
) -> None:
    """Turns a tile of log N and of x (both overwritten) into gradients."""
    scale, shape = scale[:, None], (log_n.shape[0], log_n.shape[1])

    def share(v: Tensor, log_sum: Tensor) -> Tensor:
        """The softmax of v, in its place, times the cotangent."""
        return v.sub_(log_sum[:, None]).clamp_(min=LOWEST_EXPONENT[v.dtype]).exp_().mul_(scale)

    v = buffers("scratch", shape, log_n.dtype).copy_(log_n) if relative else log_n
    joint = share(v if x is None else v.add_(x), sums[0])
    if out.points is not None or out.components is not None:
        of_product = torch.sub(joint, share(log_n, sums[2]), out=log_n) if relative else joint
        wide = buffers("wide", shape, factors.points.dtype).copy_(of_product)
        if out.points is not None:
            out.points[rows].addmm_(wide, factors.components[columns])
        if out.components is not None:
            out.components[columns].addmm_(wide.T, factors.points[rows])
    if x is not None:
        _pull_logits(joint.sub_(share(x, sums[1])), logits, rows, columns, out)


def _pull_logits(x_grad: Tensor, logits: Logits, rows: slice, columns: slice, out: Gradients) -> None:
    if out.log_w is not None:
        out.log_w[rows, columns] = x_grad
    if out.bias is not None:
        out.bias[columns] += x_grad.sum(0)
    if logits.features is None or logits.weight is None:
        return
    same = x_grad.dtype == logits.features.dtype
    x_grad = x_grad.to(logits.features.dtype)
    pairs = (
        (out.features, rows, x_grad, logits.weight[columns]),
        (out.weight, columns, x_grad.T, logits.features[rows]),
    )
    for total, part, left, right in pairs:
        if total is not None and same:
            total[part].addmm_(left, right)
        elif total is not None:
            total[part] += left @ right
