"""The work of the processes of test_parallel.py, which import this file anew."""

import functools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from tarflowlm.config import (
    BaselineConfig,
    DataConfig,
    FlowConfig,
    RunConfig,
    TrainConfig,
    TransformerConfig,
    stack,
)
from tarflowlm.language_model import seeded
from tarflowlm.training import train as training
from tarflowlm.training.loop import optimizer_step
from tarflowlm.training.metrics import Reporter
from tarflowlm.training.optim import build_optimizers
from tarflowlm.training.parallel import ParallelModel, Processes, launched
from tarflowlm.training.train import resume, train

MODES = ("ddp", "fsdp")
STOP_AT = 7
"""Inside the second of three stages, two steps after a checkpoint."""
POISONED = "prior.blocks.1.coupling.head.biases.0"


def runs(source: str) -> dict[str, RunConfig]:
    """Every family of presets, 10 steps each; the progressive ones in three stages."""
    trunk = TransformerConfig(width=8, num_heads=2, mlp_ratio=2)
    blocks = stack(("mixd", "mix1", "mix1"), (1, 1, 1), (0, 2, 2))
    flow = FlowConfig(context=16, latent_dim=3, trunk=trunk, blocks=blocks, head_hidden=4)
    # with one channel, heads have empty parameters
    one_channel = replace(flow, latent_dim=1, blocks=stack(("mix1", "affine", "mix1"), (1, 1, 1), (3, 1, 2)))
    staged = TrainConfig(
        stage_steps=(5, 3, 2), batch_size=4, log_every=1, evaluate_every=5, evaluate_windows=3,
        checkpoint_every=100, test_windows=3,
    )  # fmt: skip
    joint = replace(staged, mode="joint", stage_steps=(10,))
    compiled = replace(staged, accumulate=2, checkpoint_activations=True, compile=True)

    def run(model: FlowConfig | BaselineConfig, train: TrainConfig) -> RunConfig:
        return RunConfig(name="tiny", model=model, train=train, data=DataConfig(source=source))

    return {
        "ar": run(BaselineConfig(context=16, trunk=trunk, layers=2), replace(joint, compile=True)),
        "mixd": run(flow, staged),
        "patches": run(replace(flow, patch=2), compiled),
        "one-channel": run(one_channel, joint),
    }


class Stop(Exception):
    pass


class Stopper(Reporter):
    def __init__(self) -> None:
        self.steps, self.training = 0, False

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self.training = name.startswith("stage")

    def advance(self, count: int = 1) -> None:
        self.steps += self.training
        if self.steps == STOP_AT:
            raise Stop


def work(rank: int, ports: tuple[int, int], source: str, out: Path) -> None:
    """Two processes train every family, and one run that is cut short; four resume it. A third compiles meanwhile."""
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
            resume(out / f"cut-{mode}-4", device=processes.device, processes=processes)


def join(rank: int, world: int, port: int) -> None:
    """Set the environment as torchrun would."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in names.items()})


def train_all(processes: Processes, source: str, out: Path) -> None:
    options = {"device": processes.device, "processes": processes}
    for mode in MODES:
        for name, run in runs(source).items():
            train(replace(run, train=replace(run.train, parallel=mode)), out / f"{name}-{mode}", **options)
        run = runs(source)["mixd"]
        run = replace(run, train=replace(run.train, parallel=mode))
        try:
            interrupted = replace(run, train=replace(run.train, checkpoint_every=4))
            train(interrupted, out / f"cut-{mode}", reporter=Stopper(), **options)
        except Stop:
            processes.wait()
        if processes.first:
            shutil.copytree(out / f"cut-{mode}", out / f"cut-{mode}-4")
            shutil.copytree(out / f"cut-{mode}", out / f"cut-{mode}-1")
        diverge(processes, run, out / f"diverged-{mode}")


def diverge(processes: Processes, run: RunConfig, out: Path) -> None:
    """A parameter of block 2 becomes NaN as its stage begins."""
    train_stage = training.train_stage

    def poisoned(in_progress):
        for name, parameter in in_progress.model.named_parameters():
            if name == POISONED:
                parameter.data.fill_(torch.nan)
        return train_stage(in_progress)

    training.train_stage = poisoned
    run = replace(run, train=replace(run.train, stage_steps=(1, 1, 1), max_skipped=0))
    try:
        train(run, out, device=processes.device, processes=processes)
    except FloatingPointError as error:
        out.with_name(f"{out.name}-{processes.rank}.txt").write_text(str(error), encoding="utf-8")
    finally:
        training.train_stage = train_stage


COMPILED = ("joint", "upper stage", "ar", "one-channel", "mixd stage 3", "patches stage 2")
"""The first two in float64, the others, as the large presets train, in bfloat16 over float32."""


def compile_all(source: str, report: Path) -> None:
    """Two steps with the loss compiled as a whole and without. (The tests' shape checks cannot be compiled.)"""
    every, found = runs(source), {}
    pair = replace(every["mixd"].model, blocks=stack(("mixd", "mix1"), (1, 1), (0, 2)))
    joint = replace(every["ar"], model=pair, train=replace(every["ar"].train, checkpoint_activations=True))
    for name in COMPILED:
        family, _, stage = name.partition(" stage")
        if family in every:
            torch.set_default_dtype(torch.float32)
            frozen = int(stage or 1) - 1
            train = replace(every["ar"].train, precision="bfloat16")
            run = replace(every["ar"], model=every[family].model_of_stage(frozen), train=train)
            found[name] = compile_one(run, frozen)
        else:
            found[name] = compile_one(joint, COMPILED.index(name))
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
    parallel_model, optimizers = ParallelModel(model, run, frozen=frozen), build_optimizers(run.optim, model)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, (run.train.batch_size, config.context), generator=generator)
    taken = [optimizer_step(parallel_model, optimizers, tokens, generator=generator).loss.item() for _ in range(2)]
    return taken, model.state_dict()
