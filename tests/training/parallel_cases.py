"""The work of the processes of test_parallel.py, which import this file again."""

import functools
import gc
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from helpers import FLOW, TRUNK, stack
from tarflowlm import chunks
from tarflowlm.config import DataConfig, OptimConfig, RunConfig, TokenizerConfig, TrainConfig
from tarflowlm.errors import Progress
from tarflowlm.model import seeded
from tarflowlm.model_config import BaselineConfig, FlowConfig
from tarflowlm.processes import Processes, launched
from tarflowlm.training import train as training
from tarflowlm.training.optim import build_optimizers, norms, take_step
from tarflowlm.training.parallel import compiling, parallelise
from tarflowlm.training.train import accumulate_gradients, train

MODES = ("ddp", "fsdp")
COMMON = ("ar", "mixd")
RARE = ("patches", "one-channel", "narrow", "idle")
STOP_AT = 7
"""Inside the second of three stages, two steps after a checkpoint."""
POISONED = "prior.blocks.1.coupling.head.biases.0"


def runs(source: str, mode: str = "ddp") -> dict[str, RunConfig]:
    """Every family of presets, 10 steps each; the progressive ones in three stages. Muon needs
    whole matrices, so that FSDP2 takes AdamW.
    """
    # with one channel, heads have empty parameters
    one_channel = replace(
        FLOW, latent_dim=1, blocks=stack(("mix1", "affine", "mix1"), (1, 1, 1), (3, 1, 2))
    )
    staged = TrainConfig(
        precision="float32",
        stage_steps=(5, 3, 2),
        batch_size=4,
        log_every=1,
        evaluate_every=5,
        evaluate_windows=3,
        checkpoint_every=100,
        test_windows=3,
        parallel=mode,
        keep_idle=True,
    )
    optim = OptimConfig(optimizer="muon" if mode == "ddp" else "adamw")
    joint = replace(staged, mode="joint", stage_steps=(10,))
    # block 2 leaves the model, and block 3 takes its place
    idle = replace(staged, stage_steps=(5, 0, 5), keep="last", keep_idle=False)
    compiled = replace(staged, tokens_at_once=16, checkpoint_activations=True, compile=True)

    def run(model: FlowConfig | BaselineConfig, train: TrainConfig) -> RunConfig:
        data = DataConfig(source=source, tokenizer=TokenizerConfig())
        return RunConfig(name="tiny", model=model, train=train, data=data, optim=optim)

    return {
        "ar": run(BaselineConfig(context=16, trunk=TRUNK, layers=2), joint),
        "mixd": run(FLOW, staged),
        "patches": run(replace(FLOW, patch=2), compiled),
        "one-channel": run(one_channel, joint),
        "idle": run(FLOW, idle),
        "narrow": run(FLOW, replace(compiled, precision="bfloat16")),
    }


def dtype_of(run: RunConfig) -> torch.dtype:
    return torch.float64 if run.train.precision == "float32" else torch.float32


class Stop(Exception):
    pass


class Stopper(Progress):
    def __init__(self) -> None:
        self.steps, self.training = 0, False

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self.training = name.startswith("stage")

    def advance(self, count: int = 1) -> None:
        self.steps += self.training
        if self.steps == STOP_AT:
            raise Stop


def work(rank: int, ports: tuple[int, int], source: str, out: Path, names: tuple[str, ...]) -> None:
    """Two processes train the runs of these names, and one run that is cut short; four resume it,
    in a group that another program has made. If patches are trained, a third compiles meanwhile.

    They evaluate as many windows at once as there are processes.
    """
    gc.freeze()  # training collects garbage once a stage, and need not go through PyTorch's modules
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.compile = functools.partial(torch.compile, backend="eager")
    if rank == 2 and "patches" in names:
        compile_layers(runs(source)["patches"], out / "compiled.json")
    chunks.EVALUATED_TOKENS = 1
    if rank < 2:
        join(rank, 2, ports[0])
        with launched(torch.device("cpu")) as processes:
            train_all(processes, source, out, names)
    address = f"tcp://127.0.0.1:{ports[1]}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=4)
    with launched(torch.device("cpu")) as processes:
        for mode in MODES:
            train(None, out / f"cut-{mode}-4", device=processes.device, processes=processes)
    assert dist.is_initialized(), "the group is its maker's"
    gc.collect()
    dist.destroy_process_group()


