"""What the processes of test_parallel.py do; they import this file anew."""

import functools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from tarflowlm.training.distributed import Processes, launched
from tarflowlm.training.step import optimizer_step

from tarflowlm.baseline import BaselineConfig
from tarflowlm.config import RunConfig, TrainConfig
from tarflowlm.data import DataConfig
from tarflowlm.evaluation.likelihood import Likelihood
from tarflowlm.flow.transformer import TransformerConfig
from tarflowlm.language_model import seeded
from tarflowlm.model import FlowConfig, stack
from tarflowlm.training import lifecycle
from tarflowlm.training.guards import Guard
from tarflowlm.training.metrics import Reporter
from tarflowlm.training.optim import build_optimizers
from tarflowlm.training.parallel import Engine
from tarflowlm.training.run import Run

MODES = ("ddp", "fsdp")
STOP_AT = 14
"""Inside the second of three stages, two steps after a checkpoint."""
POISONED = "prior.blocks.1.coupling.head.biases.0"


def runs(source: str) -> dict[str, RunConfig]:
    """Every family of presets, 20 steps each; the progressive ones in three stages."""
    trunk = TransformerConfig(width=8, num_heads=2, mlp_ratio=2)
    flow = FlowConfig(
        context=16,
        latent_dim=3,
        trunk=trunk,
        blocks=stack(("mixd", "mix1", "mix1"), (1, 1, 1), (0, 2, 2)),
        head_hidden=4,
    )
    staged = TrainConfig(
        stage_steps=(10, 6, 4), batch_size=4, log_every=1, evaluate_every=10, evaluate_windows=3,
        checkpoint_every=100, test_windows=3,
    )  # fmt: skip
    joint = replace(staged, mode="joint", stage_steps=(20,))
    compiled = replace(staged, accumulate=2, checkpoint_activations=True, compile=True)

    def run(model: FlowConfig | BaselineConfig, train: TrainConfig) -> RunConfig:
        return RunConfig(name="tiny", model=model, train=train, data=DataConfig(source=source))

    one_channel = replace(flow, latent_dim=1, blocks=stack(("mix1", "affine", "mix1"), (1, 1, 1), (3, 1, 2)))
    return {
        "ar": run(BaselineConfig(context=16, trunk=trunk, layers=2), replace(joint, compile=True)),
        "affine": run(replace(flow, blocks=stack(("affine",) * 3, (1, 1, 1), (1, 1, 1))), joint),
        "mix1": run(replace(flow, blocks=stack(("mix1",) * 3, (1, 1, 1), (27, 2, 2))), joint),
        "mixd": run(flow, staged),
        "patches": run(replace(flow, patch=2), compiled),
        "one-channel": run(one_channel, replace(joint, stage_steps=(2,))),
    }


def interrupted(source: str) -> RunConfig:
    run = runs(source)["mixd"]
    return replace(run, train=replace(run.train, checkpoint_every=4))


class Stop(Exception):
    pass


class Stopper(Reporter):
    def __init__(self) -> None:
        self.steps = 0

    def step(self, num_tokens: int, share: float | None = None) -> None:
        self.steps += 1
        if self.steps == STOP_AT:
            raise Stop


def with_mode(run: RunConfig, mode: str) -> RunConfig:
    return replace(run, train=replace(run.train, parallel=mode))


def work(rank: int, ports: tuple[int, int], source: str, out: Path) -> None:
    """Two processes train every family, and one run that is cut short; four go on with that one."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.compile = functools.partial(torch.compile, backend="eager")
    if rank == 2:
        compile_all(source, out / "compiled.json")
    if rank < 2:
        join(rank, 2, ports[0])
        with launched(torch.device("cpu")) as processes:
            train_all(processes, source, out)
    join(rank, 4, ports[1])
    with launched(torch.device("cpu")) as processes:
        for mode in MODES:
            lifecycle.resume(out / f"cut-{mode}-4", device=processes.device, processes=processes)


COMPILED = ("joint", "upper stage")
COMPILED_HALF = ("ar", "affine", "mix1", "mixd stage 1", "mixd stage 2", "mixd stage 3", "patches stage 2")


def compile_all(source: str, report: Path) -> None:
    """Two steps with the loss compiled whole and without, for what the tests' shape checks keep from compiling: in
    float64, and, as the large presets train, in bfloat16 over float32."""
    every = runs(source)
    pair = {"blocks": stack(("mixd", "mix1"), (1, 1), (0, 2))}
    model = replace(every["mixd"].model, **pair)
    joint = replace(every["ar"], model=model, train=replace(every["ar"].train, checkpoint_activations=True))
    found = {name: compile_one(joint, frozen) for frozen, name in enumerate(COMPILED)}
    torch.set_default_dtype(torch.float32)
    for name in COMPILED_HALF:
        family, _, stage = name.partition(" stage ")
        frozen = int(stage or 1) - 1
        train = replace(every["ar"].train, precision="bfloat16")
        run = replace(every["ar"], model=every[family].model_of_stage(frozen), train=train)
        found[name] = compile_one(run, frozen)
    torch.set_default_dtype(torch.float64)
    report.write_text(json.dumps(found), encoding="utf-8")


def compile_one(run: RunConfig, frozen: int) -> dict[str, float]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (replace(run, train=replace(run.train, compile=compile)) for compile in (False, True))
    (left, weights), (right, others) = (steps_of(run, frozen=frozen) for run in (compiled, plain))
    counters = torch._dynamo.utils.counters
    return {
        "losses": max(abs(a - b) for a, b in zip(left, right, strict=True)),
        "weights": max((weights[key] - others[key]).abs().max().item() for key in weights if weights[key].numel()),
        "breaks": len(counters["graph_break"]),
        "graphs": counters["stats"]["unique_graphs"],
    }


def steps_of(run: RunConfig, *, frozen: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Two steps of a stage on random tokens: losses, and the weights after them."""
    config = replace(run.model, vocab_size=5)
    with seeded(0):
        model = config.build()
    model.train_only(frozen)
    engine, optimizers = Engine(model, run, frozen=frozen), build_optimizers(run.optim, model)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, (run.train.batch_size, config.context), generator=generator)
    taken = [optimizer_step(engine, optimizers, tokens, generator=generator)[0].item() for _ in range(2)]
    return taken, model.state_dict()


