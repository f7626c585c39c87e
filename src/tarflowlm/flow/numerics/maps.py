r"""The implementations of the maps of mixtures: on a CPU, on accelerators, and compiled there.

A CPU takes `CPU`, in linear space. An accelerator takes the given maps: `REFERENCE` in log space,
or `COMPILED`, which are the same by torch.compile.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from tarflowlm import chunks, flow
from tarflowlm.flow.numerics import cpu, reference, sweep
from tarflowlm.flow.numerics.reference import Gradients

Result = TypeVar("Result")


class Maps(NamedTuple):
    """One implementation of every map, on rows and without autograd, as `reference` defines it."""

    mixture_cdf: Callable[..., tuple[Tensor, Tensor]]
    mixture_cdf_inverse: Callable[..., Tensor]
    mixture_log_density: Callable[..., Tensor]
    mixture_backward: Callable[..., Gradients]
    rosenblatt: Callable[..., tuple[Tensor, Tensor]]
    rosenblatt_inverse: Callable[..., Tensor]
    budget: Callable[[int], int]
    """From the elements of a row to the most elements of a tensor."""


def _held(elements_per_row: int) -> int:
    return chunks.HELD_ACCELERATOR


compiled = cache(torch.compile)
"""A function by torch.compile, which keeps intermediate results out of memory."""


def fused(function: Callable[..., Result], *tensors: Tensor) -> Result:
    """function(*tensors), `compiled` at the first call."""
    result: Result = compiled(function)(*tensors)
    return result


CPU = Maps(
    cpu.mixture_cdf,
    cpu.mixture_cdf_inverse,
    cpu.mixture_log_density,
    cpu.mixture_backward,
    # measured: a sweep is fastest in chunks four times as large as the cache
    partial(
        sweep.rosenblatt, budget=lambda k: 4 * cpu.budget(k), of_channel=sweep.channel_in_place
    ),
    cpu.rosenblatt_inverse,
    cpu.budget,
)
REFERENCE = Maps(
    reference.mixture_cdf,
    reference.mixture_cdf_inverse,
    reference.mixture_log_density,
    reference.mixture_backward,
    partial(sweep.rosenblatt, budget=_held, of_channel=sweep.channel_in_place),
    partial(sweep.rosenblatt_inverse, scalar=reference.mixture_cdf_inverse),
    _held,
)
COMPILED = Maps(
    partial(fused, reference.mixture_cdf),
    partial(fused, reference.mixture_cdf_inverse),
    partial(fused, reference.mixture_log_density),
    partial(fused, reference.mixture_backward),
    partial(sweep.rosenblatt, budget=_held, of_channel=partial(fused, sweep.channel)),
    partial(sweep.rosenblatt_inverse, scalar=partial(fused, reference.mixture_cdf_inverse)),
    _held,
)


def maps_for(like: Tensor, on_accelerators: Maps = REFERENCE) -> Maps:
    """The maps of tensors `like` this one."""
    return CPU if flow.is_eager_cpu(like) else on_accelerators
