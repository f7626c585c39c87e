r"""Bounds on log p(x) from both sides, for texts that a flow wrote: bidirectional Monte Carlo.

    python -m reproduction.two_sided RUN        (RUN: a run directory or a model's name)

With z = mu_x + sigma_x eps, the evidence of a text is an expectation under the encoder,

    p(x) = E_{eps ~ N(0, I)} e^{g(eps)},   g(eps) = log p(z) - log sum_k N_k(z),

for log p(x | z) - log q(z | x) = -log sum_k N_k(z). Annealed importance sampling (Neal 2001) moves
eps through the densities N(eps; 0, I) e^{b g(eps)} for b = b_0 = 0, ..., b_K = 1 by Hamiltonian
steps that leave each of them unchanged, and

    log w = sum_k (b_{k+1} - b_k) g(eps_k).

Upwards, from eps ~ N(0, I), E[w] = p(x), so that E[log w] <= log p(x); K = 1 is the ELBO.
Downwards, from a posterior sample, E[1 / w] = 1 / p(x), so that E[log w] >= log p(x) (Grosse et al.
2015). The latents that a text was decoded from are a posterior sample: z ~ p(z), x ~ p(x | z).
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
import tyro
from torch import Generator, Tensor

import tarflowlm
from reproduction.results import markdown_table
from tarflowlm.cli.main import main, run_command
from tarflowlm.cli.options import Json
from tarflowlm.model import TarFlowLM, as_flow
from tarflowlm.options import arg
from tarflowlm.schema import Count

LEAPS = 3
"""Leapfrog steps of a Hamiltonian step."""
ACCEPTED = 0.7
"""Share of the Hamiltonian steps that should be accepted, on average over the rows."""

LogRatio = Callable[[Tensor], Tensor]
"""g [B] of noise eps [B, T, d]."""


def write_texts(
    model: TarFlowLM, num: int, length: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Texts x [num, length] ~ p(x | z), and eps [num, length, d] of their latents z ~ p(z)."""
    book = model.codebook
    shape = num, length, model.config.latent_dim
    u = torch.randn(shape, generator=generator, dtype=book.mean.dtype)
    with torch.no_grad():
        z = model.prior.inverse(u)
        p = book.log_posterior(z).exp()
        x = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(num, length)
        return x, (z - book.mean[x]) * torch.exp(-book.log_std[x])[..., None]


def log_ratio(model: TarFlowLM, x: Tensor) -> LogRatio:
    """g of the texts x."""

    def g(eps: Tensor) -> Tensor:
        z = model.codebook.encode(x, eps)
        return model.prior.log_prob(z) - model.codebook.log_normaliser(z).sum(-1)

    return g


def temperatures(num: int) -> list[float]:
    """b_0 = 0, ..., b_num = 1, dense at both ends."""
    ends = torch.sigmoid(torch.linspace(-4.0, 4.0, num + 1, dtype=torch.float64))
    return ((ends - ends[0]) / (ends[-1] - ends[0])).tolist()


def annealed(
    g: LogRatio,
    eps: Tensor,
    schedule: list[float],
    sizes: list[float] | None,
    generator: Generator,
) -> tuple[Tensor, list[float]]:
    """log w [B] along `schedule`, from b = 0 to 1 or back, and the step size of each temperature.

    Without `sizes` they are adapted on the way, so that `ACCEPTED` of the steps are: then log w is
    no bound, and a second pass takes the sizes of the first.
    """
    log_w = eps.new_zeros(len(eps), dtype=torch.float64)
    up = schedule[-1] > schedule[0]
    size, used = 0.1, []
    value, slope = with_gradient(g, eps)
    for number, (b, after) in enumerate(pairwise(schedule)):
        if up:
            log_w += (after - b) * value.double()
            b = after
        size = size if sizes is None else sizes[number]
        used.append(size)
        eps, value, slope, share = hamiltonian(g, eps, value, slope, b, size, generator)
        size *= math.exp(0.2 * (share - ACCEPTED))
        if not up:
            log_w += (b - after) * value.double()
    return log_w, used


