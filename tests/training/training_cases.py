"""Runs so small that a test can afford dozens of them, what kills them, and what compares them."""

import json
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from helpers import FLOW, TRUNK, metrics_of, stack
from tarflowlm.config import DataConfig, OptimConfig, RunConfig, TokenizerConfig, TrainConfig
from tarflowlm.errors import SILENT, Progress
from tarflowlm.model_config import BaselineConfig
from tarflowlm.training.train import train

CPU = torch.device("cpu")
STEPS = TrainConfig(
    stage_steps=(3, 2, 2),
    batch_size=2,
    log_every=1,
    evaluate_every=2,
    evaluate_windows=3,
    checkpoint_every=2,
    test_windows=3,
    precision="float32",
    keep_idle=True,
)


def tiny_run(
    text: Path,
    *,
    couplings: tuple[str, ...] = ("mixd", "mix1", "mix1"),
    model: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    seed: int = 0,
    **fields: Any,
) -> RunConfig:
    """Three progressive stages of 3, 2, 2 steps; `fields` are those of TrainConfig."""
    blocks = stack(couplings, (1,) * len(couplings), (0, 2, 2)[: len(couplings)])
    return RunConfig(
        name="tiny",
        model=replace(FLOW, blocks=blocks, **(model or {})),
        data=DataConfig(source=str(text), tokenizer=TokenizerConfig()),
        optim=OptimConfig(**(optim or {})),
        train=replace(STEPS, **fields),
        seed=seed,
    )


def tiny_baseline(text: Path, **fields: Any) -> RunConfig:
    """The discrete baseline, one stage of 5 steps; `fields` are those of TrainConfig."""
    run = tiny_run(text)
    train = replace(run.train, **({"stage_steps": (5,)} | fields))
    return replace(run, model=BaselineConfig(context=16, trunk=TRUNK, layers=1), train=train)


def go(
    run: RunConfig | None, out: Path, reporter: Progress = SILENT, **options: Any
) -> dict[str, Any]:
    """Train on the CPU."""
    return train(run, out, device=CPU, reporter=reporter, **options)


def resume(out: Path) -> dict[str, Any]:
    return go(None, out)


class Killed(BaseException):
    """Like a kill: no `except Exception` may swallow it."""


class Killer(Progress):
    """Counts what a run reports (its stages, steps, records and test windows) and dies at event
    `at`.

    With `action` it calls that instead, once.
    """

    def __init__(self, at: int | None = None, action: Callable[[], None] | None = None) -> None:
        self.at, self.action, self.events, self.prepared = at, action, 0, False

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        # preparing the corpus does not count: whether it is in the cache differs between runs
        self.prepared = self.prepared or name.startswith(("stage", "all blocks", "baseline"))
        self.advance()

    def record(self, record: object) -> None:
        self.advance()

    def advance(self, count: int = 1) -> None:
        self.events += self.prepared
        if self.prepared and self.events == self.at:
            if self.action is None:
                raise Killed
            self.action()


def cut(run: RunConfig | None, out: Path, at: int, **options: Any) -> None:
    """Train until event `at`, where the run dies."""
    with pytest.raises(Killed):
        go(run, out, Killer(at), **options)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times, the one thing in them that is not reproducible."""
    times = ("seconds", "tokens_per_second", "data_share")
    return [{k: v for k, v in line.items() if k not in times} for line in metrics_of(directory)]


def same_weights(left: Path, right: Path) -> bool:
    """Whether two run directories hold bit-identical weights and counts (the header's order is not
    reproducible).
    """
    (ours, our_info), (theirs, their_info) = _content(left), _content(right)
    same_names = ours.keys() == theirs.keys() and our_info == their_info
    return same_names and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def _content(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def assert_same_run(left: Path, right: Path) -> None:
    """Two finished runs agree in weights, best weights, log and summary."""
    assert same_weights(left, right)
    assert same_weights(left / "best", right / "best")
    assert read_metrics(left) == read_metrics(right)
    ours, theirs = (
        json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        for directory in (left, right)
    )
    for name in ("steps", "tokens", "stage_valid_bpc", "parameters", "test"):
        assert ours[name] == theirs[name]


def free_port() -> int:
    """A port below those that systems hand out, so that it is still free minutes later."""
    with socket.socket() as probe:
        while True:
            with suppress(OSError):
                probe.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 30_000)))
                return probe.getsockname()[1]


def process_with(path: Path) -> int:
    """The process that has a file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if link.readlink() == path:
                return int(link.parts[2])
    raise AssertionError(path)
