"""Several processes train as one: the same losses in float64, step by step; any number resumes a
checkpoint.
"""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import parallel_cases as cases
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from training_cases import free_port, go, resume

from helpers import metrics_of
from tarflowlm.config import TrainConfig
from tarflowlm.errors import UserError
from tarflowlm.processes import ALONE, Processes
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.training import parallel
from tarflowlm.training.checkpoint import newest_state

TOLERANCE = 1e-9
"""Nats per token; the order of sums leaves some 1e-14."""


@pytest.fixture(scope="module")
def out(once, corpus_file) -> Path:
    """The directories that the processes wrote. They are started once, since importing torch takes
    the longest.
    """
    return once("parallel", lambda folder: write(folder, corpus_file, cases.COMMON))


@pytest.fixture(scope="module")
def rare(once, corpus_file) -> Path:
    """The same of models with compiled layers, patches, one channel, and in bfloat16."""
    return once("parallel-rare", lambda folder: write(folder, corpus_file, cases.RARE))


def write(directory: Path, corpus_file: Path, names: tuple[str, ...]) -> None:
    ports = free_port(), free_port()
    # which imports PyTorch once for all of them, with what they use of it
    preload = [cases.__name__, "torch._dynamo", "torch.distributed.fsdp"]
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    torch.multiprocessing.start_processes(
        cases.work,
        (ports, str(corpus_file), directory, names),
        nprocs=4,
        start_method="forkserver",
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory, corpus_file):
    """alone(name, mode): the directory of the same run in one process, without options that may not
    change its result.
    """
    directory = tmp_path_factory.mktemp("alone")

    def run_it(name: str, mode: str) -> Path:
        out = directory / f"{name}-{mode}"
        if not out.exists():
            run = cases.runs(str(corpus_file), mode)[name]
            plain = replace(
                run.train, tokens_at_once=0, checkpoint_activations=False, compile=False
            )
            torch.set_default_dtype(cases.dtype_of(run))
            go(replace(run, train=plain), out)
            torch.set_default_dtype(torch.float64)
        return out

    torch.set_default_dtype(torch.float64)
    yield run_it
    torch.set_default_dtype(torch.float32)


def losses(directory: Path) -> list[tuple[str, int, float]]:
    return [(line["split"], line["step"], line["nats_per_token"]) for line in metrics_of(directory)]


def assert_same(ours: Path, theirs: Path, tolerance: float = TOLERANCE) -> None:
    """Losses, training and validation, and weights agree up to the order of sums."""
    left, right = losses(ours), losses(theirs)
    assert [line[:2] for line in left] == [line[:2] for line in right]
    assert [line[2] for line in left] == pytest.approx(
        [line[2] for line in right], rel=0, abs=tolerance
    )
    first, last = (load_file(directory / "model.safetensors") for directory in (ours, theirs))
    assert first.keys() == last.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, last[key], rtol=0, atol=10 * tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", cases.COMMON)
def test_two_processes_train_as_one(out, alone, name, mode):
    assert_same(out / f"{name}-{mode}", alone(name, mode))


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", cases.RARE)
def test_two_processes_train_rare_models_as_one(rare, alone, name, mode):
    tolerance = 1e-2 if name == "narrow" else TOLERANCE
    assert_same(rare / f"{name}-{mode}", alone(name, mode), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("world", [1, 4])
def test_checkpoint_of_two_processes_resumes_on_one_and_on_four(out, alone, mode, world):
    directory = out / f"cut-{mode}-{world}"
    if world == 1:
        shards = [path.stat().st_size for path in newest_state(directory).glob("*.distcp")]
        assert len(shards) == 2
        assert max(shards) < 0.75 * sum(shards)
        resume(directory)
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    assert (summary["steps"], summary["processes"]) == (10, world)
    assert_same(directory, alone("mixd", mode))


@pytest.mark.slow
@pytest.mark.parametrize("mode", cases.MODES)
def test_every_process_names_what_is_not_finite(out, mode):
    first, second = (
        (out / f"diverged-{mode}-{rank}.txt").read_text(encoding="utf-8") for rank in range(2)
    )
    assert first == second
    assert cases.POISONED in first
    assert load_checkpoint(out / f"diverged-{mode}").info["blocks"] == "1"


@pytest.mark.slow
@pytest.mark.nightly
def test_compiled_layers_share_graphs_of_one_size(rare):
    """With activation checkpointing and dropout; `fullgraph` raises at the first break."""
    found = json.loads((rare / "compiled.json").read_text(encoding="utf-8"))
    assert found["results"][1] == pytest.approx(found["results"][0], rel=1e-9)
    # once for each size: forward, backward, frozen, and in an evaluation frozen or not
    first, other, again, third = found["nodes"]
    assert len(first) == 5
    assert not again
    for new in (other, third):
        assert new == pytest.approx(first, abs=2)


def test_without_a_compiler_training_goes_on_with_a_warning(monkeypatch):
    monkeypatch.setattr(parallel, "compilation_problem", lambda kind: f"no Python.h for {kind}")
    train, gpu = TrainConfig(precision="bfloat16"), torch.device("cuda")
    with pytest.warns(UserWarning, match=r"torch\.compile does not work .*no Python\.h for cuda"):
        assert not parallel.compiles(train, ALONE, gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # other processes do not repeat it
        assert not parallel.compiles(train, Processes(1, 2), gpu)
        with pytest.raises(UserError, match=r"compile True: .*no Python\.h for cuda\); leave it"):
            parallel.compiles(replace(train, compile=True), ALONE, gpu)