def with_gradient(g: LogRatio, eps: Tensor) -> tuple[Tensor, Tensor]:
    """g [B] and its gradient [B, T, d]."""
    eps = eps.detach().requires_grad_(True)
    value = g(eps)
    (slope,) = torch.autograd.grad(value.sum(), eps)
    return value.detach(), slope


def hamiltonian(
    g: LogRatio,
    eps: Tensor,
    value: Tensor,
    slope: Tensor,
    b: float,
    size: float,
    generator: Generator,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """A step that keeps N(eps; 0, I) e^{b g(eps)}: eps, g, its gradient, and the accepted share."""

    def energy(eps: Tensor, momentum: Tensor, value: Tensor) -> Tensor:
        squares = eps.double().square().flatten(1).sum(-1)
        squares += momentum.double().square().flatten(1).sum(-1)
        return 0.5 * squares - b * value.double()

    momentum = torch.randn(eps.shape, generator=generator, dtype=eps.dtype)
    start = energy(eps, momentum, value)
    new, new_value, new_slope = eps, value, slope
    for _ in range(LEAPS):
        momentum = momentum + 0.5 * size * (b * new_slope - new)
        new = new + size * momentum
        new_value, new_slope = with_gradient(g, new)
        momentum = momentum + 0.5 * size * (b * new_slope - new)
    odds = torch.exp((start - energy(new, momentum, new_value)).clamp_max(0.0)).nan_to_num(0.0)
    taken = torch.rand(len(eps), generator=generator, dtype=torch.float64) < odds
    row = taken[:, None, None]
    return (
        torch.where(row, new, eps),
        torch.where(taken, new_value, value),
        torch.where(row, new_slope, slope),
        odds.mean().item(),
    )


def two_sided(
    g: LogRatio, posterior: Tensor, num: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """log w [B] upwards and downwards over `num` temperatures, from `posterior` samples eps."""
    up = temperatures(num)

    def start() -> Tensor:
        return torch.randn(posterior.shape, generator=generator, dtype=posterior.dtype)

    _, sizes = annealed(g, start(), up, None, generator)
    below, _ = annealed(g, start(), up, sizes, generator)
    above, _ = annealed(g, posterior, up[::-1], sizes[::-1], generator)
    return below, above


@dataclass(frozen=True, kw_only=True)
class Args(Json):
    """Bounds from both sides on log p(x), for texts that a flow wrote."""

    model: Annotated[tyro.conf.Positional[str], arg("MODEL")]
    texts: Count = 8
    length: Count = 64
    """Tokens of a text."""
    chains: Count = 4
    """Of each text and direction."""
    steps: tuple[int, ...] = (1, 30, 100, 300, 1000)
    """Numbers K of temperatures."""
    seed: int = 0


def run(args: Args) -> None:
    model = as_flow(tarflowlm.load(args.model).model).requires_grad_(False)
    generator = torch.Generator().manual_seed(args.seed)
    x, eps = write_texts(model, args.texts, args.length, generator)
    x, posterior = (t.repeat_interleave(args.chains, 0) for t in (x, eps))
    g = log_ratio(model, x)
    bits = -1 / (args.length * math.log(2))
    rows: list[dict[str, object]] = []
    for number in args.steps:
        start = time.monotonic()
        below, above = (
            log_w.view(args.texts, -1) for log_w in two_sided(g, posterior, number, generator)
        )
        width = (above.mean(1) - below.mean(1)) * -bits
        rows.append(
            {
                "temperatures": number,
                "bits per token, <=": below.mean().item() * bits,
                "bits per token, >=": above.mean().item() * bits,
                "between": width.mean().item(),
                "±": (width.std() / math.sqrt(len(width))).item(),
                "seconds": round(time.monotonic() - start),
            }
        )
        print(markdown_table(rows[-1:]), flush=True)
    print(markdown_table(rows))


def bound(argv: list[str]) -> None:
    """Bound the evidence with these words."""
    run_command(sys.modules[__name__], argv, "python -m reproduction.two_sided")


if __name__ == "__main__":
    main(dispatch=bound)
