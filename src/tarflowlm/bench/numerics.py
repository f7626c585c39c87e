"""Speed, accuracy and range of the mixture maps, and cost of the Mix-d loss: paired, interleaved, in one run.

K components of a mixture; the loss over a vocabulary is in `vocabulary_loss`.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from tarflowlm.bench.arguments import NumericsArgs
from tarflowlm.bench.vocabulary_loss import LossProblem, interleave, losses
from tarflowlm.errors import UserError
from tarflowlm.flow.numerics import mixture_cdf, mixture_cdf_inverse
from tarflowlm.terminal.bars import StageProgress, no_progress
from tarflowlm.terminal.tables import column_table

Params = tuple[Tensor, Tensor, Tensor]
Map = Callable[[Tensor, Params], Tensor]


@dataclass(frozen=True)
class Contender:
    """One implementation of the map and its inverse."""

    name: str
    forward: Map
    """(z, params) -> u; computes the log-determinant too."""
    inverse: Map
    """(u, params) -> z."""
    dtype: torch.dtype
    equal_weights: bool = False
    """True where the implementation has no weights: it is then held to the mixture it can express."""


def run(args: NumericsArgs, progress: StageProgress = no_progress) -> dict[str, Any]:
    """{"maps": [...], "head": [...], ...}: one row per contender and mixture size, one per loss.

    Ratios are medians of the rounds' own ratios, to `ours f32` for the maps and to the faster
    cross-entropy for the losses. Errors are in u, against our float64, itself held to 50 digits by the tests; the
    round trip's is net of what one ulp of z is worth.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        maps = [row for k in args.components for row in _maps(args, k, progress)]
        head = losses(_loss_problem(args), args.head_rounds, progress) if args.head else []
    finally:
        torch.set_num_threads(threads)
    return {
        "maps": maps,
        "head": head,
        "shape": [args.tokens, args.channels],
        "threads": args.threads,
        "torch": torch.__version__,
    }


def _loss_problem(args: NumericsArgs) -> LossProblem:
    return LossProblem(args.vocabulary, args.head_tokens, args.width, args.latent_dim, args.threads, args.seed)


def _contenders(args: NumericsArgs) -> list[Contender]:
    def ours(z: Tensor, params: Params) -> Tensor:
        return mixture_cdf(z, *params)[0]

    def ours_inverse(u: Tensor, params: Params) -> Tensor:
        return mixture_cdf_inverse(u, *params)

    found = [
        Contender("ours f32", ours, ours_inverse, torch.float32),
        Contender("ours f64", ours, ours_inverse, torch.float64),
        Contender("torch bisection", _distribution_forward, _distribution_inverse, torch.float32),
    ]
    return [*found, _zuko()] if args.zuko else found


def _zuko() -> Contender:
    try:
        from zuko.transforms import GaussianizationTransform
    except ImportError as error:
        raise UserError("zuko is not installed: pip install zuko, or leave it out with --no-zuko") from error

    def transform(params: Params) -> Any:
        # Parameters come fresh from a network, so preparing them is part of the price on both sides.
        _, mean, log_std = params
        return GaussianizationTransform(-mean * torch.exp(-log_std), -log_std)

    def forward(z: Tensor, params: Params) -> Tensor:
        return transform(params).call_and_ladj(z)[0]

    def inverse(u: Tensor, params: Params) -> Tensor:
        return transform(params).inv(u)

    return Contender("zuko", forward, inverse, torch.float32, equal_weights=True)


def _mixture(params: Params) -> torch.distributions.MixtureSameFamily:
    log_w, mean, log_std = params
    weights = torch.distributions.Categorical(logits=log_w, validate_args=False)
    normals = torch.distributions.Normal(mean, torch.exp(log_std), validate_args=False)
    return torch.distributions.MixtureSameFamily(weights, normals, validate_args=False)


def _distribution_forward(z: Tensor, params: Params) -> Tensor:
    mixture = _mixture(params)
    u = torch.special.ndtri(mixture.cdf(z))
    mixture.log_prob(z)
    return u


def _distribution_inverse(u: Tensor, params: Params) -> Tensor:
    mixture, (_, mean, log_std) = _mixture(params), params
    candidates = mean + torch.exp(log_std) * u[..., None]
    low, high, goal = candidates.amin(-1), candidates.amax(-1), torch.special.ndtr(u)
    for _ in range(30):
        middle = (low + high) / 2
        below = mixture.cdf(middle) < goal
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def _ordinary(shape: tuple[int, ...], k: int, generator: torch.Generator) -> tuple[Tensor, Params]:
    """u ~ N(0, 1) and mixtures of a few overlapping modes, float64."""
    draw = [torch.randn(*shape, k, generator=generator, dtype=torch.float64) for _ in range(3)]
    return torch.randn(shape, generator=generator, dtype=torch.float64), (draw[0], 2 * draw[1], 0.3 * draw[2])


def _hard(rows: int, k: int, generator: torch.Generator) -> tuple[Tensor, Params]:
    """|u| to 30, scales e^-6 to e^2, modes up to 20 scales apart, weights to e^-12, float64."""
    uniform = [torch.rand(rows, k, generator=generator, dtype=torch.float64) for _ in range(3)]
    log_std = 8 * uniform[0] - 6
    apart = torch.cumsum(20 * torch.exp(torch.maximum(log_std, log_std.roll(1, -1))) * uniform[1], -1)
    u = 60 * torch.rand(rows, generator=generator, dtype=torch.float64) - 30
    return u, (-12 * uniform[2], apart - apart.mean(-1, keepdim=True), log_std)


