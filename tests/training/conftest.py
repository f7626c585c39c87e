"""Runs so small that a test can afford dozens of them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from helpers import FLOW, TRUNK, metrics_of
from tarflowlm.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from tarflowlm.model_config import BaselineConfig, stack
from tarflowlm.training.metrics import Reporter
from tarflowlm.training.train import train


@pytest.fixture(scope="session")
def tiny_run(corpus_file) -> Callable[..., RunConfig]:
    """tiny_run(model={...}, optim={...}, **TrainConfig fields): three progressive stages of 3, 2, 2
    steps.
    """

    def build(
        *,
        model: dict[str, Any] | None = None,
        optim: dict[str, Any] | None = None,
        seed: int = 0,
        **fields,
    ):
        fields_of_model = dict(model or {})
        couplings = fields_of_model.pop("couplings", ("mixd", "mix1", "mix1"))
        layers = fields_of_model.pop("layers", (1,) * len(couplings))
        components = fields_of_model.pop("components", (0, 2, 2)[: len(couplings)])
        flow = replace(FLOW, blocks=stack(couplings, layers, components))
        defaults = {
            "stage_steps": (3, 2, 2),
            "batch_size": 2,
            "log_every": 1,
            "evaluate_every": 2,
            "evaluate_windows": 3,
            "checkpoint_every": 2,
            "test_windows": 3,
            "precision": "float32",
        }
        return RunConfig(
            name="tiny",
            model=replace(flow, **fields_of_model),
            data=DataConfig(source=str(corpus_file)),
            optim=OptimConfig(**(optim or {})),
            train=TrainConfig(**(defaults | fields)),
            seed=seed,
        )

    return build


@pytest.fixture(scope="session")
def tiny_baseline(tiny_run) -> Callable[..., RunConfig]:
    """tiny_baseline(**TrainConfig fields): the discrete baseline, one stage of 5 steps."""

    def build(**fields) -> RunConfig:
        run = tiny_run()
        train = replace(run.train, **({"stage_steps": (5,)} | fields))
        return replace(run, model=BaselineConfig(context=16, trunk=TRUNK, layers=1), train=train)

    return build


@pytest.fixture(scope="session")
def go() -> Callable[..., dict[str, Any]]:
    """go(run, out, reporter=None, **options): train on the CPU."""

    def run_it(
        run: RunConfig, out: Path, reporter: Reporter | None = None, **options: Any
    ) -> dict[str, Any]:
        return train(run, out, device=torch.device("cpu"), reporter=reporter, **options)

    return run_it


class Killed(BaseException):
    """Like a kill: no `except Exception` may swallow it."""


class Killer(Reporter):
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

    def record(self, record: dict[str, Any]) -> None:
        self.advance()

    def advance(self, count: int = 1) -> None:
        self.events += self.prepared
        if self.prepared and self.events == self.at:
            if self.action is None:
                raise Killed
            self.action()


@pytest.fixture(scope="session")
def killer() -> type[Killer]:
    """The class Killer(at=None, action=None), a reporter that dies or acts at an event."""
    return Killer


@pytest.fixture(scope="session")
def cut(go) -> Callable[..., None]:
    """cut(run, out, at, **options): train until event `at`, where the run dies."""

    def run_it(run: RunConfig, out: Path, at: int, **options: Any) -> None:
        with pytest.raises(Killed):
            go(run, out, Killer(at), **options)

    return run_it


@pytest.fixture(scope="session")
def read_metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """The lines of metrics.jsonl without the speeds, the one thing in them that is not
    reproducible.
    """

    def read(directory: Path) -> list[dict[str, Any]]:
        speeds = ("tokens_per_second", "data_share")
        return [
            {k: v for k, v in line.items() if k not in speeds} for line in metrics_of(directory)
        ]

    return read


@pytest.fixture(scope="session")
def same_weights() -> Callable[[Path, Path], bool]:
    """Whether two run directories hold bit-identical weights and counts (the header's order is not
    reproducible).
    """

    def content(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        with safe_open(directory / "model.safetensors", framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118

    def compare(left: Path, right: Path) -> bool:
        (ours, our_info), (theirs, their_info) = content(left), content(right)
        same_names = ours.keys() == theirs.keys() and our_info == their_info
        return same_names and all(
            torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
        )

    return compare


@pytest.fixture(scope="session")
def same_run(same_weights, read_metrics) -> Callable[[Path, Path], None]:
    """same_run(left, right): fails unless two finished runs agree in weights, best weights, log and
    summary.
    """

    def check(left: Path, right: Path) -> None:
        assert same_weights(left, right)
        assert same_weights(left / "best", right / "best")
        assert read_metrics(left) == read_metrics(right)
        summaries = [
            json.loads((d / "summary.json").read_text(encoding="utf-8")) for d in (left, right)
        ]
        for name in ("steps", "tokens", "stage_tokens", "stage_valid_bpc", "parameters", "test"):
            assert summaries[0][name] == summaries[1][name]

    return check
