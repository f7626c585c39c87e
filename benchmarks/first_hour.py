"""The first hour on a GPU: what docs/scaling.md expects and what this machine does, side by side.

    python benchmarks/first_hour.py > first_hour.json      # on one GPU; please report the file
    python benchmarks/first_hour.py --tiny                 # in a minute, on a CPU

It needs no text: every stage of owt-ar and owt-mixd takes steps on random tokens, and both models
write. They are new, which costs most: near components are many until the codebook has parted.
"""

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from tarflowlm.generation import generate
from tarflowlm.model import seeded
from tarflowlm.model_config import TransformerConfig
from tarflowlm.presets import preset
from tarflowlm.runs.checkpoint import Checkpoint
from training import training_step

EXPECTED = {
    "owt-ar stage 1": {"tokens/s": (200_000, 400_000), "waits": (0, 0), "GB": (15, 70)},
    "owt-mixd stage 1": {"tokens/s": (220_000, 420_000), "waits": (0, 12), "GB": (12, 60)},
    "owt-mixd stage 2": {"tokens/s": (150_000, 260_000), "waits": (0, 16), "GB": (8, 40)},
    "owt-mixd stage 3": {"tokens/s": (150_000, 260_000), "waits": (0, 16), "GB": (8, 40)},
    "owt-ar writes": {"tokens/s": (15_000, 42_000)},
    "owt-mixd writes": {"tokens/s": (400, 18_000)},
}
"""Least and most on an H100, by arithmetic; waits and memory are those of a step."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAIT: Any = torch.cuda.synchronize if DEVICE.type == "cuda" else bool
MODE: Any = torch.cuda.set_sync_debug_mode if DEVICE.type == "cuda" else str
NAME = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"


def configuration(name: str, args: argparse.Namespace) -> Any:
    config = preset(name)
    train = replace(config.train, tokens_at_once=args.tokens_at_once)
    model = replace(config.model, vocab_size=50_258)
    if args.tiny:
        train = replace(train, batch_size=4, tokens_at_once=32)
        trunk = TransformerConfig(width=16, num_heads=2)
        model = replace(model, vocab_size=70, context=16, trunk=trunk)
    return replace(config, model=model, train=train)


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """Of one call, without what is queued before."""
    WAIT()
    start = time.perf_counter()
    for _ in range(times):
        work()
    WAIT()
    return (time.perf_counter() - start) / times


def waits(work: Callable[[], object]) -> Counter[str]:
    """How often the host waits for a GPU, by the file and line that CUDA's warnings name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MODE("warn")
        work()
        MODE("default")
    places = [one for one in caught if "synchroniz" in str(one.message)]
    return Counter(f"{Path(one.filename).name}:{one.lineno}" for one in places)


def trained(config: Any, stage: int, steps: int) -> dict[str, Any]:
    """What steps of a stage (0-based) cost."""
    step = training_step(config, stage, DEVICE)
    shape = (config.train.batch_size, config.model.context)
    tokens = torch.randint(config.model.vocab_size, shape, device=DEVICE)
    found = {"seconds of three first steps": 3 * seconds(lambda: step(tokens), 3)}
    found["tokens/s"] = tokens.numel() / seconds(lambda: step(tokens), steps)
    places = waits(lambda: step(tokens))
    if DEVICE.type == "cuda":
        found["GB"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    return found | {"waits": places.total(), "places": places}


def written(config: Any, length: int) -> dict[str, Any]:
    """The speed of 64 texts."""
    with seeded(0):
        model = config.model.build().eval()
    model = Checkpoint(model, cast(Any, None), config, {}, Path()).to(DEVICE).model
    work = partial(generate, model, num=64, num_tokens=length, generator=torch.Generator())
    return {"seconds of the first texts": seconds(work), "tokens/s": 64 * length / seconds(work)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tiny", action="store_true", help="small shapes, as a trial")
    options.add_argument("--steps", type=int, default=20, help="timed steps of a stage")
    options.add_argument("--tokens-at-once", type=int, default=65_536, help="less for less memory")
    args = options.parse_args()
    found = {}
    for name in ("owt-ar", "owt-mixd"):
        config = configuration(name, args)
        for stage in range(config.num_stages):
            label = f"{name} stage {stage + 1}"
            print(label, file=sys.stderr)
            found[label] = trained(config, stage, args.steps)
        found[f"{name} writes"] = written(config, 8 if args.tiny else 128)
    rows = {label: {"expected": EXPECTED[label], "found": row} for label, row in found.items()}
    print(json.dumps({"device": NAME, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
