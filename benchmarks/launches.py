"""Launches of an accelerator and waits of the host in a part of a training step, without one.

    python benchmarks/launches.py
    python benchmarks/launches.py mini-passes owt-mixd

They are counted on tests/pretend_device.py. The models are as deep as the presets, but small. A
vocabulary of 1,024 comes in as many chunks as 50,257 tokens. Operations of Transformer layers are
not compiled. `benchmarks/generation.py --count` counts what a written token costs.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import show

from tarflowlm import chunks
from tarflowlm.flow.numerics import choose_maps, mixture
from tarflowlm.model import seeded
from tarflowlm.model_config import FlowConfig
from tarflowlm.presets import preset
from tarflowlm.training.parallel import parallelise
from tarflowlm.training.train import accumulate_gradients

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from pretend_device import pretend

KINDS = ("ar", "affine", "mix1", "mixd")
PRESETS = [f"{text}-{kind}" for text in ("text8", "owt") for kind in KINDS]
FEW = 1_024
"""Tokens that stand for the 65,536 of a part of a step."""
KERNELS = 4
"""Launches of a compiled map, to which PyTorch's compiler joins some twenty operations."""
HELD, LOGITS = chunks.HELD_ACCELERATOR, chunks.LOGITS


def launches(names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for every stage: launches and waits of a part of a step, as many tokens as chunks of
    65,536 tokens, and of an eighth of it.
    """
    counts: list[Any] = []

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose launches are counted as those of `KERNELS`."""

        def call(*args: Any) -> Any:
            before = counts[-1].launches.copy()
            out = function(*args)
            counts[-1].launches.clear()
            counts[-1].launches.update(before, compiled=KERNELS)
            return out

        return call

    rows = []
    for name in names:
        config = preset(name)
        vocab_size, share = 27, 1.0
        if name.startswith("owt"):
            vocab_size = 1024
            share = vocab_size * FEW / 50_257 / 65_536
        chunks.HELD_ACCELERATOR = int(HELD * share)
        chunks.LOGITS = int(LOGITS * share)
        trunk = replace(config.model.trunk, width=16, num_heads=2)
        model = replace(config.model, vocab_size=vocab_size, context=64, trunk=trunk)
        if isinstance(model, FlowConfig):
            model = replace(model, head_hidden=4)
        train = replace(config.train, tokens_at_once=0, precision="float32", compile=False)
        config = replace(config, model=model, train=train)
        for stage in range(config.num_stages):
            row: dict[str, Any] = {"": name if config.num_stages == 1 else f"{name} {stage + 1}"}
            with seeded(0):
                built = config.model_of_stage(stage).build()
            built.train_only(stage)
            with pretend("cuda") as gpu:
                mixture.compiled = compiled  # type: ignore[assignment]
                there = built.to("cuda")
                bound = parallelise(there, train, frozen=stage)
                choose_maps(there, compiled=True)
                generator = torch.Generator(device="cuda").manual_seed(0)
                for part, number in (("", FEW), (" of an eighth", FEW // 8)):
                    tokens = torch.randint(0, vocab_size, (number // 64, 64)).to("cuda")
                    there.zero_grad()
                    with gpu.counting() as counted:
                        counts.append(counted)
                        accumulate_gradients(there, bound, tokens, generator, train)
                    row[f"launches{part}"] = counted.num_launches
                    row[f"waits{part}"] = counted.num_waits
            rows.append(row)
    return rows


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("presets", nargs="*", default=["mini-ar", "mini-mixd", *PRESETS])
    options.add_argument("--json", action="store_true", help="print one JSON object")
    args = options.parse_args()
    show(args, launches(args.presets))


if __name__ == "__main__":
    main()
