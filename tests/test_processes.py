"""The device that is chosen, freed memory that is wanted again, and how processes are started."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tarflowlm
from helpers import stack
from tarflowlm import flow, processes
from tarflowlm.config import TrainConfig
from tarflowlm.errors import UserError
from tarflowlm.flow.numerics import normal, sweep
from tarflowlm.model import TarFlowLM, seeded
from tarflowlm.model_config import FlowConfig, TransformerConfig
from tarflowlm.processes import ALONE, Processes

FAULTS = """
import resource, torch
from tarflowlm.processes import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

keep_freed_memory()
torch.zeros(2**21)
before = faults()
for _ in range(20):
    torch.zeros(2**21)
print(faults() - before)
"""


def test_auto_leaves_out_apple_gpus_where_nobody_has_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    assert processes.pick_device() == torch.device("cpu")
    assert processes.pick_device("mps") == torch.device("mps")


def test_another_default_device_than_the_cpu_is_named():
    with torch.device("meta"), pytest.raises(UserError, match="default device is meta: set it"):
        tarflowlm.load("english-mini")


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.names = getattr(self, "names", set()) | {
            name + f".{func._overloadname}".replace(".default", "")
        }
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [27, pytest.param(100, marks=pytest.mark.nightly)])
def test_every_operator_has_a_kernel_for_apple_gpus(vocab_size, monkeypatch):
    """By PyTorch's own table, for the paths of accelerators without float64: training, inverse,
    decoding.
    """
    yaml, torchgen = pytest.importorskip("yaml"), pytest.importorskip("torchgen")
    text = (
        Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    ).read_text()
    # parsing the whole file takes seconds
    _, *entries = re.split(r"^- func: ", text, flags=re.MULTILINE)
    table = {entry.split("(")[0]: f"- func: {entry}" for entry in entries}

    def has_kernel(name):
        (entry,) = yaml.safe_load(table[name])
        keys, other = ",".join(entry.get("dispatch", {})), entry.get("structured_delegate")
        return "MPS" in keys or "Composite" in keys or (has_kernel(other) if other else not keys)

    monkeypatch.setattr(flow, "is_eager_cpu", lambda t: False)
    for module in (normal, sweep, sys.modules["tarflowlm.flow.codebook"]):
        monkeypatch.setattr(module, "wide_dtype", lambda like: torch.float32)
    blocks, trunk = (
        stack(("mixd", "mix1", "affine"), (1, 1, 1), (0, 2, 1)),
        TransformerConfig(width=8, num_heads=2),
    )
    shape = {
        "vocab_size": vocab_size,
        "context": 3,
        "latent_dim": 4,
        "trunk": trunk,
        "head_hidden": 4,
    }
    with seeded(0):
        stacks = blocks, blocks[:1], stack(("mixd", "mixd"), (1, 1), (0, 4))
        models, tokens = (
            [TarFlowLM(FlowConfig(**shape, blocks=b)) for b in stacks],
            torch.randint(vocab_size, (2, 3)),
        )
    with Operators() as seen:
        for model in models:
            noise = model.draw_noise(tokens)
            model.bound(tokens, noise).mean().backward()
            with torch.no_grad():
                model.codebook.decode(model.prior.inverse(model.terms(tokens, noise)[1][-1]))
    # attention has another one there
    assert not [
        name for name in seen.names if "flash_attention" not in name and not has_kernel(name)
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone gives memory back this eagerly")
@pytest.mark.parametrize(
    "chosen", [{}, {"MALLOC_MMAP_THRESHOLD_": "131072"}], ids=["ours", "the user's"]
)
def test_freed_memory_is_kept_for_what_comes_next(chosen):
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    }
    found = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=inherited | chosen,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(found.stdout) < 4096) is not bool(chosen)  # 20 blocks of 8 MiB are 40,960 pages


HELD = """
import torch, tarflowlm
from tarflowlm.cli.main import main

