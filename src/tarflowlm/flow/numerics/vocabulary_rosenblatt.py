r"""The mixture-Rosenblatt map without autograd: one sweep over the channels, in linear space.

As z is known, every component has weights of its own, and channel i takes three sums over them:

    alpha_k^(i) = w_k prod_{j<i} N(z_j; mu_kj, s_k^2)
    T_i = sum_k alpha_k^(i) Q(+-(z_i - mu_ki) / s_k) / sum_k alpha_k^(i),   u_i = +-Q^-1(T_i)

with the sign of the smaller tail. Weights are relative to the weight of b, the component nearest to
z. It is known in advance how far the weight of b falls by the last channel, and how large a density
any component can reach in a channel. So a component that is `nearby.reach` below can never matter
again. Once few components are left, the sums are over pairs of a row and a component.

`reference` takes the rows with a tail below exp(-ROOM).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflowlm import chunks, flow
from tarflowlm.flow import full_precision, wide_dtype
from tarflowlm.flow.numerics import cpu, nearby, normal, reference
from tarflowlm.flow.numerics.nearby import Pairs
from tarflowlm.flow.numerics.normal import clamp_, exp_clamped

CUTS = {5: 8, 8: 96}
"""An inverse keeps one component in 8 from channel 5 on, one in 96 from channel 8 on: enough for 97
rows of 100 at K = 50,257, d = 16 and codes 12 standard deviations apart.
"""
Channel = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""Tail and side [N] of a channel, and the next log_alpha: `channel` or `channel_in_place`."""
LogWeights = Callable[[slice | Tensor], Tensor]
"""The log-weights [n, K] of rows, which are a slice or indices."""
PROBED = 64
"""Rows that tell an accelerator, which cannot choose chunk by chunk, where to go over to pairs."""
SPARE = 1.5
"""Pairs for which there is room, over those of the probed rows."""
PAIR = 20
"""A pair moves as many bytes as this many elements of a compiled channel."""


class _Book(NamedTuple):
    """The components, and what every chunk needs of them."""

    mean: Tensor
    log_std: Tensor
    scaled: Tensor  # 1 / (s_k sqrt 2)
    factors: Tensor  # of the product that finds b
    log_smallest_std: Tensor


class _Turn(NamedTuple):
    """After which channel a sweep goes over to pairs, and the pairs for which there is room."""

    channel: int
    pairs_per_row: float


