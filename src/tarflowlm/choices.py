"""Closed sets of values that both options and functions name. Imports nothing, so that `--help` stays quick."""

from typing import Literal

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
"""Where to run; auto is resolved by `device.pick_device`."""

Decoder = Literal["sequential", "parallel", "auto"]
"""How a block is inverted: position by position, in parallel sweeps, or whichever is measured to be quicker."""
