r"""mixture_cdf_inverse: z with F(z) = B(u), by a fixed number of steps inside an exact bracket.

With c_k = m_k + s_k v and C(v) = B(u), every component has mass B(u) below its own c_k, so the solution lies between
min c and max c. Bisection shrinks that bracket to the scale of the narrowest component, whatever the modes do; then
Newton steps finish, each kept inside the bracket and replaced by its midpoint otherwise.

The steps are those of `newton`, mirrored to u >= 0 where the upper tail's mass is the smaller one.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tarflowlm.flow.numerics import forward, gradients, linear
from tarflowlm.flow.numerics.families import Family, Kind, family
from tarflowlm.flow.numerics.few import are_few, solve_few
from tarflowlm.flow.numerics.layout import (
    chunk_rows,
    flatten,
    merge_batch,
    row_chunks,
    take_rows,
    use_eager_cpu,
)
from tarflowlm.flow.numerics.newton import newton, target

BISECTIONS = {torch.float32: 18, torch.float64: 20}
NEWTON_STEPS = {torch.float32: 4, torch.float64: 6}
_SAFE_CELL = 7
"""Newton's steps may start in a bracket of 2^-7 of the narrowest scale."""
_WASTE = 0.1
"""Below this share of far rows it is cheaper to solve them twice than to gather the others."""


def solve(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, f: Family, base: Family) -> Tensor:
    """z [N] for u [N] and parameters [N or 1, K]; no autograd."""
    params = (log_w, mean, log_std)
    if not use_eager_cpu(u):
        return _solve_log_space(u, params, f, base)
    far = forward.rows_below(base.tail(u.abs()), linear.SMALLEST[u.dtype])
    if far is None:
        return _solve_linear(u, params, f, base)
    if far.numel() < _WASTE * u.numel():
        z = _solve_linear(u, params, f, base)
    else:
        near = torch.ones(u.shape, dtype=torch.bool).index_fill_(0, far, False).nonzero().squeeze(-1)
        z = torch.empty_like(u)
        z[near] = _solve_linear(u[near], tuple(take_rows(p, near) for p in params), f, base)
    z[far] = _solve_far(u[far], tuple(take_rows(p, far) for p in params), f, base)
    return z


def _solve_far(u: Tensor, params: tuple[Tensor, ...], f: Family, base: Family) -> Tensor:
    if u.dtype == torch.float32:
        log_w, mean, log_std = (p.double() for p in params)
        return solve(u.double(), log_w, mean, log_std, f, base).to(u.dtype)
    parts = [
        _solve_log_space(u[r], tuple(take_rows(p, r) for p in params), f, base)
        for r in row_chunks(u.shape[0], params[1].shape[-1])
    ]
    return torch.cat(parts)


def _solve_linear(u: Tensor, params: tuple[Tensor, ...], f: Family, base: Family) -> Tensor:
    num_components = params[1].shape[-1]
    if are_few(u.shape[0], num_components):
        return solve_few(u, params, f, base)
    z = torch.empty_like(u)
    space = linear.Workspace(5, num_components, chunk_rows(num_components), u.dtype)
    for rows in row_chunks(u.shape[0], num_components):
        z[rows] = _solve_chunk(u[rows], tuple(take_rows(p, rows) for p in params), f, base, space)
    return z


def _solve_chunk(u: Tensor, params: tuple[Tensor, ...], f: Family, base: Family, space: linear.Workspace) -> Tensor:
    log_w, mean, log_std = params
    n, axis, spread = u.shape[0], space.axis, space.spread
    c = linear.load(log_w, mean, log_std, space)
    side, y = torch.copysign(space.one, u), u.abs()
    tail = base.tail(y)
    v = y if f is base else f.upper_quantile(tail)
    a, other = space(2, n), space(3, n)
    center = torch.mul(c.mean, spread(side), out=space(4, n))
    torch.div(spread(v), c.inv_std, out=a).add_(center)
    low, high = a.amin(axis), a.amax(axis)
    # brackets over the narrowest scale, halved until Newton's steps are safe; not a number takes all steps
    widest = float(((high - low) * c.inv_std.amax(axis)).amax())
    bisections = BISECTIONS[u.dtype]
    if widest < 2.0 ** (bisections - _SAFE_CELL):
        bisections = max(0, math.ceil(math.log2(max(widest, 1e-9))) + _SAFE_CELL)
    inv_std = c.inv_std.mul_(linear.unit(f))
    wanted = tail * c.total / linear.tail_scale(f)

    def scaled(x: Tensor) -> Tensor:
        return linear.clamp_in_place(torch.sub(spread(x), center, out=a).mul_(inv_std), f)

    above = torch.empty_like(u)
    for _ in range(bisections):
        x = torch.lerp(low, high, 0.5)
        mass = linear.tail_in_place(scaled(x), f).mul_(c.weight).sum(axis)
        torch.gt(mass, wanted, out=above)
        low, high = torch.lerp(low, x, above), torch.lerp(x, high, above)
    x = torch.lerp(low, high, 0.5)
    t = target(y, base.pdf(y).div_(tail), low, high, base)
    factor = 2.0 * linear.tail_scale(f) * linear.unit(f) / linear.density_scale(f)
    for _ in range(NEWTON_STEPS[u.dtype]):
        linear.density_into(scaled(x), f, other, space).mul_(c.weight).mul_(inv_std)
        density = other.sum(axis).clamp_(min=linear.TINY[u.dtype])
        mass = linear.tail_in_place(a, f).mul_(c.weight).sum(axis)
        torch.gt(mass, wanted, out=above)
        low, high = torch.lerp(low, x, above), torch.lerp(x, high, above)
        excess = torch.log(mass / wanted)
        x = newton(x, excess, mass.div_(density).mul_(factor), low, high, t)
    return x.mul_(side)


