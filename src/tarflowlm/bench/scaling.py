"""Scaling: the same global batch in one process and in two, with DDP and FSDP2 over gloo, one thread each."""

import os
import socket
import statistics
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from tarflowlm.bench.measure import seconds_per_call
from tarflowlm.runs.config import RunConfig
from tarflowlm.training.distributed import Processes, launched
from tarflowlm.training.step import TrainingStep


def scaling(
    runs: list[RunConfig],
    vocab_size: int,
    *,
    rounds: int,
    steps: int,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[dict[str, Any]]:
    """Rows {"name", "tokens_per_second", "ratio"} of each run; the ratio is to one process.

    Medians over `rounds` of `steps` optimiser steps each. `progress` gets the process counts done and their total.
    """
    runs = [replace(run, model=replace(run.model, vocab_size=vocab_size)) for run in runs]
    context = get_context("spawn")
    seconds = {}
    for world in (1, 2):
        progress(world - 1, 2)
        answers = context.SimpleQueue()
        arguments = (world, _free_port(), runs, rounds, steps, device.type, answers)
        spawn(_time_in_process, arguments, nprocs=world)
        seconds.update(answers.get())
    rows = []
    for run in runs:
        alone = seconds[run.name, "1 process"]
        for label in ("1 process", "2 processes, ddp", "2 processes, fsdp"):
            num_tokens = run.train.batch_size * run.model.context
            rows.append(
                {
                    "name": f"{run.name}, {label}",
                    "tokens_per_second": num_tokens / seconds[run.name, label],
                    "ratio": alone / seconds[run.name, label],
                }
            )
    return rows


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _time_in_process(
    rank: int, world: int, port: int, runs: list[RunConfig], rounds: int, steps: int, device: str, answers: Any
) -> None:
    """One of `world` processes. The first one sends the median seconds per step of every run and mode."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with launched(torch.device(device)) as processes:
        # in a function, so that no model outlives the process group
        seconds = _times(runs, processes, rounds, steps)
        if processes.first:
            answers.put(seconds)


def _times(runs: list[RunConfig], processes: Processes, rounds: int, steps: int) -> dict[tuple[str, str], float]:
    contenders = {}
    for run in runs:
        for mode in ("ddp", "fsdp") if processes.world > 1 else ("ddp",):
            label = f"{processes.world} processes, {mode}" if processes.world > 1 else "1 process"
            changed = replace(run, train=replace(run.train, parallel=mode))
            contenders[run.name, label] = _step(changed, processes)
    for step in contenders.values():
        step()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
    for _ in range(rounds):
        for key, step in contenders.items():
            processes.wait()
            times[key].append(seconds_per_call(step, steps, processes.device))
    return {key: statistics.median(values) for key, values in times.items()}


def _step(run: RunConfig, processes: Processes) -> Callable[[], float]:
    step = TrainingStep(run, 0, processes.device, processes)
    rows = processes.rows_each(run.train.batch_size, run.train.accumulate)
    tokens = torch.randint(run.model.vocab_size, (rows, run.model.context), device=processes.device)
    # reading the loss waits for the device
    return lambda: step(tokens).item()