def join(rank: int, world: int, port: int) -> None:
    """Set the environment as torchrun would."""
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_PORT": port,
        "MASTER_ADDR": "127.0.0.1",
    }
    os.environ.update({name: str(value) for name, value in names.items()})


def train_all(processes: Processes, source: str, out: Path, names: tuple[str, ...]) -> None:
    options = {"device": processes.device, "processes": processes}
    for mode in MODES:
        for name in names:
            run = runs(source, mode)[name]
            torch.set_default_dtype(dtype_of(run))
            train(run, out / f"{name}-{mode}", **options)
        torch.set_default_dtype(torch.float64)
        run = runs(source, mode)["mixd"]
        try:
            interrupted = replace(run, train=replace(run.train, checkpoint_every=4))
            train(interrupted, out / f"cut-{mode}", reporter=Stopper(), **options)
        except Stop:
            if processes.world > 1:
                torch.distributed.barrier()
        if processes.first:
            shutil.copytree(out / f"cut-{mode}", out / f"cut-{mode}-4")
            shutil.copytree(out / f"cut-{mode}", out / f"cut-{mode}-1")
        diverge(processes, run, out / f"diverged-{mode}")


def diverge(processes: Processes, run: RunConfig, out: Path) -> None:
    """A parameter of block 2 becomes NaN as its stage begins."""
    train_stage = training.train_stage

    def poisoned(started):
        for name, parameter in started.model.named_parameters():
            if name == POISONED:
                parameter.data.fill_(torch.nan)
        return train_stage(started)

    training.train_stage = poisoned
    run = replace(run, train=replace(run.train, stage_steps=(1, 1, 1)))
    try:
        train(run, out, device=processes.device, processes=processes)
    except FloatingPointError as error:
        out.with_name(f"{out.name}-{processes.rank}.txt").write_text(str(error), encoding="utf-8")
    finally:
        training.train_stage = train_stage


def compile_layers(run: RunConfig, report: Path) -> None:
    """Steps and bounds of a stage without compiled layers, and with them; the nodes of new graphs,
    by batch size.
    """
    # importing the compiler takes a second
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    blocks, counted = stack(("mixd", "mix1", "mix1"), (2, 3, 1), (0, 2, 2)), list[int]()
    run = replace(run, model=replace(run.model, vocab_size=5, blocks=blocks))

    def count(graph, inputs):
        counted.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch.compile, results = (
        functools.partial(torch.compile, backend=aot_autograd(fw_compiler=count)),
        [[], []],
    )
    for compiled in (False, True):
        with seeded(0):
            model, generator = run.model_of_stage(1).build(), torch.Generator().manual_seed(1)
        model.train_only(1)
        train, nodes = replace(run.train, tokens_at_once=0, dropout=0.3), []
        bound = parallelise(model, train, frozen=1, compiled=compiled)
        optimizers = build_optimizers(run.optim, model)
        for size in (4, 32, 4, 5):
            tokens = torch.randint(5, (size, 16), generator=generator)
            model.train()
            with compiling(compiled):
                loss = accumulate_gradients(model, bound, tokens, generator, train)
            trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
            norm = norms({name: p.grad for name, p in trained.items()}).norm()
            take_step(optimizers, trained, norm, lr=run.optim.lr, grad_clip=run.optim.grad_clip)
            model.eval()
            with compiling(compiled), torch.no_grad():
                noise = model.draw_noise(tokens, torch.Generator().manual_seed(0))
                evaluated = model.bound(tokens, noise).mean()
            results[compiled] += [loss.item(), norm.item(), evaluated.item()]
            nodes.append(counted.copy())
            counted.clear()
    report.write_text(json.dumps({"results": results, "nodes": nodes}), encoding="utf-8")
