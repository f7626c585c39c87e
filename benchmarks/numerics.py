"""Accuracy, range and time of the mixture maps next to zuko and bisection; time of the Mix-d loss.

    python benchmarks/numerics.py                                  # needs zuko
    python benchmarks/numerics.py --loss --against ../other-checkout

The errors are in u, after a round trip through the contender's own inverse and forward map, less
one ulp of z, against our float64 map (which the tests hold to 50 digits). Half of the mixtures are
hard: |u| to 30, scales e^-6 to e^2, modes up to 20 scales apart, weights to e^-12. "|u| to" is the
largest u that comes back to 1e-3.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from timing import Contender, parser, run, show
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint


class Library(NamedTuple):
    """One implementation of the map z -> u (with its log-determinant) and of its inverse.

    Both take z or u, log_w, mean, log_std.
    """

    forward: Callable[..., Tensor]
    inverse: Callable[..., Tensor]
    dtype: torch.dtype = torch.float32
    equal_weights: bool = False
    """It has no weights, so it is measured on mixtures of equal weights."""


def libraries() -> dict[str, Library]:
    """Ours in two precisions, bisection on torch.distributions, and zuko where it is installed."""
    from tarflowlm.flow.numerics import mixture_cdf, mixture_cdf_inverse

    def forward(*given: Tensor) -> Tensor:
        return mixture_cdf(*given)[0]

    found = {
        "ours, float32": Library(forward, mixture_cdf_inverse, torch.float32),
        "ours, float64": Library(forward, mixture_cdf_inverse, torch.float64),
        "torch, bisection": Library(plain_forward, bisection),
    }
    try:
        from zuko.transforms import GaussianizationTransform
    except ImportError:
        return found

    def transform(mean: Tensor, log_std: Tensor) -> GaussianizationTransform:
        # a network makes new parameters for every call, so preparing them counts on both sides
        return GaussianizationTransform(-mean * torch.exp(-log_std), -log_std)

    def zuko_forward(z: Tensor, _: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        return transform(mean, log_std).call_and_ladj(z)[0]

    def zuko_inverse(u: Tensor, _: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        return transform(mean, log_std).inv(u)

    found["zuko"] = Library(zuko_forward, zuko_inverse, equal_weights=True)
    return found


def distribution(log_w: Tensor, mean: Tensor, log_std: Tensor) -> MixtureSameFamily:
    weights = Categorical(logits=log_w, validate_args=False)
    normals = Normal(mean, log_std.exp(), validate_args=False)
    return MixtureSameFamily(weights, normals, validate_args=False)


def plain_forward(z: Tensor, *params: Tensor) -> Tensor:
    mixture = distribution(*params)
    mixture.log_prob(z)  # the log-determinant
    return torch.special.ndtri(mixture.cdf(z))


def bisection(u: Tensor, log_w: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    mixture = distribution(log_w, mean, log_std)
    goal = torch.special.ndtr(u)
    candidates = mean + log_std.exp() * u[..., None]
    low = candidates.amin(-1)
    high = candidates.amax(-1)
    for _ in range(30):
        middle = (low + high) / 2
        below = mixture.cdf(middle) < goal
        low = torch.where(below, middle, low)
        high = torch.where(below, high, middle)
    return (low + high) / 2


def round_trip(library: Library, u: Tensor, params: list[Tensor]) -> tuple[float, float]:
    """Median and worst |u(z(u)) - u|, less an ulp of z; inf where a value is lost."""
    from tarflowlm.flow.numerics import mixture_cdf

    u = u.to(library.dtype)
    params = [p.to(library.dtype) for p in params]
    if library.equal_weights:
        params[0] = torch.zeros_like(params[0])
    z = library.inverse(u, *params)
    back = library.forward(z, *params).double()
    wide = [p.double() for p in params]

    def exact(z: Tensor) -> Tensor:
        return mixture_cdf(z.double(), *wide)[0]

    below = exact(torch.nextafter(z, z - 1))
    above = exact(torch.nextafter(z, z + 1))
    ulp = torch.maximum((below - exact(z)).abs(), (above - exact(z)).abs())
    error = ((back - u.double()).abs() - ulp.nan_to_num()).clamp(min=0)
    error = error.nan_to_num(nan=math.inf, posinf=math.inf)
    return error.median().item(), error.max().item()


def largest_u(library: Library) -> float:
    """The largest u that comes back to 1e-3, like all below, in unit normals at -1 and 1."""
    u = torch.linspace(0, 60, 601, dtype=library.dtype)
    zero = torch.zeros(601, 2, dtype=library.dtype)
    mean = zero + torch.tensor([-1.0, 1.0], dtype=library.dtype)
    z = library.inverse(u, zero, mean, zero)
    is_good = (library.forward(z, zero, mean, zero) - u).abs() < 1e-3
    num_good = int(torch.cumprod(is_good.long(), 0).sum())
    return float(u[num_good - 1])


def maps(args: Namespace) -> dict[str, Contender]:
    """Forward and inverse of every library and number of components K."""
    from tarflowlm.flow.numerics import mixture_cdf_inverse

    found = {}
    for K in args.components:
        g = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=g, dtype=torch.float64)
        u = draw(args.tokens, args.channels)
        log_w, mean, log_std = (draw(args.tokens, args.channels, K) for _ in range(3))
        params = [log_w, 2 * mean, 0.3 * log_std]
        z = mixture_cdf_inverse(u, *params)
        hard_u, hard = hard_mixtures(args.accuracy, K, g)
        for name, library in libraries().items():
            accuracy: dict[str, object] = {"K": K, "worst": round_trip(library, u, params)[1]}
            accuracy["hard, median"], accuracy["hard, worst"] = round_trip(library, hard_u, hard)
            accuracy["|u| to"] = largest_u(library)
            narrow_z, narrow_u, *narrow = (t.to(library.dtype) for t in (z, u, *params))
            forward = partial(library.forward, narrow_z, *narrow)
            inverse = partial(library.inverse, narrow_u, *narrow)
            found[f"forward, {name}, K = {K}"] = Contender(forward, u.numel(), {"K": K})
            found[f"inverse, {name}, K = {K}"] = Contender(inverse, u.numel(), accuracy)
    return found


def hard_mixtures(num: int, K: int, g: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    """u [num] and log_w, mean, log_std [num, K]."""
    scale, gap, weight = torch.rand(3, num, K, generator=g, dtype=torch.float64)
    log_std = 8 * scale - 6
    wider = torch.exp(torch.maximum(log_std, log_std.roll(1, -1)))
    apart = torch.cumsum(20 * wider * gap, -1)
    u = 60 * torch.rand(num, generator=g, dtype=torch.float64) - 30
    return u, [-12 * weight, apart - apart.mean(-1, keepdim=True), log_std]


def losses(args: Namespace) -> dict[str, Contender]:
    """Forward and backward of the Mix-d loss, the baseline's loss, and a plain cross-entropy.

    Latents are drawn at the codes of the targets, whose neighbours typically are `--separation`
    standard deviations away: 12 at the start of training, 22 in a trained model of word pieces.
    """
    from tarflowlm.flow import numerics
    from tarflowlm.flow.codebook import typical_neighbour_distance

    K, N, E, d = 50_257, args.tokens, 256, 16
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(N, d, generator=g)
    features = torch.randn(N, E, generator=g)
    weight = 0.05 * torch.randn(K, E, generator=g)
    bias = torch.zeros(K)
    mean = torch.randn(K, d, generator=g)
    target = torch.randint(K, (N,), generator=g)
    scale = typical_neighbour_distance(mean) / args.separation
    log_std = torch.full((K,), math.log(scale))
    z = mean[target] + scale * noise
    leaves = [z, features, weight, bias, mean, log_std]
    for leaf in leaves:
        leaf.requires_grad_()

    def part(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(linear(x, weight, bias), y, reduction="sum")

    def chunks() -> None:
        total = torch.zeros(())
        for x, y in zip(features.split(256), target.split(256), strict=True):
            total = total + checkpoint(part, x, y, use_reentrant=False)
        torch.autograd.grad(total / N, (features, weight, bias))

    def baseline() -> None:
        total, chosen = numerics.head_sums(features, weight, bias, torch.arange(N), target)
        torch.autograd.grad((total - chosen).mean(), (features, weight, bias))

    def mixd() -> None:
        log_p = numerics.mixture_log_prob_from_features(*leaves, relative=True)
        torch.autograd.grad(-log_p.mean(), leaves)

    found = {"cross-entropy, chunks recomputed": Contender(chunks, N)}
    if hasattr(numerics, "head_sums"):
        found["baseline's loss"] = Contender(baseline, N)
    return found | {"Mix-d loss": Contender(mixd, N)}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=4096)
    options.add_argument("--channels", type=int, default=64)
    options.add_argument("--components", type=int, nargs="+", default=[2, 8, 27])
    options.add_argument("--accuracy", type=int, default=10_000, help="hard mixtures")
    options.add_argument("--separation", type=float, default=12.0, help="of the codes, with --loss")
    options.add_argument(
        "--loss", action="store_true", help="time the Mix-d loss, K = 50,257, and cross-entropy"
    )
    args = options.parse_args()
    found = run(losses if args.loss else maps, args)
    rows = []
    first: dict[tuple[object, str], Contender] = {}
    for name, contender in found.items():
        K = contender.info.pop("K", None)
        way = "loss" if args.loss else name.split(",")[0]
        reference = first.setdefault((K, way), contender)
        row = {
            "": name,
            "ms": 1000 * contender.units / contender.rate,
            "first one's time over it": contender.over(reference),
            **contender.info,
            "time over the other checkout": contender.over_other_checkout,
        }
        rows.append(row)
    show(args, rows)


if __name__ == "__main__":
    main()
