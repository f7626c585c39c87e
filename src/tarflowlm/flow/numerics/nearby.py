r"""The components near a point, as pairs of a row and a component (docs/math.md, eq. 20b).

With b the component nearest to z, every k with

    log N_k(z) < log N_b(z) - R,    R = `reach`

may be left out, because it vanishes in the rounding of sum_k N_k(z). It also vanishes in the
rounding of sum_k w_k N_k(z), unless all components near z have weights below exp(-ROOM).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tarflowlm import chunks, flow
from tarflowlm.flow import full_precision
from tarflowlm.flow.numerics.normal import component_factors, point_factors

FEWEST = 64
"""With fewer components, none is left out."""
LARGEST_SHARE = 1 / 32
"""If more are near, all are taken: one pair costs as much as 30 elements of an [N, K] tensor."""
MOST = 16
"""The same on an accelerator, in pairs per row: a pair takes the memory of a row of the head."""
ROOM = 18.0
"""A share of a sum, of a token or a tail, has to be right down to exp(-ROOM)."""


def log_rounding(dtype: torch.dtype) -> float:
    """The log of a relative error that rounding hides, half an ulp of 1: -16.6 in float32."""
    return math.log(0.5 * torch.finfo(dtype).eps)


def reach(dtype: torch.dtype, num_components: int) -> float:
    """R in nats: K terms below exp(-R) add up to no more than half an ulp of exp(-ROOM)."""
    return ROOM + math.log(num_components) - log_rounding(dtype)


class Pairs(NamedTuple):
    """Pairs of a row and a component, in the order of the rows."""

    rows: Tensor  # [M]
    components: Tensor  # [M]
    num_rows: int  # N

    def sum(self, x: Tensor) -> Tensor:
        """The sums of x [M, ...] over the pairs of every row, [N, ...]."""
        return x.new_zeros(self.num_rows, *x.shape[1:]).index_add_(0, self.rows, x)

    def log_sum(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """logsumexp and maximum of x [M] over the pairs of every row, [N].

        Every row needs a pair. The maximum has no gradients.
        """
        lowest = x.new_full((self.num_rows,), -math.inf)
        largest = lowest.scatter_reduce(0, self.rows, x.detach(), "amax")
        share = torch.exp(x - largest.index_select(0, self.rows))
        return largest + self.sum(share).log(), largest


@torch.no_grad()
def near_components(z: Tensor, mean: Tensor, log_std: Tensor) -> Pairs | None:
    """All pairs with log N_k(z_n) >= max_j log N_j(z_n) - `reach`, and some that are just below.

    None where components are few, many of them are near, or values are not finite. The host waits
    for a GPU twice, not in every chunk.

    A product of the factors A, B of log N finds them, chunk by chunk, in float32 under autocast
    too. The product cancels, so the threshold is lowered by a bound on its rounding error,
    gamma_(d + 2) sum_i |A_i| |B_i|.
    """
    num_components, dim = mean.shape
    if num_components < FEWEST or not len(z) or z.is_meta:
        return None
    points = point_factors(z).float()
    components = component_factors(mean, log_std).float()
    found = list[Tensor]()
    fits = list[Tensor]()
    is_cpu = flow.is_eager_cpu(z)
    most = LARGEST_SHARE * num_components
    if not is_cpu:
        most = min(most, MOST)
    room = most * len(z)
    counts = is_cpu or z.device.type == "mps"  # which has no nonzero_static
    with full_precision(z):
        size = points.abs() @ components.abs().amax(0)
        rounding = 2 * (dim + 8) * torch.finfo(torch.float32).eps * size
        margin = rounding + reach(z.dtype, num_components)
        components = components.T.contiguous()
        # four times as large on an accelerator, where every chunk takes ten launches
        per_row = (4 if is_cpu else 1) * num_components
        for rows in chunks.row_ranges(len(z), per_row, chunks.held(z.device)):
            log_density = points[rows] @ components
            lowest = log_density.amax(-1) - margin[rows]
            is_near = log_density >= lowest[:, None]
            if counts:
                pairs = is_near.nonzero()
                room -= len(pairs)
                if room < 0 or not lowest.isfinite().all():
                    return None
            else:  # -1 after the last pair; with some room, as the last chunk may be short
                space = int(most * (len(lowest) + MOST))
                pairs = torch.nonzero_static(is_near, size=space, fill_value=-1)
                fits.append((pairs[-1, 1] < 0) & lowest.isfinite().all())
            pairs[:, 0] += rows.start
            found.append(pairs)
    every = torch.cat(found)
    if fits:
        if not torch.stack(fits).all():
            return None
        every = every[every[:, 1] >= 0]
    rows, indices = every.T.contiguous()
    return Pairs(rows, indices, len(z))
