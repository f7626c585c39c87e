"""Literal types shared by options and functions. Imports nothing heavy, so `--help` stays fast."""

from typing import Literal

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
"""Where to run; `device.pick_device` resolves auto."""

Decoder = Literal["sequential", "parallel", "drafted", "auto"]
"""How a block is inverted: position by position, in parallel sweeps, by guesses of a draft that block 1 verifies
(block 1 of a model with a draft), or by the fastest of them, as measured."""

Decoding = Literal["mode", "drawn"]
"""Which token latents become: the most probable one of p(x|z), or one drawn from it."""

Scale = Literal["mini", "paper"]
"""Of `reproduce`: models that a CPU trains, or the published size."""

Precision = Literal["float32", "bfloat16"]
"""Of matrix products."""

RECIPE_NAMES = (
    "table2", "fig2", "fig3", "fig4", "fig5", "fig6", "fig7", "table6", "progressive", "patches", "one-block",
    "frontier",
)  # fmt: skip
"""The recipes of `reproduce`."""