def _solve_log_space(u: Tensor, params: tuple[Tensor, ...], f: Family, base: Family) -> Tensor:
    """The same steps in log space, [N, K]: any range, no branch on data."""
    log_w, mean, log_std = params
    log_w = torch.log_softmax(log_w, -1)
    inv_std = torch.exp(-log_std)
    side = torch.where(u < 0, -1.0, 1.0).to(u.dtype)
    y = u.abs()
    log_wanted = base.log_tail(y)
    v = y if f is base else f.upper_quantile_log(log_wanted)
    center = side[:, None] * mean
    candidates = center + v[:, None] / inv_std
    low, high = candidates.amin(-1), candidates.amax(-1)
    for _ in range(BISECTIONS[u.dtype]):
        x = 0.5 * (low + high)
        log_tail = torch.logsumexp(log_w + f.log_tail((x[:, None] - center) * inv_std), -1)
        above = log_tail > log_wanted
        low, high = torch.where(above, x, low), torch.where(above, high, x)
    x = 0.5 * (low + high)
    t = target(y, torch.exp(base.log_pdf(y) - log_wanted), low, high, base)
    for _ in range(NEWTON_STEPS[u.dtype]):
        a = (x[:, None] - center) * inv_std
        log_tail = torch.logsumexp(log_w + f.log_tail(a), -1)
        log_density = torch.logsumexp(log_w + f.log_pdf(a) - log_std, -1)
        above = log_tail > log_wanted
        low, high = torch.where(above, x, low), torch.where(above, high, x)
        ratio = 2.0 * torch.exp((log_tail - log_density).clamp(max=-math.log(linear.TINY[u.dtype])))
        x = newton(x, log_tail - log_wanted, ratio, low, high, t)
    return torch.where(torch.isinf(u), u, side * x)


class _MixtureCdfInverse(Function):
    """Flat inverse with implicit gradients: dz = (du - du/dparams dparams) / (du/dz)."""

    @staticmethod
    def forward(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor, kind: Kind, base: Kind) -> Tensor:
        return solve(u, log_w, mean, log_std, family(kind), family(base))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kind, ctx.base = inputs[4:]
        ctx.save_for_backward(*inputs[1:4], output)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        *params, z = ctx.saved_tensors
        u, log_det = forward.MixtureCdf.apply(z, *params, ctx.kind, ctx.base)
        grad_u = grad_z * torch.exp(-log_det)
        nothing, families = torch.zeros_like(grad_u), (family(ctx.kind), family(ctx.base))
        _, *grads = gradients.pullback(z, tuple(params), u, log_det, -grad_u, nothing, *families)
        return grad_u, *grads, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        flat = merge_batch(info.batch_size, in_dims[:4], args[:4])
        return _MixtureCdfInverse.apply(*flat, *args[4:]).view(info.batch_size, -1), 0


def mixture_cdf_inverse(
    u: Tensor,
    log_w: Tensor,
    mean: Tensor,
    log_std: Tensor,
    *,
    kind: Kind = "normal",
    base: Kind | None = None,
    check: float | None = None,
) -> Tensor:
    r"""Inverse of `mixture_cdf`, elementwise: z = F^-1(B(u)), with implicit gradients to u and all parameters.

    Shapes: u [...]; log_w (unnormalised), mean, log_std [..., K], broadcast against u; z [...]. Float32 or float64.
    The number of steps is fixed, nothing is clamped and, on an accelerator, nothing is copied to the host. NaN gives
    NaN, u = +-inf gives z = +-inf. First derivatives only: a second backward raises RuntimeError.
    `check` is for debugging: a bound on |mixture_cdf(z) - u| beyond what one ulp of z is worth; costs a forward
    pass and raises FloatingPointError where it is exceeded.
    Errors: ValueError for mixed dtypes, differing K or an unknown family.
    """
    shape, flat_u, params = flatten(u, log_w, mean, log_std)
    names = (kind, base or kind)
    f, b = (family(name) for name in names)
    z = _MixtureCdfInverse.apply(flat_u, *params, *names)
    if check is not None:
        _check_residual(z.detach(), flat_u.detach(), [p.detach() for p in params], f, b, check)
    return z.view(shape)


def _check_residual(z: Tensor, u: Tensor, params: list[Tensor], f: Family, base: Family, bound: float) -> None:
    log_w, mean, log_std = params
    back, log_det = forward.evaluate(z, log_w, mean, log_std, f, base)
    eps = torch.finfo(z.dtype).eps
    residual = (back - u).abs() - eps * (z.abs() * torch.exp(log_det) + u.abs())
    worst = torch.where(torch.isinf(u), 0.0, residual).max() if z.numel() else torch.zeros(())
    if not bool(worst <= bound):
        at = int(torch.argmax(torch.nan_to_num(residual, nan=math.inf)))
        raise FloatingPointError(
            f"mixture_cdf_inverse: the residual {float(worst):.3g} in u exceeds {bound:.3g} "
            f"at element {at} (u = {float(u[at]):.6g})"
        )
