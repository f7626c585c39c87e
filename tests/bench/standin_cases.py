"""What `test_standin.py` runs in a process of its own, for the device that stands in for a GPU becomes the
accelerator of its whole process. Every function returns plain values, or raises."""

import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tarflowlm.baseline import BaselineConfig, TokenLM
from tarflowlm.bench.sizes import measured, stage_size
from tarflowlm.bench.standin import fake_tensors, to_fake
from tarflowlm.flow.transformer import TransformerConfig
from tarflowlm.objective import conditional_bound, elbo, negative_bound
from tarflowlm.runs.config import RunConfig
from tarflowlm.runs.presets import preset
from tarflowlm.training.optim import build_optimizers
from tarflowlm.training.parallel import Engine
from tarflowlm.training.step import optimizer_step

PRESETS = ("quickstart", "mini-mixd-p2", "text8-ar", "text8-affine", "text8-mix1", "text8-mixd")
"""Every family, progressive and joint, patches, both precisions."""
ROWS = 1024
"""Of a sampling step. Fewer are inverted together, and the host looks whether the last change was small enough."""


def told(function: Callable[..., Any], *args: Any) -> Any:
    """The function's result; of an exception, its traceback in words, for some of PyTorch's do not travel."""
    try:
        return function(*args)
    except Exception:
        raise RuntimeError(traceback.format_exc()) from None


def small(name: str, **fields: Any) -> RunConfig:
    """A preset cut down in width, depth, context and vocabulary; its family, couplings and stages as they are."""
    run = preset(name)
    model: Any = run.model
    trunk = TransformerConfig(width=32, num_heads=2)
    model = replace(model, vocab_size=27, context=16, trunk=trunk, **fields)
    if isinstance(model, BaselineConfig):
        model = replace(model, layers=1)
    else:
        model = replace(model, latent_dim=4, blocks=tuple(replace(block, layers=1) for block in model.blocks))
    return replace(run, model=model, train=replace(run.train, batch_size=2))


def stages() -> list[tuple[str, int]]:
    return [(name, stage) for name in PRESETS for stage in range(preset(name).num_stages)]


def train(name: str, stage: int, optimizer: str, checkpointed: bool, misplaced: bool = False) -> set[str]:
    """One optimiser step, and a second one with the states that the first made; the devices of all that it made."""
    run = small(name)
    train_config = replace(run.train, checkpoint_activations=checkpointed)
    run = replace(run, train=train_config, optim=replace(run.optim, optimizer=optimizer))
    with torch.device("meta"):
        model = run.model_of_stage(stage).build()
    with fake_tensors() as place:
        to_fake(model, place).train_only(stage)
        if misplaced:
            model.prior.blocks[0].start = torch.nn.Parameter(torch.empty(32))
        engine, optimizers = Engine(model, run, frozen=stage), build_optimizers(run.optim, model)
        tokens = torch.zeros(2, 16, dtype=torch.long, device=place)
        made = []
        for _ in range(2):
            made += optimizer_step(engine, optimizers, tokens, generator=None)
        made += [v for o in optimizers for state in o.state.values() for n, v in state.items() if n != "step"]
        return {tensor.device.type for tensor in made}


def evaluate(name: str, stage: int) -> set[str]:
    """The bounds without gradients, and their parts."""
    with torch.device("meta"):
        model = small(name).model_of_stage(stage).build()
    with fake_tensors() as place, torch.no_grad():
        to_fake(model, place)
        tokens = torch.zeros(2, 16, dtype=torch.long, device=place)
        made = [negative_bound(model, tokens, frozen=stage)]
        if isinstance(model, TokenLM) or model.num_blocks == 1:
            made.append(conditional_bound(model, tokens, 8))
        if not isinstance(model, TokenLM):
            terms = elbo(model, tokens)
            made += [terms.nelbo, terms.log_prior]
        return {tensor.device.type for tensor in made}


def sample(name: str) -> set[str]:
    """Two positions of every block, the second with what the first left in the cache."""
    with torch.device("meta"):
        model = small(name).model.build()
    made = []
    with fake_tensors() as place, torch.no_grad():
        to_fake(model, place)
        P = model.config.patch
        if isinstance(model, TokenLM):
            cache = model.allocate_cache(ROWS, 4)
            previous = None
            for _ in range(2):
                features = model.features_at(cache, previous, ROWS)
                previous = torch.zeros(ROWS, P, dtype=torch.long, device=place)
                made.append(model.patch_logits(features[:, None], previous))
            return {tensor.device.type for tensor in made}
        for block in model.prior.blocks:
            cache = block.allocate_cache(ROWS, 4)
            previous = None
            for _ in range(2):
                noise = torch.zeros(ROWS, P * model.config.latent_dim, device=place)
                previous = block.coupling.invert(noise, block.features_at(cache, previous, ROWS))
                made.append(previous)
        made.append(model.codebook.decode(previous.view(ROWS, P, -1)))
    return {tensor.device.type for tensor in made}


def read_a_number() -> None:
    with fake_tensors() as place:
        torch.zeros(2, device=place).sum().item()


def held(name: str, world: int) -> dict[str, int]:
    """What a process holds between steps, and the usage of a step."""
    what, usage = measured(small(name), 0, world, (2,))
    return vars(what) | {"end": usage.end, "peak": usage.peak}


def row(name: str) -> dict[str, Any]:
    run = small(name)
    return stage_size(replace(run, train=replace(run.train, batch_size=512)), 0, memory=0.02, worlds=(1, 2, 4))