def _maps(args: NumericsArgs, k: int, progress: StageProgress) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(args.seed)
    u, params = _ordinary((args.tokens, args.channels), k, generator)
    with torch.no_grad():
        z = mixture_cdf_inverse(u, *params)
        contenders = _contenders(args)
        jobs: dict[tuple[str, str], Callable[[], Any]] = {}
        for c in contenders:
            cast = tuple(p.to(c.dtype) for p in params)
            jobs[c.name, "forward"] = _job(c.forward, z.to(c.dtype), cast)
            jobs[c.name, "inverse"] = _job(c.inverse, u.to(c.dtype), cast)
        seconds = interleave(jobs, args.rounds, partial(progress, f"maps of {k} components, rounds"))
        ordinary = _ordinary((args.accuracy_rows // 2,), k, generator)
        hard = _hard(args.accuracy_rows // 2, k, generator)
        rows = []
        for c in contenders:
            row: dict[str, Any] = {"name": c.name, "components": k}
            for way in ("forward", "inverse"):
                times, base = seconds[c.name, way], seconds[contenders[0].name, way]
                row[f"{way}_ms"] = 1000 * statistics.median(times)
                row[f"{way}_ours_over_this"] = statistics.median(a / b for a, b in zip(base, times, strict=True))
            for label, (noise, mixtures) in (("ordinary", ordinary), ("hard", hard)):
                median, worst = _round_trip(c, noise, mixtures)
                row |= {f"{label}_median_error": median, f"{label}_worst_error": worst}
            row["largest_u"] = _largest_noise(c)
            rows.append(row)
    return rows


def _job(function: Map, x: Tensor, params: Any) -> Callable[[], Any]:
    return lambda: function(x, params)


def _round_trip(c: Contender, u: Tensor, params: Params) -> tuple[float | None, float | None]:
    """Median and worst |u(z(u)) - u|, both maps the contender's own, less an ulp of z; None where not finite."""
    log_w, mean, log_std = (p.to(c.dtype) for p in params)
    if c.equal_weights:
        log_w = torch.zeros_like(log_w)
    u = u.to(c.dtype)
    z = c.inverse(u, (log_w, mean, log_std))
    back = c.forward(z, (log_w, mean, log_std)).double()
    wide = log_w.double(), mean.double(), log_std.double()
    exact = mixture_cdf(z.double(), *wide)[0]
    sides = [mixture_cdf(torch.nextafter(z, z + s).double(), *wide)[0] for s in (-1, 1)]
    ulp = torch.stack([(side - exact).abs() for side in sides]).amax(0)
    error = ((back - u.double()).abs() - torch.nan_to_num(ulp)).clamp(min=0)
    error = torch.where(error.isnan(), torch.inf, error)
    median, worst = error.median().item(), error.max().item()
    return median if math.isfinite(median) else None, worst if math.isfinite(worst) else None


def _largest_noise(c: Contender) -> float:
    """Largest u with every smaller one coming back to 1e-3, for the mixture of two equal unit normals at -1 and 1."""
    u = torch.linspace(0, 60, 601, dtype=c.dtype)
    zero = torch.zeros(601, 2, dtype=c.dtype)
    params = zero, torch.tensor([-1.0, 1.0], dtype=c.dtype).expand(601, 2).contiguous(), zero
    fine = (c.forward(c.inverse(u, params), params) - u).abs() < 1e-3
    return float(u[int(torch.cumprod(fine.long(), 0).sum()) - 1])


def _scientific(error: float | None) -> str:
    return "lost" if error is None else f"{error:.0e}"


def print_result(result: dict[str, Any], console: Console) -> None:
    """The tables of `run`'s result."""
    tokens, channels = result["shape"]
    title = (
        f"mixture maps, {tokens} x {channels} elements, {result['threads']} thread(s); errors in u, less an ulp of z"
    )
    headings = ("K", "", "forward ms", "ours / it", "inverse ms", "ours / it")
    errors = ("worst", "hard median", "hard worst", "|u| to")
    table = column_table(title, (*headings, *errors))
    for r in result["maps"]:
        table.add_row(
            str(r["components"]),
            r["name"],
            f"{r['forward_ms']:.1f}",
            f"{r['forward_ours_over_this']:.2f}",
            f"{r['inverse_ms']:.1f}",
            f"{r['inverse_ours_over_this']:.2f}",
            _scientific(r["ordinary_worst_error"]),
            _scientific(r["hard_median_error"]),
            _scientific(r["hard_worst_error"]),
            f"{r['largest_u']:.1f}",
        )
    console.print(table)
    if result["head"]:
        columns = ("", "seconds", "over CE recomputed", "over CE in forward", "peak GB above inputs")
        table = column_table("loss over a vocabulary, forward and backward", columns)
        for r in result["head"]:
            ratios = (f"{r['over_recomputed']:.2f}", f"{r['over_in_forward']:.2f}")
            table.add_row(r["name"], f"{r['seconds']:.2f}", *ratios, f"{r['peak_gb']:.2f}")
        console.print(table)
