# ruff: noqa: ANN001, ANN002, ANN202
"""Accuracy, range and time of the mixture maps beside zuko and bisection; time of the Mix-d loss.

    python benchmarks/numerics.py                                  # needs zuko
    python benchmarks/numerics.py --loss --against ../other-checkout

The errors are those of u after a round trip through the contender's own inverse and forward map,
less one ulp of z, against our float64 map (which the tests hold to 50 digits). Half of the mixtures
are hard: |u| to 30, scales e^-6 to e^2, modes up to 20 scales apart, weights to e^-12. "|u| to" is
the largest u that comes back to 1e-3.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from timing import Contender, parser, run, show
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint


class Library(NamedTuple):
    """One implementation of the map z -> u (with its log-determinant) and of its inverse."""

    forward: Callable[..., Any]
    inverse: Callable[..., Any]
    dtype: torch.dtype = torch.float32
    equal_weights: bool = (
        False  # without weights, an implementation is measured on mixtures of equal ones
    )


def libraries() -> dict[str, Library]:
    """Ours in two precisions, bisection on torch.distributions, and zuko."""
    from tarflowlm.flow.numerics import mixture_cdf, mixture_cdf_inverse

    def mixture(log_w, mean, log_std):
        weights = torch.distributions.Categorical(logits=log_w, validate_args=False)
        normals = torch.distributions.Normal(mean, log_std.exp(), validate_args=False)
        return torch.distributions.MixtureSameFamily(weights, normals, validate_args=False)

    def plain_forward(z, *params):
        distribution = mixture(*params)
        distribution.log_prob(z)  # the log-determinant
        return torch.special.ndtri(distribution.cdf(z))

    def bisection(u, log_w, mean, log_std):
        distribution, candidates = (
            mixture(log_w, mean, log_std),
            mean + log_std.exp() * u[..., None],
        )
        low, high, goal = candidates.amin(-1), candidates.amax(-1), torch.special.ndtr(u)
        for _ in range(30):
            middle = (low + high) / 2
            below = distribution.cdf(middle) < goal
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    found = {
        f"ours, {str(dtype)[6:]}": Library(
            lambda *given: mixture_cdf(*given)[0], mixture_cdf_inverse, dtype
        )
        for dtype in (torch.float32, torch.float64)
    }
    found["torch, bisection"] = Library(plain_forward, bisection)
    try:
        from zuko.transforms import GaussianizationTransform
    except ImportError:
        return found

    def transform(mean, log_std):
        # parameters come fresh from a network, so preparing them is part of the price on both sides
        return GaussianizationTransform(-mean * torch.exp(-log_std), -log_std)

    def zuko_forward(z, _, mean, log_std):
        return transform(mean, log_std).call_and_ladj(z)[0]

    return found | {
        "zuko": Library(
            zuko_forward, lambda u, _, *given: transform(*given).inv(u), equal_weights=True
        )
    }


def round_trip(library: Library, u: Any, params: Any) -> tuple[float, float]:
    """Median and worst |u(z(u)) - u|, less an ulp of z; inf where a value is lost."""
    from tarflowlm.flow.numerics import mixture_cdf

    u, log_w, mean, log_std = (x.to(library.dtype) for x in (u, *params))
    params = torch.zeros_like(log_w) if library.equal_weights else log_w, mean, log_std
    z = library.inverse(u, *params)
    back = library.forward(z, *params).double()
    near, doubles = (
        (torch.nextafter(z, z - 1), z, torch.nextafter(z, z + 1)),
        [p.double() for p in params],
    )
    low, exact, high = (mixture_cdf(x.double(), *doubles)[0] for x in near)
    ulp = torch.maximum((low - exact).abs(), (high - exact).abs())
    error = (
        ((back - u.double()).abs() - ulp.nan_to_num())
        .clamp(min=0)
        .nan_to_num(nan=math.inf, posinf=math.inf)
    )
    return error.median().item(), error.max().item()


def largest_u(library: Library) -> float:
    """Largest u up to which all come back to 1e-3, for the mixture of two equal unit normals at -1
    and 1.
    """
    u, zero = (
        torch.linspace(0, 60, 601, dtype=library.dtype),
        torch.zeros(601, 2, dtype=library.dtype),
    )
    params = zero, zero + torch.tensor([-1.0, 1.0], dtype=library.dtype), zero
    fine = (library.forward(library.inverse(u, *params), *params) - u).abs() < 1e-3
    return float(u[int(torch.cumprod(fine.long(), 0).sum()) - 1])


def build(args: Namespace) -> dict[str, Contender]:
    """Forward and inverse of every library and number of components, or the losses with --loss."""
    from tarflowlm.flow.numerics import mixture_cdf_inverse

    if args.loss:
        return losses(args)
    found = {}
    for K in args.components:
        g, shape = torch.Generator().manual_seed(0), (args.tokens, args.channels)
        u, *draws = (
            torch.randn(*s, generator=g, dtype=torch.float64) for s in (shape, *[(*shape, K)] * 3)
        )
        params = draws[0], 2 * draws[1], 0.3 * draws[2]
        z = mixture_cdf_inverse(u, *params)
        uniform = torch.rand(3, args.accuracy, K, generator=g, dtype=torch.float64)
        log_std = 8 * uniform[0] - 6
        apart = torch.cumsum(
            20 * torch.exp(torch.maximum(log_std, log_std.roll(1, -1))) * uniform[1], -1
        )
        hard = -12 * uniform[2], apart - apart.mean(-1, keepdim=True), log_std
        hard_u = 60 * torch.rand(args.accuracy, generator=g, dtype=torch.float64) - 30
        for name, library in libraries().items():
            info: dict[str, Any] = {"K": K, "worst": round_trip(library, u, params)[1]}
            info["hard, median"], info["hard, worst"] = round_trip(library, hard_u, hard)
            info["|u| to"] = largest_u(library)
            for way, x in (("forward", z), ("inverse", u)):
                call = partial(
                    getattr(library, way), *(value.to(library.dtype) for value in (x, *params))
                )
                found[f"{way}, {name}, K = {K}"] = Contender(
                    call, u.numel(), info if way == "inverse" else {"K": K}
                )
    return found


def losses(args: Namespace) -> dict[str, Contender]:
    """Forward and backward of the Mix-d loss over a vocabulary, and of cross-entropy in recomputed
    chunks.

    Latents are drawn at the codes of the targets, whose neighbours typically are `--separation`
    standard deviations away: 12 at the start of training, 22 in english-small.
    """
    from tarflowlm.flow.codebook import typical_neighbour_distance
    from tarflowlm.flow.numerics import mixture_log_prob_from_features

    K, N, E, d, g = 50_257, args.tokens, 256, 16, torch.Generator().manual_seed(0)
    noise, features, weight, mean = (
        torch.randn(*s, generator=g) for s in ((N, d), (N, E), (K, E), (K, d))
    )
    target, scale = (
        torch.randint(K, (N,), generator=g),
        typical_neighbour_distance(mean) / args.separation,
    )
    log_std, z = torch.full((K,), math.log(scale)), mean[target] + scale * noise
    leaves = [
        t.requires_grad_() for t in (z, features, 0.05 * weight, torch.zeros(K), mean, log_std)
    ]
    z, features, weight, bias, mean, log_std = leaves

    def part(x: Any, y: Any) -> Any:
        return cross_entropy(linear(x, weight, bias), y, reduction="sum")

    def chunks() -> None:
        pairs = zip(features.split(256), target.split(256), strict=True)
        total = sum(checkpoint(part, x, y, use_reentrant=False) for x, y in pairs)
        torch.autograd.grad(total / N, (features, weight, bias))

    def mixd() -> None:
        loss = -mixture_log_prob_from_features(
            z, features, weight, bias, mean, log_std, relative=True
        ).mean()
        torch.autograd.grad(loss, leaves)

    return {
        "cross-entropy, chunks recomputed": Contender(chunks, N),
        "Mix-d loss": Contender(mixd, N),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=4096)
    options.add_argument("--channels", type=int, default=64)
    options.add_argument("--components", type=int, nargs="+", default=[2, 8, 27])
    options.add_argument("--accuracy", type=int, default=10_000, help="hard mixtures")
    options.add_argument("--separation", type=float, default=12.0, help="of the codes, with --loss")
    options.add_argument(
        "--loss", action="store_true", help="time the Mix-d loss, K = 50,257, beside cross-entropy"
    )
    args = options.parse_args()
    found = run(build, args)
    rows, first = [], {}
    for name, contender in found.items():
        K = contender.info.pop("K", None)
        reference = first.setdefault((K, "loss" if args.loss else name.split(",")[0]), contender)
        row = {"": name, "ms": 1000 * contender.units / contender.rate}
        row["first one's time over it"] = contender.over(reference)
        rows.append(
            row | contender.info | {"time over the other checkout": contender.over_other_checkout}
        )
    show(args, rows)


if __name__ == "__main__":
    main()
