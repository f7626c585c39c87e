r"""log p_mix tile by tile: no [N, K] tensor ever exists, forward or backward.

    log p_n = logsumexp_k (x_nk + log N_nk) - logsumexp_k x_nk

with logits x of the mixture weights from a `Logits` source, and log N_nk = log N(z_n; mu_k, s_k^2 I) from the
codebook's factors A . B (see `normal`). The forward keeps two running logsumexps per row; the backward computes each
tile again and adds its gradients up at once:

    d log p_n / d x_nk = r_nk - pi_nk,    d log p_n / d (A . B)_nk = r_nk     (posterior r, prior pi)

Where the density is wanted `relative` to the codebook's normaliser, the same tiles serve a third logsumexp:

    log p_n - logsumexp_k log N_nk,    d / d (A . B)_nk = r_nk - q_nk     (q the softmax of log N: the decoder)

N rows (tokens), K components, d channels, E features; n rows and k components of one tile.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tarflowlm.flow.numerics.layout import LOWEST_EXPONENT

_TILE = {"cpu": (256, 1024)}
_TILE_ACCELERATOR = (1024, 16_384)
"""Rows and components of a tile. On a CPU one tile of float32 and one of float64 stay in the second-level cache; an
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


def row_slices(num_rows: int, num_components: int, device: torch.device) -> Iterator[slice]:
    """Row ranges of the tiles. Few components leave room for more rows."""
    rows, columns = _TILE.get(device.type, _TILE_ACCELERATOR)
    step = max(rows, rows * columns // max(1, num_components))
    for i in range(0, num_rows, step):
        yield slice(i, min(i + step, num_rows))


def column_slices(num_components: int, device: torch.device) -> Iterator[slice]:
    """Component ranges of the tiles."""
    step = _TILE.get(device.type, _TILE_ACCELERATOR)[1]
    for k in range(0, num_components, step):
        yield slice(k, min(k + step, num_components))


class _Tile(NamedTuple):
    rows: slice
    columns: slice
    log_density: Tensor
    """log N [n, k]."""
    x: Tensor | None
    """Logits [n, k], where there are any."""


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


def log_sums(
    logits: Logits,
    factors: Factors,
    dtype: torch.dtype,
    relative: bool,
    gradients: Gradients | None = None,
) -> Tensor:
    """logsumexp over K of x + log N, of x, and of log N: [3, N], in `dtype`.

    The second is zero without logits, the third unless `relative`: log p is the first less the other two.
    Where `gradients` are given, those of sum_n log p_n are added to them in the same sweep. That takes one product
    with the head's weight less than `accumulate_gradients` afterwards, and holds two [n, K] tensors.
    """
    points, num_components = factors.points, factors.components.shape[0]
    sums = torch.zeros(3, points.shape[0], dtype=dtype, device=points.device)
    buffers = Buffers(points.device)
    for rows in row_slices(points.shape[0], num_components, points.device):
        joint, prior, decoder = (_RunningLogSumExp(rows.stop - rows.start, points, dtype) for _ in range(3))
        kept = []
        for j, columns in enumerate(column_slices(num_components, points.device)):
            index = 0 if gradients is None else j
            tile = _load(logits, factors, rows, columns, dtype, buffers, index)
            scratch = buffers("scratch", (tile.log_density.shape[0], tile.log_density.shape[1]), dtype)
            if relative:
                decoder.add_(tile.log_density, scratch)
            if tile.x is None:
                joint.add_(tile.log_density, scratch)
            else:
                prior.add_(tile.x, scratch)
                joint.add_(torch.add(tile.log_density, tile.x, out=scratch), scratch)
            kept.append(tile)
        sums[0, rows] = joint.value()
        if not logits.empty:
            sums[1, rows] = prior.value()
        if relative:
            sums[2, rows] = decoder.value()
        if gradients is not None:
            scale = torch.ones_like(sums[0, rows])
            for tile in kept:
                _tile_backward(tile, sums[:, rows], scale, logits, factors, relative, gradients, buffers)
    return sums


def accumulate_gradients(
    logits: Logits,
    factors: Factors,
    sums: Tensor,
    grad: Tensor,
    gradients: Gradients,
    relative: bool,
) -> None:
    """Adds the gradients of sum_n grad_n log p_n to `gradients`; `sums` [3, N] are those of `log_sums`."""
    points, num_components = factors.points, factors.components.shape[0]
    buffers = Buffers(points.device)
    for rows in row_slices(points.shape[0], num_components, points.device):
        for columns in column_slices(num_components, points.device):
            tile = _load(logits, factors, rows, columns, grad.dtype, buffers, 0)
            _tile_backward(tile, sums[:, rows], grad[rows], logits, factors, relative, gradients, buffers)


def _load(
    logits: Logits, factors: Factors, rows: slice, columns: slice, dtype: torch.dtype, buffers: Buffers, index: int
) -> _Tile:
    """One tile in buffers of this `index`."""
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    log_density = buffers("log_density", shape, dtype, index)
    factors.tile(rows, columns, log_density, buffers)
    if logits.empty:
        return _Tile(rows, columns, log_density, None)
    x = buffers("logits", shape, dtype, index)
    logits.tile(rows, columns, x, buffers)
    return _Tile(rows, columns, log_density, x)


def _tile_backward(
    tile: _Tile,
    sums: Tensor,
    scale: Tensor,
    logits: Logits,
    factors: Factors,
    relative: bool,
    gradients: Gradients,
    buffers: Buffers,
) -> None:
    """Adds the gradients of one tile, `scale` [n] times those of log p_n. Overwrites the tile."""
    rows, columns, log_density, x = tile
    scale, shape = scale[:, None], (log_density.shape[0], log_density.shape[1])

    def share(v: Tensor, log_sum: Tensor) -> Tensor:
        """The softmax of v, in its place, times the cotangent."""
        return v.sub_(log_sum[:, None]).clamp_(min=LOWEST_EXPONENT[v.dtype]).exp_().mul_(scale)

    v = buffers("scratch", shape, log_density.dtype).copy_(log_density) if relative else log_density
    joint = share(v if x is None else v.add_(x), sums[0])
    if gradients.points is not None or gradients.components is not None:
        of_product = torch.sub(joint, share(log_density, sums[2]), out=log_density) if relative else joint
        wide = buffers("wide", shape, factors.points.dtype).copy_(of_product)
        if gradients.points is not None:
            gradients.points[rows].addmm_(wide, factors.components[columns])
        if gradients.components is not None:
            gradients.components[columns].addmm_(wide.T, factors.points[rows])
    if x is not None:
        _logits_backward(joint.sub_(share(x, sums[1])), logits, rows, columns, gradients)


def _logits_backward(x_grad: Tensor, logits: Logits, rows: slice, columns: slice, gradients: Gradients) -> None:
    if gradients.log_w is not None:
        gradients.log_w[rows, columns] = x_grad
    if gradients.bias is not None:
        gradients.bias[columns] += x_grad.sum(0)
    if logits.features is None or logits.weight is None:
        return
    same = x_grad.dtype == logits.features.dtype
    x_grad = x_grad.to(logits.features.dtype)
    pairs = (
        (gradients.features, rows, x_grad, logits.weight[columns]),
        (gradients.weight, columns, x_grad.T, logits.features[rows]),
    )
    for total, part, left, right in pairs:
        if total is not None and same:
            total[part].addmm_(left, right)
        elif total is not None:
            total[part] += left @ right