def channel(
    log_alpha: Tensor, z: Tensor, mean: Tensor, scaled: Tensor, fall: Tensor, log_std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A `Channel` for a compiler: sums, no products."""
    alpha = torch.exp(log_alpha)
    total = alpha.sum(-1)
    # the tail beyond z, seen from the mixture's mean, is usually the smaller one
    side = torch.where(z * total < (alpha * mean).sum(-1), -1.0, 1.0).to(z.dtype)
    a = (z[:, None] - mean) * scaled
    tail = 0.5 * (alpha * torch.erfc(side[:, None] * a)).sum(-1) / total
    return tail, side, log_alpha - a * a + (fall[:, None] - log_std)


def channel_in_place(
    log_alpha: Tensor, z: Tensor, mean: Tensor, scaled: Tensor, fall: Tensor, log_std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`channel` with few tensors [N, K] and few passes over them; overwrites log_alpha."""
    ones = torch.ones_like(log_std)
    alpha = exp_clamped(log_alpha)
    total, first = (alpha @ torch.stack((ones, mean), -1)).unbind(-1)
    side = torch.where(z * total < first, -1.0, 1.0).to(z.dtype)
    sign = side[:, None]
    a = torch.addcmul(sign * z[:, None], sign, mean, value=-1.0).mul_(scaled)
    log_alpha.addcmul_(a, a, value=-1.0)
    # fall - log_std, a number of the row and one of the component, is added as one product
    rows = torch.stack((fall, torch.ones_like(total)), -1)
    log_alpha.addmm_(rows, torch.stack((ones, -log_std)))
    return 0.5 * alpha.mul_(clamp_(a).erfc_()).sum(-1) / total, side, log_alpha


@torch.no_grad()
def rosenblatt(
    z: Tensor,
    log_w: Tensor | LogWeights,
    mean: Tensor,
    log_std: Tensor,
    of_channel: Channel = channel_in_place,
) -> tuple[Tensor, Tensor]:
    """u [N, d] and log_det [N], as `reference.rosenblatt`.

    Weights are asked for in chunks of `chunks.held` elements, which a CPU divides further. The host
    waits for an accelerator twice, not in every chunk, but on `mps`.
    """
    if isinstance(log_w, Tensor):
        log_w = log_w.__getitem__
    log_p = torch.empty_like(z[:, 0])
    if z.is_meta or not len(z):  # shapes alone: there are no matrix products to count
        return torch.empty_like(z), log_p
    tail, side = torch.empty_like(z), torch.empty_like(z)
    is_right = torch.empty_like(log_p, dtype=torch.bool)
    num_components, held = len(mean), chunks.held(z.device)
    on_cpu = flow.is_eager_cpu(z)
    # measured: a sweep is fastest in chunks four times as large as the cache
    most = 4 * cpu.budget(num_components) if on_cpu else held
    with full_precision(z):
        factors = normal.component_factors(mean, log_std).float().T
        scaled = torch.exp(-log_std) * normal.SQRT_HALF
        book = _Book(mean, log_std, scaled, factors, log_std.amin())
    # mps has no nonzero_static
    chooses = on_cpu or z.device.type == "mps" or num_components < nearby.FEWEST
    turn = None if chooses else _turn(z, log_w, book, of_channel)
    for outer in chunks.row_ranges(len(z), num_components, held):
        weights = log_w(outer)
        with full_precision(z):
            for inner in chunks.row_ranges(len(weights), num_components, most):
                rows = slice(outer.start + inner.start, outer.start + inner.stop)
                of_rows = _tails(z[rows], weights[inner], book, of_channel, turn)
                tail[rows], side[rows], log_p[rows], is_right[rows] = of_rows
    u = side * normal.upper_quantile_of_log(torch.log(tail))
    # a tail's side is a guess: up to 0.95, 1 - T is still exact; NaN is never in range
    is_right &= ((tail >= math.exp(-nearby.ROOM)) & (tail <= 0.95)).all(-1) & torch.isfinite(log_p)
    rest = (~is_right).nonzero().squeeze(-1)
    wide = wide_dtype(z)
    for part in chunks.row_ranges(len(rest), 8 * num_components, held):
        by_all = rest[part]
        inputs = z[by_all].to(wide), log_w(by_all).to(wide), mean.to(wide), log_std.to(wide)
        with full_precision(z):
            found, log_det = reference.rosenblatt(*inputs)
        u[by_all] = found.to(u.dtype)
        log_p[by_all] = (log_det + normal.standard_normal_log_prob(found)).to(u.dtype)
    return u, log_p - normal.standard_normal_log_prob(u)


def _turn(z: Tensor, log_w: LogWeights, book: _Book, of_channel: Channel) -> _Turn:
    """The first channel from which pairs take less memory and time than rows and components.

    It is found on `PROBED` rows from all parts of z. There may be none.
    """
    dim, counts = z.shape[1], list[Tensor]()
    most = min(PROBED, chunks.rows_at_once(len(book.mean), chunks.held(z.device)))
    probed = slice(None, None, -(-len(z) // most))
    weights = log_w(probed)
    with full_precision(z):
        _tails(z[probed], weights, book, of_channel, counts=counts)
    for i, count in enumerate(torch.stack(counts).tolist() if counts else [], 2):
        if SPARE * count * max(dim - i, PAIR) <= weights.numel():
            return _Turn(i, SPARE * count / len(weights))
    return _Turn(dim, 0.0)


def _first_pairs(alive: Tensor, log_alpha: Tensor, room: int) -> tuple[Pairs, Tensor, Tensor]:
    """The first pairs of `alive` [n, K], their log-weights [room], and whether a row has all, [n].

    The host does not wait: pairs that are too many have no weight. They are spread over the rows,
    since a device adds to one row in turn.
    """
    found = torch.nonzero_static(alive, size=room, fill_value=-1)
    is_pair = found[:, 0] >= 0
    each = torch.arange(room, device=alive.device) % len(alive)
    rows, components = torch.where(is_pair, found[:, 0], each), found[:, 1].clamp_(min=0)
    share = torch.where(is_pair, log_alpha[rows, components], -math.inf)
    fits = ~is_pair[-1] | (each[: len(alive)] < found[-1, 0])
    return Pairs(rows, components, len(alive)), share, fits


def _tails(
    z: Tensor,
    log_w: Tensor,
    book: _Book,
    of_channel: Channel,
    turn: _Turn | None = None,
    counts: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tail masses beyond z and their sides (+1 upper, -1 lower), [N, d], and log p_mix(z), [N].

    The last result tells where there was room for all pairs, [N]. Without a `turn` the pairs are
    counted after every channel. With `counts` these numbers are only collected.
    """
    dim = z.shape[1]
    mean, log_std, scaled, factors, log_smallest_std = book
    # the nearest component, up to the rounding of a product in float32
    best = (normal.point_factors(z).float() @ factors).argmax(-1)
    # how far the log-weight of b falls in every channel, without log(2 pi) / 2
    falls = ((z - mean[best]) * scaled[best, None]).square().add_(log_std[best, None])
    fall = falls.sum(-1, keepdim=True)
    # how much further it falls after a channel than a sharpest component at its mean would
    channels_left = torch.arange(dim - 1, -1, -1, device=z.device)
    rests = fall - falls.cumsum(-1) - channels_left * log_smallest_std
    log_alpha = torch.log_softmax(log_w, -1)
    log_alpha_of_best = log_alpha.gather(-1, best[:, None])
    log_p = (log_alpha_of_best - fall).squeeze(-1) - dim * normal.HALF_LOG_2PI  # of b alone
    log_alpha -= log_alpha_of_best
    fits = torch.ones_like(log_p, dtype=torch.bool)
    tails, sides = list[Tensor](), list[Tensor]()
    for i in range(dim):
        now = log_alpha, z[:, i], mean[:, i], scaled, falls[:, i], log_std
        tail, side, log_alpha = of_channel(*now)
        tails.append(tail)
        sides.append(side)
        if len(mean) < nearby.FEWEST or not 2 <= i < dim - 1 or (turn and i != turn.channel):
            continue
        alive = log_alpha >= -(rests[:, i, None] + nearby.reach(z.dtype, len(mean)))
        if counts is not None:
            counts.append(alive.sum())
            continue
        if turn:
            room = int(turn.pairs_per_row * (len(z) + nearby.MOST))
            pairs, share, fits = _first_pairs(alive, log_alpha, room)
        # then no tensor over pairs and channels is larger than one over rows and components
        elif alive.sum() * (dim - i) <= alive.numel():
            rows, components = alive.nonzero().unbind(-1)
            pairs, share = Pairs(rows, components, len(z)), log_alpha[rows, components]
        else:
            continue
        left = slice(i + 1, dim)
        tail, side, total = _tails_of_pairs(
            z[:, left], share, pairs, mean[:, left], log_std, falls[:, left]
        )
        tails += tail.unbind(-1)
        sides += side.unbind(-1)
        break
    else:
        total = exp_clamped(log_alpha).sum(-1)
    return torch.stack(tails, -1), torch.stack(sides, -1), torch.log(total) + log_p, fits


def _tails_of_pairs(
    z: Tensor, log_alpha: Tensor, pairs: Pairs, mean: Tensor, log_std: Tensor, falls: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tails and sides of the channels that are left, [N, r], and the sum of the last weights, [N].

    log_alpha [M] has the weights of the pairs before these channels.
    """
    rows, components, _ = pairs
    own = log_std[components, None]
    a = (z[rows] - mean[components]).mul_(torch.exp(-own) * normal.SQRT_HALF)
    steps = torch.addcmul(falls[rows] - own, a, a, value=-1.0)
    alpha = exp_clamped(log_alpha[:, None] + F.pad(steps.cumsum(-1), (1, 0)))
    mass = clamp_(a.abs()).erfc_()
    sums = pairs.sum(alpha)
    alpha = alpha[:, :-1]
    upper = pairs.sum(alpha * torch.where(a > 0, mass, 2.0 - mass))
    lower = pairs.sum(alpha * torch.where(a <= 0, mass, 2.0 - mass))
    tail = 0.5 * torch.minimum(upper, lower) / sums[:, :-1]
    return tail, torch.where(upper <= lower, 1.0, -1.0).to(z.dtype), sums[:, -1]


# --- the inverse on accelerators


@torch.no_grad()
def rosenblatt_inverse(
    u: Tensor,
    log_w: Tensor,
    mean: Tensor,
    log_std: Tensor,
    scalar: Callable[..., Tensor] = reference.mixture_cdf_inverse,
) -> Tensor:
    """z [N, d], as `reference.rosenblatt_inverse`, from a few components where these are enough."""
    book = mean, log_std, scalar
    z = torch.empty_like(u)
    for rows in chunks.row_ranges(len(u), len(mean), chunks.HELD_ACCELERATOR):
        if len(mean) < 1024:
            z[rows] = reference.rosenblatt_inverse(u[rows], log_w[rows], *book)
            continue
        z[rows], is_right = by_heaviest(u[rows], log_w[rows], *book)
        rest = rows.start + (~is_right).nonzero().squeeze(-1)
        if len(rest):
            z[rest] = reference.rosenblatt_inverse(u[rest], log_w[rest], *book)
    return z


def by_heaviest(
    u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, scalar: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """z [N, d] of the K / n heaviest components from channel i on, for every i: n of `CUTS`.

    Returns also where z is right, [N]: where the bound on the others' mass, as in
    `compiled.invert`, is lost in the rounding of every tail.
    """
    log_smallest_std = log_std.amin()
    columns = mean.T[:, None]  # [d, 1, K], later [d, N, k]
    log_std = log_std[None]
    log_alpha = torch.log_softmax(log_w, -1)
    log_share = torch.full_like(u[:, 0], -math.inf)
    is_right = torch.ones_like(log_share, dtype=torch.bool)
    channels = list[Tensor]()
    for i, u_i in enumerate(u.unbind(-1)):
        if i in CUTS:
            log_alpha, top = log_alpha.topk(len(mean) // CUTS[i], sorted=False)
            columns = columns.expand(-1, len(u), -1).take_along_dim(top[None], -1)
            log_std = log_std.expand(len(u), -1).gather(-1, top)
            log_share = torch.logaddexp(log_share, log_alpha.amin(-1) + math.log(len(mean)))
        is_right &= log_share <= nearby.log_rounding(u.dtype) + normal.log_upper_tail(u_i.abs())
        channels.append(scalar(u_i, log_alpha, columns[i], log_std))
        a = (channels[-1][:, None] - columns[i]) * torch.exp(-log_std)
        log_alpha = reference.bayes_update(log_alpha, a, log_std)
        log_p = torch.logsumexp(log_alpha, -1, keepdim=True)
        log_alpha = log_alpha - log_p
        log_share = log_share - log_smallest_std - log_p.squeeze(-1)
    return torch.stack(channels, -1), is_right
