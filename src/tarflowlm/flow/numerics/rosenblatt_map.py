r"""The mixture-Rosenblatt map: channel after channel, mixture weights updated by Bayes' rule (paper sec. 3.2.2).

    alpha^(1) = w,   u_i = Phi^-1( sum_k alpha_k^(i) Phi((z_i - mu_ki) / s_k) )
    alpha_k^(i+1) ~ alpha_k^(i) N(z_i; mu_ki, s_k^2),   log_det = log p_mix(z) - log N(u; 0, I)

The weights live in log space and are shifted by their maximum at every channel, so nothing underflows; and log p_mix
is what the last ones sum to. Differs from algorithm 1 of the paper only there: it keeps alpha itself.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from tarflowlm.flow.numerics import forward, linear, logspace
from tarflowlm.flow.numerics.codebook import check_codebook
from tarflowlm.flow.numerics.families import NORMAL
from tarflowlm.flow.numerics.forward import mixture_cdf
from tarflowlm.flow.numerics.inverse import mixture_cdf_inverse, solve
from tarflowlm.flow.numerics.layout import LOWEST_EXPONENT, chunk_rows, row_chunks, static_chunks, use_eager_cpu
from tarflowlm.flow.numerics.pullback import pull

Solve = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_NEARLY_CERTAIN, _FEW_ROWS = -1e-5, 64
"""Log posterior of a component from which certainty is looked into: when half the rows have reached it, or, where
rows are few and calls are all that costs, every one of them."""
_BACKWARD_SHARE = 16
"""The backward records about this many [n, K] tensors per channel, so its chunks are that much smaller."""
_BACKWARD_SHARE_STATIC = 4
"""And on an accelerator, where every chunk is some hundred launches, or as many nodes of a compiler's graph."""


def _base_log_density(u: Tensor) -> Tensor:
    return -0.5 * (u * u).sum(-1) - u.shape[-1] * _HALF_LOG_2PI


def _chunks(like: Tensor, num_components: int, *, backward: bool = False) -> Iterable[slice]:
    """Row ranges that bound the [rows, K] temporaries."""
    if use_eager_cpu(like):
        return row_chunks(like.shape[0], num_components * (_BACKWARD_SHARE if backward else 1))
    return static_chunks(like.shape[0], num_components * (_BACKWARD_SHARE_STATIC if backward else 1))


