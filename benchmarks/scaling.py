"""The same global batch in one process and in two, by DDP and FSDP2 over gloo, one thread each.

    python benchmarks/scaling.py [PRESET ...]     # default: mini-ar and mini-mixd

A progressive preset trains its first stage.
"""

import os
import socket
import statistics
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
from timing import show
from torch.multiprocessing.spawn import spawn

from tarflowlm.processes import Processes, launched
from training import configuration, training_step


def seconds_per_step(args: Namespace) -> dict[tuple[str, str], float]:
    """(preset, processes) -> median seconds per step."""
    seconds: dict[tuple[str, str], float] = {}
    for world in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        answers = get_context("spawn").SimpleQueue()
        spawn(_in_process, (world, port, args, answers), nprocs=world)
        seconds |= answers.get()
    return seconds


def _in_process(rank: int, world: int, port: int, args: Namespace, answers: Any) -> None:
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_PORT": port,
        "MASTER_ADDR": "127.0.0.1",
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    with launched(torch.device("cpu")) as processes:
        # a function of its own, so that no model outlives the process group
        seconds = _time(args, processes)
        if processes.first:
            answers.put(seconds)


def _time(args: Namespace, processes: Processes) -> dict[tuple[str, str], float]:
    steps: dict[tuple[str, str], Callable[[], float]] = {}
    for name in args.presets:
        for mode in ("ddp", "fsdp") if processes.world > 1 else ("ddp",):
            config = configuration(name, args)
            optimizer = "adamw" if mode == "fsdp" else config.optim.optimizer
            config = replace(
                config,
                train=replace(config.train, parallel=mode),
                optim=replace(config.optim, optimizer=optimizer),
            )
            rows = processes.rows_each(config.train)
            tokens = torch.randint(config.model.vocab_size, (rows, config.model.context))
            step = training_step(config, 0, processes.device, processes)
            label = f"{processes.world} processes, {mode}" if processes.world > 1 else "1 process"
            steps[name, label] = lambda step=step, tokens=tokens: step(tokens).item()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for index in range(args.rounds + 1):
        for key, step in steps.items():
            if processes.world > 1:
                torch.distributed.barrier()
            start = time.perf_counter()
            step()
            if index:  # the first round warms up
                times[key].append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in times.items()}


def main() -> None:
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("presets", nargs="*", default=["mini-ar", "mini-mixd"])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument(
        "--batch-size", type=int, help="sequences per step; the default is the preset's"
    )
    options.add_argument("--json", action="store_true", help="print one JSON object")
    args = options.parse_args()
    args.vocab_size, args.precision = None, None
    seconds, rows = seconds_per_step(args), []
    for name in args.presets:
        config = configuration(name, args)
        tokens = config.train.batch_size * config.model.context
        for (preset, label), time_per_step in seconds.items():
            if preset == name:
                speed = seconds[name, "1 process"] / time_per_step
                rows.append(
                    {
                        "": f"{name}, {label}",
                        "tokens/s": tokens / time_per_step,
                        "over one process": speed,
                    }
                )
    show(args, rows)


if __name__ == "__main__":
    main()
