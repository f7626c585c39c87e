"""Memory traffic of vocabulary-sized work on an accelerator, counted on a CPU, and resulting hours.

    python benchmarks/traffic.py                 # bytes per (token, component)
    python benchmarks/traffic.py --hours         # the table of docs/scaling.md: on 1, 8, 64 H100
    python benchmarks/traffic.py --nodes         # operations compiled for a step of owt-mixd

Every operation counts the bytes that it reads and writes, like a kernel without fusion; logsumexp
counts five passes. A map that accelerators compile counts its inputs and outputs, and long rows
twice, because they leave the registers between two sums. The accelerators' paths run on the CPU at
OpenWebText's vocabulary. The components that matter depend on the data, so the tensors hold values:
random codes with typical neighbours `--separation` standard deviations apart, 12 at the start of
training and 22 in a trained model of word pieces.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from launches import PRESETS, launches
from timing import show
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from tarflowlm import chunks, flow
from tarflowlm.config import RunConfig
from tarflowlm.evaluation.flops import training_flops
from tarflowlm.flow.codebook import typical_neighbour_distance
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.flow.numerics import (
    COMPILED,
    head_sums,
    log_normaliser,
    mixture,
    mixture_log_prob_from_features,
    rosenblatt,
)
from tarflowlm.presets import preset

VIEWS = (
    "view",
    "expand",
    "slice",
    "t",
    "transpose",
    "unsqueeze",
    "squeeze",
    "select",
    "split",
    "alias",
    "permute",
    "detach",
    "_unsafe_view",
    "as_strided",
    "empty",
    "unbind",
    "_reshape_alias",
    "new_empty",
    "empty_like",
)
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
COMPONENTS, CHANNELS, WIDTH = 50_257, 16, 768
BYTES = 2.8e12
"""Bytes per second of an H100's memory, of 3.35e12."""
BEST, WORST = (445e12, 3.0e12, 4e-6), (300e12, 2.4e12, 10e-6)
"""FLOP/s, 45 and 30 % of the dense bfloat16 peak; bytes per second; seconds of a launch."""
OVERHEAD, WITHIN, ACROSS = 6e-3, 300e9, 40e9
"""Seconds per step of clipping and optimiser; bytes per second of a gradient average, in and across
nodes.
"""
PART, SMALLER = 65_536, 12
"""Tokens at once of the paper's presets, and how much smaller a loss is counted."""


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, by operation, and their number."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.calls = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1].rstrip("_")
        if name not in VIEWS:
            again = 16 * args[0].numel() if name == "logsumexp" else 0
            self.count(name, (args, kwargs or {}), out, again)
        return out

    def count(self, name: str, inputs: Any, outputs: Any, again: int) -> None:
        read = {id(t): t for t in tree_iter(inputs) if isinstance(t, torch.Tensor)}
        written = [t for t in tree_iter(outputs) if isinstance(t, torch.Tensor)]
        # an expanded axis is only once in memory
        axes = [(t, zip(t.shape, t.stride(), strict=True)) for t in read.values()]
        size = sum(
            t.element_size() * math.prod(n for n, stride in pairs if stride) for t, pairs in axes
        )
        size += sum(t.element_size() * t.numel() for t in written)
        self.bytes[name] += size + again
        self.calls[name] += 1

    def fused(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, counted as one compiled kernel."""

        def call(*args: Any) -> Any:
            with _disable_current_modes():
                out = function(*args)
            rows = [t for t in args if isinstance(t, torch.Tensor) and t.ndim == 2]
            again = sum(4 * t.numel() for t in rows if t.shape[1] > 4096)
            self.count(function.__name__, args, out, again)
            return out

        return call


def as_accelerator() -> None:
    """Let a CPU take the paths of accelerators."""
    flow.is_eager_cpu = lambda t: False  # type: ignore[assignment]
    chunks.HELD_CPU = chunks.HELD_ACCELERATOR


def bytes_of_couplings(config: RunConfig, stage: int) -> float:
    """Bytes per token of the couplings of a stage, without products and Mix-d over the vocabulary.

    The lower blocks run forward, the last one its density. Trained blocks run backward, too.
    """
    as_accelerator()
    model = replace(config.model_of_stage(stage).first_blocks(stage + 1), vocab_size=64)
    if config.num_stages == 1:
        model = replace(config.model, vocab_size=64)
    total = 0.0
    for index, block in enumerate(model.build().prior.blocks):
        coupling = block.coupling
        if isinstance(coupling, MixDCoupling):
            continue
        coupling.maps = COMPILED
        trains = index >= stage
        is_last = index == len(model.blocks) - 1
        sizes = []
        for tokens in (256, 512):
            z = torch.randn(1, tokens, model.latent_dim, requires_grad=trains)
            features = torch.randn(1, tokens, model.trunk.width, requires_grad=trains)
            traffic = Traffic()
            mixture.compiled = traffic.fused  # type: ignore[assignment]
            with traffic, torch.set_grad_enabled(trains), torch.autocast("cpu", torch.bfloat16):
                if is_last:
                    result = coupling.log_prob(z, features).sum()
                else:
                    u, log_det = coupling(z, features)
                    result = u.square().sum() + log_det.sum()
            if trains:
                with traffic:
                    result.backward()
            products = sum(traffic.bytes[name] for name in PRODUCTS)
            sizes.append(sum(traffic.bytes.values()) - products)
        total += (sizes[1] - sizes[0]) / 256
    return total


def bytes_per_pair(args: argparse.Namespace, separation: float) -> dict[str, float]:
    """Bytes per (token, component) of every kind of vocabulary-sized work.

    The losses are those of a part of a step, with tokens, components, features and the sides of a
    tile `SMALLER`. Maps of all components are counted by what twice as many tokens take more, since
    a call does some work once.
    """
    as_accelerator()
    generator, found = torch.Generator().manual_seed(0), {}

    def case(tokens: int, components: int) -> tuple[torch.Tensor, ...]:
        width = WIDTH // SMALLER
        mean, weight = (torch.randn(components, n, generator=generator) for n in (CHANNELS, width))
        features, noise = (torch.randn(tokens, n, generator=generator) for n in (width, CHANNELS))
        log_w = features @ weight.mul_(3 * width**-0.5).T
        own = torch.distributions.Categorical(logits=log_w).sample()
        sigma = typical_neighbour_distance(mean) / separation
        log_std = torch.full((components,), math.log(sigma)).requires_grad_()
        z = (mean[own] + sigma * noise).requires_grad_()
        head = features.requires_grad_(), weight.requires_grad_(), torch.zeros(components)
        return z, *head, mean.requires_grad_(), log_std, own, log_w.detach()

    def counted(work: Callable[[], Any]) -> Counter[str]:
        traffic = Traffic()
        mixture.compiled = traffic.fused  # type: ignore[assignment]
        with traffic:
            work()
        return traffic.bytes

    small = case(PART // SMALLER, COMPONENTS // SMALLER)
    rows = torch.arange(PART // SMALLER)

    def loss() -> None:
        log_p = mixture_log_prob_from_features(*small[:6], relative=True, maps=COMPILED)
        log_p.sum().backward()

    def cross_entropy() -> None:
        total, chosen = head_sums(*small[1:4], rows, small[6], maps=COMPILED)
        (total - chosen).sum().backward()

    held = chunks.HELD_ACCELERATOR
    chunks.HELD_ACCELERATOR = chunks.HELD_CPU = held // SMALLER**2
    for name, work in {"loss of stage 1": loss, "cross-entropy": cross_entropy}.items():
        with torch.autocast("cpu", torch.bfloat16):
            size = counted(work)
        pairs = (PART // SMALLER) * (COMPONENTS // SMALLER)
        found[name] = {key: n / pairs for key, n in size.items()}
    chunks.HELD_ACCELERATOR = chunks.HELD_CPU = held
    z, *_, mean, log_std, _, log_w = case(2 * args.tokens, COMPONENTS)
    book = mean, log_std
    maps: dict[str, Callable[[int], Any]] = {
        "frozen map": torch.no_grad()(
            lambda count: rosenblatt(z[:count], log_w[:count], *book, maps=COMPILED)
        ),
        "normaliser": torch.no_grad()(lambda count: log_normaliser(z[:count], *book)),
        "normaliser, trained": lambda count: log_normaliser(z[:count], *book).sum().backward(),
    }
    for name, call in maps.items():
        size = counted(partial(call, 2 * args.tokens))
        size.subtract(counted(partial(call, args.tokens)))
        found[name] = {key: n / args.tokens / COMPONENTS for key, n in size.items()}
    for name, size in found.items():
        for operation, each in Counter(size).most_common(args.top):
            print(f"{name}: {operation:20} {each:8.1f}")
    return {name: sum(size.values()) for name, size in found.items()}


def hours(size: dict[str, float], trained: dict[str, float]) -> list[dict[str, Any]]:
    """A row for every stage of every preset of the paper's size, from bytes at the start of
    training and after it.
    """
    rows, counted = [], {row[""]: row for row in launches(PRESETS)}
    for name in PRESETS:
        config = preset(name)
        vocabulary = COMPONENTS if name.startswith("owt") else 27
        config = replace(config, model=replace(config.model, vocab_size=vocabulary))
        for stage in range(config.num_stages):
            if name.endswith("-ar"):
                work = size["cross-entropy"]
            elif name.endswith("-mixd"):
                # the head's logits, in bfloat16 and float32, are part of the map
                work = (
                    trained["frozen map"] + trained["normaliser"] + 8
                    if stage
                    else size["loss of stage 1"]
                )
            else:
                work = size["normaliser, trained"]
            model, context = config.model_of_stage(stage), config.model.context
            flops, traffic = training_flops(model, frozen=stage) / context, work * vocabulary
            if not name.endswith("-ar"):
                traffic += bytes_of_couplings(config, stage)
            if vocabulary == COMPONENTS and not stage:
                # the backward pass computes the logits again, if all components are taken
                flops += 2 * vocabulary * config.model.trunk.width * (name[-2:] in ("ar", "xd"))
            label = name if config.num_stages == 1 else f"{name} {stage + 1}"
            row: dict[str, Any] = {"": label}
            row |= {"GFLOP per token": flops / 1e9, "MB per token": traffic / 1e6}
            of_part, of_eighth = (counted[label][f"launches{n}"] for n in ("", " of an eighth"))
            each = (of_part - of_eighth) / (PART * 7 / 8)
            for world in (1, 8, 64):
                tokens = config.train.batch_size * context / world
                parts = math.ceil(tokens / PART)
                number = parts * (of_part - each * PART) + each * tokens
                found = []
                for of_flops, of_bytes, of_launch in (BEST, WORST):
                    work = tokens * (flops / of_flops + traffic / of_bytes)
                    # a gradient of 0.12 B float32 numbers is averaged during two thirds of the work
                    average = (
                        0 if world == 1 else 2 * 4 * 0.12e9 / (WITHIN if world <= 8 else ACROSS)
                    )
                    seconds = max(work, number * of_launch) + OVERHEAD
                    seconds += max(0, average - 2 / 3 * work)
                    found.append(config.train.stage_steps[stage] * seconds / 3600)
                row[f"hours on {world}"] = " to ".join(f"{x:.2g}" for x in found)
            rows.append(row)
    return rows


def nodes() -> list[dict[str, Any]]:
    """Operations (aten nodes) of all graphs that steps of `owt-mixd` compile, by sequences; the
    model is as deep, but small.
    """
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    from tarflowlm.model import seeded
    from tarflowlm.model_config import TransformerConfig
    from tarflowlm.training.parallel import compiling, parallelise
    from tarflowlm.training.train import accumulate_gradients

    rows, config, counted = [], preset("owt-mixd"), list[int]()

    def count(graph: Any, _inputs: Any) -> Any:
        counted.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch.compile = partial(torch.compile, backend=aot_autograd(fw_compiler=count))  # type: ignore[assignment]
    model = replace(
        config.model, vocab_size=31, context=32, trunk=TransformerConfig(width=16, num_heads=2)
    )
    config = replace(config, model=model, train=replace(config.train, tokens_at_once=0))
    with seeded(0):
        trained = config.model_of_stage(0).build()
    bound = parallelise(trained, config.train, compiled=True)
    generator = torch.Generator().manual_seed(0)
    for sequences in (4, 32):
        torch._dynamo.reset()
        counted.clear()
        tokens = torch.randint(31, (sequences, 32))
        with compiling(True):
            accumulate_gradients(trained, bound, tokens, generator, config.train)
        rows.append({"sequences": sequences, "graphs": len(counted), "nodes": sum(counted)})
    return rows


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--tokens", type=int, default=334)
    options.add_argument("--separation", type=float, nargs="+", default=[12.0, 22.0])
    options.add_argument("--top", type=int, default=0, help="operations to list")
    options.add_argument("--hours", action="store_true", help="of the paper's presets")
    options.add_argument("--nodes", action="store_true", help="of compiled graphs")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    args = options.parse_args()
    if args.nodes:
        show(args, nodes())
        return
    if args.hours:
        show(args, hours(*(bytes_per_pair(args, s) for s in args.separation)))
        return
    show(args, [{"": f"separation {s:g}"} | bytes_per_pair(args, s) for s in args.separation])


if __name__ == "__main__":
    main()
