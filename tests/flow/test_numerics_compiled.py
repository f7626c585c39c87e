"""torch.compile can follow neither reused buffers nor branches on data."""

import subprocess
import sys

import pytest
import torch
from numerics_cases import codebook_case, nasty_mixtures

from tarflowlm.flow.numerics import (
    mixture_cdf,
    mixture_log_density,
    mixture_log_prob,
    rosenblatt,
)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scalar", "codebook"])
def test_compiled_maps_have_the_same_values_and_gradients(name):
    # in a process of its own: a compiler cannot follow the shape checks of the tests
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    compare({"scalar": scalar, "codebook": codebook}[sys.argv[1]])
