"""The device that is chosen, its kernels and its compiler."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tarflowlm
from helpers import stack
from tarflowlm import device
from tarflowlm.errors import UserError
from tarflowlm.flow.numerics import normal, vocabulary_rosenblatt
from tarflowlm.model import TarFlowLM, seeded
from tarflowlm.model_config import FlowConfig, TransformerConfig


def test_auto_leaves_out_apple_gpus_where_nobody_has_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    assert device.pick_device() == torch.device("cpu")
    assert device.pick_device("mps") == torch.device("mps")


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
@pytest.mark.usefixtures("accelerator")
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

    for module in (normal, vocabulary_rosenblatt, sys.modules["tarflowlm.flow.codebook"]):
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


def test_compilation_is_tried_once_and_its_error_kept(monkeypatch):
    calls = []

    def broken(function):
        calls.append(function)
        raise RuntimeError("torch.compile is not supported on Python 3.14+\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    device.compilation_problem.cache_clear()
    for _ in range(2):
        assert device.compilation_problem("cpu") == "torch.compile is not supported on Python 3.14+"
    assert len(calls) == 1
    monkeypatch.setattr(torch, "compile", lambda function: function)
    device.compilation_problem.cache_clear()
    assert device.compilation_problem("cpu") is None
    device.compilation_problem.cache_clear()


def test_seeded_leaves_the_generators_of_gpus_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs are seeded"))
    before = torch.get_rng_state()
    with seeded(3):
        drawn = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(3)))
