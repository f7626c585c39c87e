"""The Rosenblatt inverse with only the most probable components of each vector: sampling with a large vocabulary."""

import torch
from torch import Tensor

from tarflowlm.flow.numerics.layout import row_chunks
from tarflowlm.flow.numerics.rosenblatt_map import flatten_vectors, solve_rows


@torch.no_grad()
def rosenblatt_inverse_truncated(
    u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, *, keep: int
) -> tuple[Tensor, Tensor]:
    r"""`rosenblatt_inverse` under the `keep` heaviest components of every vector, and a bound on what that changes.

    Returns z [..., d] and dropped [...], the total weight left out. z solves the truncated mixture exactly; for
    u ~ N(0, I) its law is within `dropped` of the full mixture's in total variation, and that is sharp when the
    components do not overlap. No gradients. Memory: keep x d per vector of a chunk.
    Shapes: u [..., d]; log_w [..., K], unnormalised; mean [K, d]; log_std [K].
    Errors: ValueError for shapes that do not fit or keep < 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    shape, flat, weights = flatten_vectors(u, log_w, mean, log_std)
    keep, d = min(keep, mean.shape[0]), mean.shape[1]
    z, dropped = torch.empty_like(flat), torch.empty_like(flat[:, 0])
    for rows in row_chunks(flat.shape[0], max(keep * d, mean.shape[0])):
        log_p = torch.log_softmax(weights[rows], -1)
        kept, index = log_p.topk(keep, -1)
        # The sum of what is left out, not 1 - the sum of what is kept: that would lose it to rounding.
        dropped[rows] = log_p.scatter(-1, index, -torch.inf).exp().sum(-1)
        z[rows] = solve_rows(flat[rows], kept, mean[index], log_std[index])
    return z.view(*shape, -1), dropped.view(shape)
