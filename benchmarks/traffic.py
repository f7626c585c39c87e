"""Memory traffic of the vocabulary-sized work on an accelerator, in bytes per (token, component), counted here.

    python benchmarks/traffic.py                                   # the loss of stage 1, and the frozen map of stages 2, 3

Every operation counts what it reads and writes, as kernels without fusion do: a reduction its input, logsumexp five
passes. The accelerators' paths run on the CPU, at OpenWebText's vocabulary, with codes as far apart as at the start of
training (12 standard deviations between typical neighbours) and as wide as 8.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tarflowlm.flow.codebook import typical_neighbour_distance
from tarflowlm.flow.numerics import layout, mixture_log_prob, mixture_log_prob_from_features, rosenblatt

VIEWS = (
    "view", "expand", "slice", "t", "transpose", "unsqueeze", "squeeze", "select", "split", "alias", "permute", "detach",
    "_unsafe_view", "as_strided", "empty", "unbind", "_reshape_alias", "new_empty", "empty_like", "split_with_sizes",
)  # fmt: skip
COMPONENTS, CHANNELS, WIDTH = 50_257, 16, 768


class Traffic(TorchDispatchMode):
    """Bytes that operations on at least `smallest` elements read and write, by operation, and their number."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest, self.bytes, self.calls = smallest, Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1].rstrip("_")
        tensors = {id(t): t for t in tree_iter((args, kwargs or {})) if isinstance(t, torch.Tensor)}
        results = [t for t in tree_iter(out) if isinstance(t, torch.Tensor)]
        if name in VIEWS:
            return out
        read = sum(t.element_size() * real_elements(t) for t in tensors.values())
        written = sum(t.element_size() * t.numel() for t in results)
        extra = 16 * args[0].numel() if name == "logsumexp" else 0
        if max((t.numel() for t in [*tensors.values(), *results]), default=0) >= self.smallest:
            self.bytes[name] += read + written + extra
            self.calls[name] += 1
        return out


def real_elements(t: torch.Tensor) -> int:
    """Elements of t in memory: an expanded axis counts once."""
    return math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride)


def count(label: str, run: Callable[[], object], tokens: int, top: int) -> None:
    with Traffic(0) as traffic:
        run()
    pairs = tokens * COMPONENTS
    print(f"{label}: {sum(traffic.bytes.values()) / pairs:.0f} bytes, {sum(traffic.calls.values())} operations")
    for name, size in traffic.bytes.most_common(top):
        print(f"    {name:20} {size / pairs:8.1f}  x{traffic.calls[name]}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--separation", type=float, nargs="+", default=[12.0, 8.0])
    options.add_argument("--top", type=int, default=0, help="operations to list")
    args = options.parse_args()
    layout.use_eager_cpu = lambda t: False  # type: ignore[assignment]
    layout.HELD_ELEMENTS["cpu"] = layout.HELD_ELEMENTS_ACCELERATOR
    generator = torch.Generator().manual_seed(0)
    mean, weight = (torch.randn(COMPONENTS, n, generator=generator) for n in (CHANNELS, WIDTH))
    features, noise = (torch.randn(args.tokens, n, generator=generator) for n in (WIDTH, CHANNELS))
    weight = weight.mul_(3 * WIDTH**-0.5)
    tokens = torch.distributions.Categorical(logits=features @ weight.T).sample()
    for separation in args.separation:
        sigma = typical_neighbour_distance(mean) / separation
        z, log_std = mean[tokens] + sigma * noise, torch.full((COMPONENTS,), math.log(sigma))
        leaves = [t.clone().requires_grad_() for t in (z, features, weight, torch.zeros(COMPONENTS), mean, log_std)]

        def loss() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                log_p = mixture_log_prob_from_features(*leaves, relative=True)  # noqa: B023
            log_p.mean().backward()

        print(f"separation {separation:g}, scale {sigma:.3f}")
        count("  loss of stage 1, with gradients", loss, args.tokens, args.top)
        log_w = features @ weight.T
        with torch.no_grad():
            count("  frozen map of stages 2 and 3", lambda: rosenblatt(z, log_w, mean, log_std), args.tokens, args.top)  # noqa: B023
            count("  decoder's normaliser", lambda: mixture_log_prob(z, None, mean, log_std), args.tokens, args.top)  # noqa: B023


if __name__ == "__main__":
    main()