def evaluate(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """u [N, d] and log_det [N] for z [N, d], log_w [N, K]; no autograd."""
    u = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    log_p, tail = torch.empty_like(z[:, 0]), torch.empty_like(z[:, 0])
    num_components = mean.shape[0]
    if not use_eager_cpu(z):
        for rows in _chunks(z, num_components):
            u[rows], log_p[rows] = _log_space_chunk(z[rows], log_w[rows], mean, log_std)
        return u, log_p - _base_log_density(u)
    space = linear.Workspace(4, num_components, chunk_rows(num_components), z.dtype)
    for rows in row_chunks(z.shape[0], num_components):
        log_p[rows] = _chunk(z[rows], log_w[rows], mean, log_std, space, u[rows], tail[rows])
    return u, log_p - _base_log_density(u)


def _chunk(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, space: linear.Workspace, u: Tensor, tail: Tensor
) -> Tensor:
    """Fills u [n, d] of one chunk and returns log p_mix [n]; buffers: 0 log alpha, 1 alpha, 2 a, 3 scratch."""
    n, axis, spread = z.shape[0], space.axis, space.spread
    lowest = LOWEST_EXPONENT[z.dtype]
    log_alpha, alpha = torch.add(space.orient(log_w), space.zero, out=space(0, n)), space(1, n)
    a, scratch = space(2, n), space(3, n)
    inv_std = space.orient(torch.exp(-log_std)[None])
    drop = space.orient(log_std[None] + _HALF_LOG_2PI)

    def normalise() -> tuple[Tensor, Tensor]:
        top = log_alpha.amax(axis, keepdim=True)
        log_alpha.sub_(top)
        return torch.clamp(log_alpha, min=lowest, out=alpha).exp_().sum(axis), top.squeeze(axis)

    total, _ = normalise()
    log_p = -torch.log(total)
    for i in range(z.shape[1]):
        torch.sub(spread(z[:, i]), space.orient(mean[None, :, i]), out=a).mul_(inv_std)
        side = linear.guess_side(a, alpha, scratch, space)
        torch.mul(a, spread(side * linear.unit(NORMAL)), out=scratch)
        mass = linear.tail_in_place(linear.clamp_in_place(scratch, NORMAL), NORMAL).mul_(alpha)
        torch.sum(mass, axis, out=tail).mul_(0.5).div_(total)
        u[:, i] = forward.quantile(tail, side, NORMAL)
        far = forward.rows_below(tail, linear.SMALLEST[z.dtype])
        if far is not None:
            u[far, i] = forward.evaluate(
                z[far, i].double(),
                space.orient(log_alpha)[far].double(),
                mean[None, :, i].double(),
                log_std[None].double(),
                NORMAL,
                NORMAL,
            )[0].to(z.dtype)
        log_alpha.addcmul_(a, a, value=-0.5).sub_(drop)
        total, top = normalise()
        log_p.add_(top)
    return log_p.add_(torch.log(total))


def _log_space_chunk(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """u [n, d] and log p_mix [n] of one chunk in log space, without a branch on data: the path of accelerators."""
    inv_std, drop = torch.exp(-log_std), log_std + _HALF_LOG_2PI
    log_alpha, channels = torch.log_softmax(log_w, -1), []
    log_p = torch.zeros_like(z[:, 0])
    for i in range(z.shape[-1]):
        a = (z[:, i, None] - mean[:, i]) * inv_std
        channels.append(logspace.noise_of_normals(a, log_alpha))
        log_alpha.addcmul_(a, a, value=-0.5).sub_(drop)
        scale = torch.logsumexp(log_alpha, -1)
        log_alpha.sub_(scale[:, None])
        log_p = log_p + scale
    return torch.stack(channels, -1), log_p


def traced(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """The same map from differentiable pieces: what the backward records."""
    log_w = torch.log_softmax(log_w, -1)
    inv_std = torch.exp(-log_std)
    log_alpha, channels = log_w, []
    log_p = torch.zeros_like(z[:, 0])
    for i in range(z.shape[-1]):
        channels.append(mixture_cdf(z[:, i], log_alpha, mean[:, i], log_std)[0])
        a = (z[:, i, None] - mean[:, i]) * inv_std
        log_alpha = log_alpha - 0.5 * a * a - log_std - _HALF_LOG_2PI
        scale = torch.logsumexp(log_alpha, -1, keepdim=True)
        log_alpha = log_alpha - scale
        log_p = log_p + scale.squeeze(-1)
    u = torch.stack(channels, -1)
    return u, log_p - _base_log_density(u)


def _compiled(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """A compiler derives the backward itself: it is told to compute again what does not fit one chunk."""
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (z, log_w, mean, log_std))
    if not needs_grad:
        return evaluate(z, log_w, mean, log_std)
    chunks = list(_chunks(z, mean.shape[0], backward=True))
    if len(chunks) == 1:
        return traced(z, log_w, mean, log_std)
    parts = [
        checkpoint(traced, z[rows], log_w[rows], mean, log_std, use_reentrant=False, preserve_rng_state=False)
        for rows in chunks
    ]
    return torch.cat([u for u, _ in parts]), torch.cat([log_det for _, log_det in parts])


def _pull(
    z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, grad_u: Tensor, grad_log_det: Tensor
) -> tuple[Tensor, ...]:
    out = tuple(torch.zeros_like(t) for t in (z, log_w, mean, log_std))
    for rows in _chunks(z, mean.shape[0], backward=True):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (z[rows], log_w[rows], mean, log_std)]
            outputs = traced(*leaves)
        grads = torch.autograd.grad(outputs, leaves, (grad_u[rows], grad_log_det[rows]))
        out[0][rows], out[1][rows] = grads[:2]
        out[2].add_(grads[2])
        out[3].add_(grads[3])
    return out


class _Rosenblatt(Function):
    @staticmethod
    def forward(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        return evaluate(z, log_w, mean, log_std)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        return pull(_pull, 0, *ctx.saved_tensors, grad_u, grad_log_det)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Any, Any]:
        z, log_w, mean, log_std = _merge(info.batch_size, in_dims, args)
        u, log_det = _Rosenblatt.apply(z, log_w, mean, log_std)
        return (u.view(info.batch_size, -1, u.shape[-1]), log_det.view(info.batch_size, -1)), (0, 0)


def inverse_rows(u: Tensor, log_alpha: Tensor, mean: Tensor, log_std: Tensor, solve_one: Solve) -> Tensor:
    """z [N, d] for u [N, d], log_alpha [N, K], mean [1, K, d], log_std [1, K]."""
    channels = []
    inv_std = torch.exp(-log_std)
    for i in range(u.shape[-1]):
        center = mean[..., i]
        z = solve_one(u[:, i], log_alpha, center, log_std)
        channels.append(z)
        if i + 1 < u.shape[-1]:
            a = (z[:, None] - center) * inv_std
            log_alpha = torch.log_softmax(log_alpha - 0.5 * a * a - log_std, -1)
    return torch.stack(channels, -1)


def solve_rows(u: Tensor, log_alpha: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """`inverse_rows` without autograd: rows whose component is certain after some channels skip the search."""
    if not use_eager_cpu(u):
        return inverse_rows(u, log_alpha, mean, log_std, solve_normal)
    z, open_rows, inv_std = torch.empty_like(u), torch.arange(len(u)), torch.exp(-log_std)
    for i in range(u.shape[-1]):
        center = mean[..., i]
        z_i = solve_normal(u[:, i], log_alpha, center, log_std)
        z[open_rows, i] = z_i
        if i + 1 == u.shape[-1]:
            break
        a = (z_i[:, None] - center) * inv_std
        log_alpha = torch.log_softmax(log_alpha - 0.5 * a * a - log_std, -1)
        enough = len(u) if len(u) <= _FEW_ROWS else len(u) // 2
        if (log_alpha.amax(-1) > _NEARLY_CERTAIN).sum() < enough:
            continue
        rest, certain = _of_one_component(u[:, i + 1 :], log_alpha, mean[..., i + 1 :], log_std)
        done = certain.nonzero().squeeze(-1)
        z[open_rows[done], i + 1 :] = rest[done]
        if len(done) == len(u):
            break
        kept = (~certain).nonzero().squeeze(-1)
        open_rows, u, log_alpha = open_rows[kept], u[kept], log_alpha[kept]
    return z


def _of_one_component(u: Tensor, log_alpha: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """The channels [N, r] if the most probable component k were the only one, and which rows may take them.

    z = mu_k + s_k u then. With e_i the posterior mass of all other components before channel i, given these z, the
    mixture's CDF differs from Phi(u_i) by at most e_i. Where that is below half an ulp of the smaller tail of u_i,
    in every channel, the search could not find anything better.
    """
    best = log_alpha.argmax(-1, keepdim=True)
    std = torch.exp(log_std).expand_as(log_alpha).gather(-1, best)
    index = best.unsqueeze(-1).expand(-1, 1, u.shape[-1])
    z = mean.expand(len(u), -1, -1).gather(1, index).squeeze(1) + std * u
    a = (z[:, None] - mean) * torch.exp(-log_std).unsqueeze(-1)
    evidence = torch.addcmul(-log_std.unsqueeze(-1), a, a, value=-0.5).cumsum(-1)
    log_odds = log_alpha.unsqueeze(-1).repeat(1, 1, u.shape[-1])
    log_odds[..., 1:] += evidence[..., :-1]
    log_odds -= log_odds.gather(1, index)
    others = log_odds.scatter_(1, index, -torch.inf).exp_().sum(1)
    limit = torch.finfo(u.dtype).eps / 4 * NORMAL.tail(u.abs())
    return z, (others <= limit).all(-1)


def solve_normal(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """One channel without autograd."""
    return solve(u, log_w, mean, log_std, NORMAL, NORMAL)


class _RosenblattInverse(Function):
    """The inverse without gradients; a Function for the sake of vmap."""

    @staticmethod
    def forward(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        z = torch.empty_like(u)
        for rows in _chunks(u, mean.shape[0]):
            z[rows] = solve_rows(u[rows], log_w[rows], mean[None], log_std[None])
        return z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        z = _RosenblattInverse.apply(*_merge(info.batch_size, in_dims, args))
        return z.view(info.batch_size, -1, z.shape[-1]), 0


def _merge(size: int, dims: tuple[int | None, ...], args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if dims[2] is not None or dims[3] is not None:
        raise NotImplementedError("vmap over the codebook of a Rosenblatt map: its components are shared by all rows")
    rows = (
        t.expand(size, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(args[:2], dims[:2], strict=True)
    )
    return *(t.reshape(-1, t.shape[-1]) for t in rows), *args[2:]


def flatten_vectors(x: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[torch.Size, Tensor, Tensor]:
    check_codebook(x, mean, log_std)
    if log_w.shape[-1] != mean.shape[0]:
        raise ValueError(f"log_w has {log_w.shape[-1]} components, the codebook {mean.shape[0]}")
    shape = torch.broadcast_shapes(x.shape[:-1], log_w.shape[:-1])
    flat = x.expand(*shape, x.shape[-1]).reshape(-1, x.shape[-1])
    return shape, flat, log_w.expand(*shape, log_w.shape[-1]).reshape(-1, log_w.shape[-1])


def rosenblatt(z: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    r"""Token-wise mixture-Rosenblatt map (paper sec. 3.2.2, app. B): u ~ N(0, I) iff z ~ sum_k w_k N(mu_k, s_k^2 I).

    Shapes: z [..., d]; log_w [..., K], unnormalised; mean [K, d]; log_std [K] (one shared codebook); u [..., d],
    log_det [...], nats. Float32 or float64; exact in both tails of every channel. Memory: some tensors of a chunk x K
    (see `layout`), whatever the number of rows; the backward recomputes chunk by chunk. NaN in a row gives NaN there.
    First derivatives only. Errors: ValueError for shapes that do not fit.
    """
    shape, flat, weights = flatten_vectors(z, log_w, mean, log_std)
    function = _compiled if torch.compiler.is_compiling() else _Rosenblatt.apply
    u, log_det = function(flat, weights, mean, log_std)
    return u.view(*shape, -1), log_det.view(shape)


def rosenblatt_inverse(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    r"""Inverse of `rosenblatt`: the same recursion, solving one scalar mixture per channel.

    Shapes: u [..., d]; log_w [..., K], unnormalised; mean [K, d]; log_std [K]; z [..., d]. Gradients are implicit,
    channel by channel, and hold d tensors [..., K]; under no_grad memory is as in `rosenblatt`.
    Errors: ValueError for shapes that do not fit.
    """
    shape, flat, weights = flatten_vectors(u, log_w, mean, log_std)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (u, log_w, mean, log_std))
    if needs_grad:
        return inverse_rows(flat, weights, mean[None], log_std[None], mixture_cdf_inverse).view(*shape, -1)
    return _RosenblattInverse.apply(flat, weights, mean, log_std).view(*shape, -1)