def join(rank: int, world: int, port: int) -> None:
    """What torchrun would say."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in names.items()})


def train_all(processes: Processes, source: str, out: Path) -> None:
    options = {"device": processes.device, "processes": processes}
    for mode in MODES:
        for name, run in runs(source).items():
            lifecycle.train(with_mode(run, mode), out / f"{name}-{mode}", **options)
        cut = out / f"cut-{mode}"
        try:
            lifecycle.train(with_mode(interrupted(source), mode), cut, reporter=Stopper(), **options)
        except Stop:
            processes.wait()
        if processes.first:
            shutil.copytree(cut, out / f"cut-{mode}-4")
            shutil.copytree(cut, out / f"cut-{mode}-1")
        half = replace(runs(source)["mixd"].train, stage_steps=(1, 1, 1), precision="bfloat16", parallel=mode)
        lifecycle.train(replace(runs(source)["mixd"], train=half), out / f"half-{mode}", **options)
        diverge(processes, source, out / f"diverged-{mode}", mode)
        left_out(processes, source, mode)


def left_out(processes: Processes, source: str, mode: str) -> None:
    """A deferred guard has the shards of all processes leave a step out: parameters and optimiser states stay."""
    run = with_mode(runs(source)["mixd"], mode)
    run = replace(run, model=replace(run.model, vocab_size=5))
    with seeded(0):
        model = run.model_of_stage(0).build()
    model.train_only(0)
    engine, optimizers = Engine(model, run, processes), build_optimizers(run.optim, model)
    tokens, guard = torch.zeros(2, run.model.context, dtype=torch.long), Guard(deferred=True)

    def held() -> list[torch.Tensor]:
        states = [t for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        return [getattr(t, "to_local", t.detach)().clone() for t in (*model.parameters(), *states)]

    def step() -> None:
        optimizer_step(engine, optimizers, tokens, generator=torch.Generator().manual_seed(0), guard=guard)

    step()
    before = held()
    backward = engine.backward

    def broken(*args: object) -> torch.Tensor:
        loss = backward(*args)  # type: ignore[arg-type]
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(torch.nan)
        return loss

    engine.backward = broken  # type: ignore[method-assign]
    step()
    engine.backward = backward  # type: ignore[method-assign]
    assert guard.found_inf == 1
    assert all(torch.equal(a, b) for a, b in zip(before, held(), strict=True))
    step()
    assert not all(torch.equal(a, b) for a, b in zip(before, held(), strict=True))


def diverge(processes: Processes, source: str, out: Path, mode: str) -> None:
    """A parameter of block 2 becomes NaN as its stage begins."""
    train_stage = lifecycle.train_stage
    run = runs(source)["mixd"]
    run = replace(run, train=replace(run.train, stage_steps=(1, 1, 1), max_skipped=0, parallel=mode))

    def poisoned(training: Run) -> Likelihood:
        for name, parameter in training.model.named_parameters():
            if name == POISONED:
                parameter.data.fill_(torch.nan)
        return train_stage(training)

    lifecycle.train_stage = poisoned
    try:
        lifecycle.train(run, out, device=processes.device, processes=processes)
    except FloatingPointError as error:
        out.with_name(f"{out.name}-{processes.rank}.txt").write_text(str(error), encoding="utf-8")
    finally:
        lifecycle.train_stage = train_stage
