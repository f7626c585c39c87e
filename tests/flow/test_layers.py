"""Permutations of latents: exact inverses, and the layout they promise."""

import pytest
import torch

from helpers import normal
from tarflowlm.errors import UserError
from tarflowlm.flow.order import Order, Patch

T, C = 6, 5

LAYERS = {
    "keep": lambda: Order(C),
    "reverse": lambda: Order(C, reverse=True),
    "mix": lambda: Order(C, mix=1),
    "mix-3-reverse": lambda: Order(C, reverse=True, mix=3),
    "patch-1": lambda: Patch(1),
    "patch-2": lambda: Patch(2),
    "patch-3": lambda: Patch(3),
}

parametrize_layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


@parametrize_layers
def test_round_trips_are_bit_exact(make):
    layer, z = make(), normal(3, T, C)
    u = layer(z)
    assert torch.equal(layer.inverse(u), z)
    assert torch.equal(layer(layer.inverse(u)), u)


@parametrize_layers
def test_every_value_is_kept_once(make):
    z = torch.arange(T * C).view(1, T, C)
    assert make()(z.double()).flatten().sort().values.tolist() == z.flatten().tolist()


def test_patch_refuses_what_it_cannot_divide():
    with pytest.raises(UserError, match="patch 4 does not divide the 6 tokens"):
        Patch(4)(torch.zeros(1, 6, 2))
    with pytest.raises(UserError, match="patch 0: must be at least 1"):
        Patch(0)


def test_mixing_puts_even_channels_before_odd_ones():
    z = torch.arange(5.0).view(1, 1, 5)
    assert Order(5, mix=1)(z).flatten().tolist() == [0, 2, 4, 1, 3]
    assert Order(5, mix=2)(z).flatten().tolist() == [0, 4, 3, 2, 1]
