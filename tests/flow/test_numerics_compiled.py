"""torch.compile can follow neither reused buffers nor branches on data."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from numerics_cases import codebook_case, nasty_mixtures
from torch.utils._python_dispatch import TorchDispatchMode

from tarflowlm import flow
from tarflowlm.config import TrainConfig
from tarflowlm.flow.numerics import (
    COMPILED,
    REFERENCE,
    mixture_cdf,
    mixture_cdf_inverse,
    mixture_log_density,
    mixture_log_prob,
    rosenblatt,
    rosenblatt_inverse,
)
from tarflowlm.model_config import Affine, FlowConfig, Mix1, MixD, TransformerConfig
from tarflowlm.training.parallel import compiling, parallelise
from tarflowlm.training.train import accumulate_gradients


def scalar(z, *params):
    u, log_det = mixture_cdf(z, *params)
    return (u + log_det + mixture_log_density(z, *params)).sum()


def codebook(z, log_w, mean, log_std):
    u, log_det = rosenblatt(z, log_w, mean, log_std)
    return u.sum() + (log_det + mixture_log_prob(z, log_w, mean, log_std)).sum()


def compare(function):
    """Assert that the compiled function has the values and gradients of the eager one."""
    if function is scalar:
        z = torch.linspace(-3, 3, 20, dtype=torch.float64)
        case = (z, *nasty_mixtures(20, 3, 1, torch.float64))
    else:
        case = codebook_case(20, 80, 3, 0)
    leaves = [tensor.requires_grad_() for tensor in case]
    # traced as for a compiler, but none is needed
    compiled = torch.compile(function, backend="aot_eager")
    found, expected = compiled(*leaves), function(*leaves)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)
    )


def compare_maps():
    """Assert that the maps that accelerators compile are the others."""
    flow.is_eager_cpu = lambda t: False
    z = torch.linspace(-3, 3, 20)
    params = nasty_mixtures(20, 3, 1, torch.float32)
    for function in (mixture_cdf, mixture_log_density, mixture_cdf_inverse):
        results = []
        for maps in (REFERENCE, COMPILED):
            leaves = [t.clone().requires_grad_() for t in (z, *params)]
            found = function(*leaves, maps=maps)
            found = found if isinstance(found, tuple) else (found,)
            results.append([*found, *torch.autograd.grad(sum(t.sum() for t in found), leaves)])
        # an ulp of z, in which two inverses may differ, is worth more in gradients
        rtol = 1e-5 if function is mixture_cdf_inverse else 1e-6
        torch.testing.assert_close(*results, rtol=rtol, atol=1e-6)
    case = codebook_case(20, 80, 3, 0, torch.float32)
    for function in (rosenblatt, rosenblatt_inverse):
        torch.testing.assert_close(
            function(*case, maps=COMPILED), function(*case), rtol=1e-5, atol=1e-5
        )


class Products(TorchDispatchMode):
    """The formats of matrix products, by their inner dimension."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[1] in ("mm", "bmm", "addmm", "addmm_", "baddbmm"):
            self.found.add((args[-1].shape[-2], args[-1].dtype))
        return func(*args, **(kwargs or {}))


def train_step(coupling):
    """One step in bfloat16: no graph breaks, and densities are in float32 or wider."""
    flow.is_eager_cpu = lambda t: False
    block = {"mixd": MixD(), "affine": Affine(), "mix1": Mix1()}[coupling]
    config = FlowConfig(
        vocab_size=70,
        context=8,
        latent_dim=3,
        blocks=(block, Mix1()),
        trunk=TransformerConfig(width=24, num_heads=2),
    )
    torch.manual_seed(0)
    model = config.build()
    train = TrainConfig(precision="bfloat16", batch_size=2)
    tokens = torch.randint(70, (2, 8))
    generator = torch.Generator().manual_seed(0)
    with Products() as products:
        accumulate_gradients(model, parallelise(model, train), tokens, generator, train)
    inner = {size: dtype for size, dtype in products.found if size == 5}  # d + 2
    assert set(inner.values()) <= {torch.float32, torch.float64}
    assert inner
    assert (24, torch.bfloat16) in products.found
    bound = parallelise(model, train, compiled=True)
    with compiling(True):
        loss = accumulate_gradients(model, bound, tokens, generator, train)
    assert loss.isfinite()
    # near components are a branch on data, which nothing compiles
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("name", ["mixd", "scalar", "codebook", "maps", "affine", "mix1"])
def test_compiled_maps_have_the_same_values_and_gradients(name):
    # in a process of its own: a compiler cannot follow the shape checks of the tests
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    name = sys.argv[1]
    if name in ("scalar", "codebook"):
        compare({"scalar": scalar, "codebook": codebook}[name])
    else:
        torch.compile = partial(torch.compile, backend="aot_eager")
        compare_maps() if name == "maps" else train_step(name)