def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def left():
    before = held()
    some = [torch.zeros(2**20) for _ in range(50)]
    del some
    return held() - before

{work}
print(left())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone gives memory back this eagerly")
@pytest.mark.parametrize(
    ("work", "is_kept"),
    [
        ("tarflowlm.load('english-mini').write(num_tokens=8)", False),
        ("tarflowlm.load('english-mini').evaluate('the old king\\n')", False),
        ("main(['sample', 'english-mini', '--length', '8', '--json'])", True),
    ],
    ids=["write", "evaluate", "command"],
)
def test_only_a_command_keeps_what_its_process_frees(work, is_kept):
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    }
    argv = [sys.executable, "-c", HELD.format(work=work)]
    found = subprocess.run(argv, env=inherited, capture_output=True, text=True, check=True)
    # 50 blocks of 4 MiB
    assert (int(found.stdout.split()[-1]) > 100 * 2**20) is is_kept


@pytest.mark.slow
def test_importing_the_package_leaves_warnings_as_they_are():
    code = (
        "import warnings, torch.distributed.checkpoint\nbefore = [*warnings.filters]\n"
        "import tarflowlm.training.checkpoint, tarflowlm.cli.main\n"
        "assert warnings.filters == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_compilation_is_tried_once_and_its_error_kept(monkeypatch):
    calls = []

    def broken(function):
        calls.append(function)
        raise RuntimeError("torch.compile is not supported on Python 3.14+\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    processes.compilation_problem.cache_clear()
    for _ in range(2):
        assert (
            processes.compilation_problem("cpu") == "torch.compile is not supported on Python 3.14+"
        )
    assert len(calls) == 1
    monkeypatch.setattr(torch, "compile", lambda function: function)
    processes.compilation_problem.cache_clear()
    assert processes.compilation_problem("cpu") is None
    processes.compilation_problem.cache_clear()


def test_seeded_leaves_the_generators_of_gpus_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs are seeded"))
    before = torch.get_rng_state()
    with seeded(3):
        drawn = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(3)))


@pytest.fixture
def launcher(monkeypatch):
    """launcher(NAME=value): the environment of a process, without what a launcher sets here."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)

    def apply(**variables: object) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return apply


def test_machines_whose_restart_would_hang_are_refused(launcher):
    launcher(RANK=0, WORLD_SIZE=2, GROUP_WORLD_SIZE=2, TORCHELASTIC_USE_AGENT_STORE=True)
    with (
        pytest.raises(UserError, match=r"2 machines.*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        processes.launched(torch.device("cpu")),
    ):
        pass


def test_several_tasks_of_slurm_need_torchrun(launcher):
    launcher(SLURM_NTASKS=8)  # of the job: a command without srun is one process
    with processes.launched(torch.device("cpu")) as one:
        assert one == ALONE
    launcher(SLURM_STEP_NUM_TASKS=8)
    with (
        pytest.raises(UserError, match="8 Slurm tasks without torchrun"),
        processes.launched(torch.device("cpu")),
    ):
        pass


def test_every_process_has_a_gpu_of_its_own(launcher, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    gpu = torch.device("cuda")
    # Kubernetes sets no LOCAL_RANK
    assert processes.own_device(gpu, 6) == torch.device("cuda:2")
    launcher(LOCAL_RANK=3)
    assert processes.own_device(gpu, 6) == torch.device("cuda:3")
    # a program that has made the group may have chosen
    assert processes.own_device(torch.device("cuda:1"), 6) == torch.device("cuda:1")
    launcher(LOCAL_RANK=5)
    with pytest.raises(UserError, match="--nproc-per-node 4"):
        processes.own_device(gpu, 6)


def test_a_batch_is_divided_evenly():
    train = TrainConfig(batch_size=4)
    assert Processes(world=2).rows_each(train) == 2
    with pytest.raises(UserError, match=r"train\.batch_size 4: use a multiple of 3"):
        Processes(world=3).rows_each(train)
