"""Several processes do what one does: the same losses in float64, step by step; and any number reads a checkpoint."""

import json
import os
import socket
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import parallel_cases as cases
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from tarflowlm.training.distributed import ALONE, Processes, launched
from tarflowlm.training.lifecycle import resume, train

from tarflowlm.config import TrainConfig
from tarflowlm.errors import UserError
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.runs.strict_json import from_dict
from tarflowlm.training import parallel
from tarflowlm.training.parallel import Engine
from tarflowlm.training.state import newest_state

CPU = torch.device("cpu")
FAMILIES = ("ar", "affine", "mix1", "mixd", "patches", "one-channel")
TOLERANCE = 1e-9
"""Nats per token; the order of sums leaves some 1e-14."""


@pytest.fixture(scope="module")
def double():
    """As in the processes: everything in float64, on one thread."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def out(tmp_path_factory, corpus_file) -> Path:
    """What the processes left behind: started once, for importing torch takes the longest."""
    directory = tmp_path_factory.mktemp("parallel")
    ports = (free_port(), free_port())
    torch.multiprocessing.spawn(cases.work, (ports, str(corpus_file), directory), nprocs=4)
    return directory


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, corpus_file, double):
    """alone(name): the directory of the same run in one process, without what may not change its result."""
    directory = tmp_path_factory.mktemp("alone")

    def run_it(name: str) -> Path:
        if not (directory / name).exists():
            run = cases.runs(str(corpus_file))[name]
            plain = replace(run.train, accumulate=1, checkpoint_activations=False, compile=False)
            train(replace(run, train=plain), directory / name, device=CPU)
        return directory / name

    return run_it


def losses(directory: Path) -> list[tuple[str, int, float]]:
    lines = map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["split"], line["step"], line["nats_per_token"]) for line in lines]


def deviation(ours: Path, theirs: Path) -> float:
    """Largest difference of a loss, training and validation, of runs that logged the same steps."""
    left, right = losses(ours), losses(theirs)
    assert [line[:2] for line in left] == [line[:2] for line in right]
    return max(abs(a[2] - b[2]) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_processes_train_as_one(out, alone, name, mode, record_property):
    difference = deviation(out / f"{name}-{mode}", alone(name))
    record_property("deviation", difference)
    print(f"{name} {mode}: largest deviation {difference:.1e} nats per token")
    assert difference < TOLERANCE
    steps = [step for split, step, _ in losses(alone(name)) if split == "train"]
    assert steps == list(range(1, (2 if name == "one-channel" else 20) + 1))
    first, last = (load_file(directory / "model.safetensors") for directory in (out / f"{name}-{mode}", alone(name)))
    assert first.keys() == last.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, last[key], rtol=0, atol=1e-8)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("world", [1, 4])
def test_a_checkpoint_of_two_processes_resumes_on_one_and_on_four(out, alone, mode, world):
    directory = out / f"cut-{mode}-{world}"
    if world == 1:
        assert not (directory / "summary.json").exists()
        resume(directory, device=CPU)
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    assert (summary["steps"], summary["processes"]) == (20, world)
    assert deviation(directory, alone("mixd")) < TOLERANCE


@pytest.mark.parametrize("mode", cases.MODES)
def test_processes_share_the_writing_of_a_state(out, mode):
    sizes = [path.stat().st_size for path in (newest_state(out / f"cut-{mode}", print)).glob("*.distcp")]
    assert len(sizes) == 2
    assert max(sizes) < 0.75 * sum(sizes)


@pytest.mark.parametrize("mode", cases.MODES)
def test_half_precision_keeps_wide_parameters(out, mode):
    assert {t.dtype for t in load_file(out / f"half-{mode}" / "model.safetensors").values()} == {torch.float64}
    assert all(nats < 10 for _, _, nats in losses(out / f"half-{mode}"))


@pytest.mark.parametrize("mode", cases.MODES)
def test_every_process_learns_what_is_not_finite(out, mode):
    messages = {(out / f"diverged-{mode}-{rank}.txt").read_text(encoding="utf-8") for rank in range(2)}
    assert len(messages) == 1
    (message,) = messages
    assert "log-det of block 2" in message
    assert cases.POISONED in message
    assert load_checkpoint(out / f"diverged-{mode}").info["blocks"] == "1"


def test_a_batch_must_divide(tiny_run, tmp_path):
    with pytest.raises(UserError, match="batch_size 8: does not divide into 3 processes x 1 accumulation steps"):
        Processes(0, 3).rows_each(8, 1)
    with pytest.raises(UserError, match="use a multiple of 3"):
        train(tiny_run(batch_size=4, accumulate=3), tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launched(CPU) as processes:
        assert processes == ALONE


def assert_same_steps(left, right) -> None:
    assert left[0] == pytest.approx(right[0], rel=1e-5)
    for name, tensor in left[1].items():
        torch.testing.assert_close(tensor, right[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", cases.COMPILED + cases.COMPILED_HALF)
def test_the_compiled_loss_is_one_graph(out, name):
    """`fullgraph` raises at the first break, in the loss or in the backward of the numerics, which is traced too."""
    found = json.loads((out / "compiled.json").read_text(encoding="utf-8"))[name]
    assert found["graphs"] == 1
    assert found["breaks"] == 0
    assert found["losses"] < (1e-8 if name in cases.COMPILED else 1e-4)
    # AdamW makes a full step of the sign of a gradient that is rounding alone
    assert found["weights"] < 1e-8 or name in cases.COMPILED_HALF


@pytest.mark.parametrize(("device", "precision", "expected"), [
    ("cuda", "bfloat16", True), ("cuda", "float32", False), ("cpu", "bfloat16", False), ("mps", "bfloat16", False),
])  # fmt: skip
def test_half_precision_compiles_on_a_gpu_unless_told_otherwise(monkeypatch, device, precision, expected):
    monkeypatch.setattr(parallel, "missing_for_compilation", lambda device: None)
    train = TrainConfig(precision=precision)
    assert parallel.compiles(train, ALONE, torch.device(device)) is expected
    for said in (False, True):
        assert parallel.compiles(replace(train, compile=said), ALONE, torch.device(device)) is said


@pytest.mark.parametrize("missing", ["triton", "a C compiler"])
def test_without_a_compiler_training_goes_on_and_says_so(monkeypatch, missing):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None if missing == "triton" else "there")
    monkeypatch.setattr("shutil.which", lambda _: None)
    train, gpu = TrainConfig(precision="bfloat16"), torch.device("cuda")
    with pytest.warns(UserWarning, match=f"torch.compile needs {missing}, which is not installed"):
        assert not parallel.compiles(train, ALONE, gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # another process says nothing, and what was asked for is not given up in silence
        assert not parallel.compiles(train, Processes(1, 2), gpu)
        assert parallel.compiles(replace(train, compile=True), ALONE, gpu)


@pytest.mark.parametrize("stored", [{}, {"compile": False}, {"compile": True}, {"compile": None}])
def test_stored_configurations_keep_their_word(stored):
    assert from_dict(TrainConfig, stored).compile is stored.get("compile")


@pytest.mark.parametrize("fields", [{"accumulate": 2}, {"checkpoint_activations": True}])
def test_accumulation_and_checkpointing_change_nothing(tiny_run, fields):
    run = tiny_run(batch_size=4, mode="joint", stage_steps=(2,))
    changed = replace(run, train=replace(run.train, **fields))
    assert_same_steps(cases.steps_of(changed, frozen=0), cases.steps_of(run, frozen=0))


def test_checkpointed_layers_keep_their_inputs_alone(tiny_run):
    def kept(checkpoint: bool) -> int:
        run = tiny_run(mode="joint", stage_steps=(2,), checkpoint_activations=checkpoint, model={"layers": (3, 1, 1)})
        engine = Engine(replace(run.model, vocab_size=5).build(), run)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            noise = torch.zeros(2, 16, 3)
            engine.module(torch.zeros(2, 16, dtype=torch.long), noise)
        return sum(sizes)

    assert kept(True) < 0.7 * kept(False)


def test_torchrun_starts_the_command_line(tmp_path, corpus_file):
    """The first process alone prints and writes; the other leaves with what it found wrong as well."""
    port = free_port()
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port),
        "-m", "tarflowlm", "train", "mini-ar", "--data", str(corpus_file), "--device", "cpu", "--json",
        "--out", str(tmp_path / "run"), "--model.context", "16", "--steps", "2", "--train.test-windows", "2",
        "--model.trunk.width", "8", "--train.batch-size", "4", "--train.parallel", "fsdp",
    ]  # fmt: skip
    done = subprocess.run(
        launch, capture_output=True, text=True, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1
    assert json.loads(lines[0])["processes"] == 2
    assert load_checkpoint(tmp_path / "run").info["step"] == "2"
