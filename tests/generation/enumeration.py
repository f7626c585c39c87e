"""Probabilities of all texts of tiny models, by enumeration."""

import itertools

import torch
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.model import TarFlowLM

V = 3


def texts(length: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(V), repeat=length)))


def probabilities(model: TarFlowLM | TokenLM, axis: Tensor | None = None) -> Tensor:
    """p(x) of all V^T texts; of a flow with one channel per token, the integral of p(x|z) p(z) on a
    grid, whose `axis` has spacings below the codebook's scale.
    """
    T = model.config.context
    with torch.no_grad():
        if isinstance(model, TokenLM):
            return model.log_prob(texts(T)).exp()
        assert model.config.latent_dim == 1
        # sums over a grid are exact for Gaussians
        if axis is None:
            axis = torch.linspace(-8, 8, 401) if T == 2 else torch.linspace(-7, 7, 71)
        z = torch.cartesian_prod(*[axis.double()] * T)[..., None]
        density = (
            torch.cat([model.prior.log_prob(part) for part in z.split(40_000)]).exp()
            * (axis[1] - axis[0]) ** T
        )
        posterior = model.codebook.log_posterior(z).exp()
    found = [
        posterior.gather(-1, x.expand(len(z), T)[..., None]).flatten(1).prod(1) for x in texts(T)
    ]
    return torch.stack([(density * p).sum() for p in found])
