"""Muon in a precision of its choice equals PyTorch's, and can be told on the device to leave a step out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tarflowlm.config import OptimConfig
from tarflowlm.runs.checkpoint import read_run, seal
from tarflowlm.training import lifecycle, muon, optim
from tarflowlm.training import run as training_run
from tarflowlm.training.metrics import Reporter
from tarflowlm.training.muon import Muon, orthogonalised, quicker_precision

SETTINGS = {"coefficients": (3.4445, -4.7750, 2.0315), "steps": 5, "eps": 1e-7}
SHAPES = [(6, 6), (12, 5), (5, 12), (33, 16)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def take_steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], num_steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def test_in_bfloat16_it_is_that_of_pytorch():
    ours, theirs = parameters(), parameters()
    options = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.95}
    take_steps(Muon(ours, precision="bfloat16", **options), ours)
    take_steps(torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options), theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float32_it_is_that_of_float64(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    found = orthogonalised(matrix, dtype=torch.float32, **SETTINGS)
    exact = orthogonalised(matrix, dtype=torch.float64, **SETTINGS)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=3e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_singular_vectors_stay_and_values_come_near_one(precision):
    matrix = torch.randn(24, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = orthogonalised(matrix, dtype=getattr(torch, precision), **SETTINGS).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ found @ right.T
    assert (values > 0.01 * values[0]).all()
    off_diagonal = inside - inside.diagonal().diag()
    assert off_diagonal.abs().max() < (1e-4 if precision == "float32" else 0.05)
    # the polynomial of five steps maps (0.01, 1] into this interval
    assert ((inside.diagonal() > 0.6) & (inside.diagonal() < 1.3)).all()


@pytest.mark.parametrize("smallest", [-1, -4, -8])
def test_long_rows_take_a_short_cut_to_the_same(smallest):
    """Singular values from 1 down to 10^smallest."""
    generator = torch.Generator().manual_seed(4)
    left, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(64, 16, generator=generator, dtype=torch.float64))
    matrix = left @ torch.logspace(0, smallest, 16, dtype=torch.float64).diag() @ right.T
    plain = muon._iterate(matrix / matrix.norm(), SETTINGS["coefficients"], SETTINGS["steps"])
    for given in (matrix, matrix.T):
        expected = plain if given is matrix else plain.T
        for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
            found = orthogonalised(given, dtype=dtype, **SETTINGS).double()
            torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_stacked_matrices_are_orthogonalised_apart():
    generator = torch.Generator().manual_seed(0)
    parts = [nn.Parameter(torch.randn(4, 5, generator=generator)) for _ in range(3)]
    stack = nn.Parameter(torch.cat([p.detach() for p in parts]))
    apart = Muon(parts, precision="float32", lr=0.01)
    together = Muon([stack], precision="float32", stacked=[stack], lr=0.01)
    for p in parts:
        p.grad = torch.randn(p.shape, generator=generator)
    stack.grad = torch.cat([p.grad for p in parts])
    apart.step()
    together.step()
    torch.testing.assert_close(stack, torch.cat(list(parts)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("qkv", "num_stacked"), [("apart", 2), ("together", 0)])
def test_queries_keys_and_values_are_stacked_in_every_layer(tiny_run, qkv, num_stacked):
    model = replace(tiny_run(model={"layers": (2, 1, 1)}).model.first_blocks(1), vocab_size=5).build()
    _, optimizer = optim.build_optimizers(OptimConfig(muon_qkv=qkv, muon_precision="float32"), model)
    assert len(optimizer._stacked) == num_stacked


def test_a_step_that_the_device_refuses_changes_nothing():
    params, reference = parameters(), parameters()
    optimizer, plain = Muon(params, precision="float32", lr=0.01), Muon(reference, precision="float32", lr=0.01)
    optimizer.found_inf = torch.tensor(0.0)
    take_steps(optimizer, params)
    take_steps(plain, reference)
    for p, q in zip(params, reference, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    before = [p.detach().clone() for p in params]
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in params]
    for p in params:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert all(
        torch.equal(optimizer.state[p]["momentum_buffer"], old) for p, old in zip(params, momenta, strict=True)
    )


@pytest.mark.parametrize(
    ("tiles", "products", "width", "expected"),
    [
        (True, True, 512, "bfloat16"),
        (True, True, 128, "float32"),
        (False, True, 512, "float32"),
        (True, False, 512, "float32"),
    ],
)
def test_a_cpu_takes_bfloat16_for_large_matrices_where_it_has_tiles(monkeypatch, tiles, products, width, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: products)
    shapes = [torch.Size((width, width)), torch.Size((8, 8))]
    assert quicker_precision(shapes, torch.device("cpu")) == expected


def test_a_run_records_what_it_took_and_keeps_it(tmp_path, tiny_run, go, monkeypatch):
    asked = []

    def answer(shapes, device):
        asked.append(list(shapes))
        return "float32"

    monkeypatch.setattr(optim, "quicker_precision", answer)
    go(tiny_run(), tmp_path / "run")
    assert len(asked) == 1
    assert asked[0]
    assert read_run(tmp_path / "run").optim.muon_precision == "float32"
    go(tiny_run(optim={"muon_precision": "bfloat16"}), tmp_path / "other")
    assert len(asked) == 1


def test_a_run_from_before_there_was_a_choice_resumes_as_it_began(tmp_path, tiny_run, go, monkeypatch):
    built = []

    def watched(config: OptimConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
        built.append((config.muon_precision, config.muon_qkv))
        return optim.build_optimizers(config, model)

    class Killed(Exception):
        pass

    class Killer(Reporter):
        def step(self, num_tokens, share=None):
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 4:
                raise Killed

    out: Path = tmp_path / "run"
    with pytest.raises(Killed):
        go(tiny_run(), out, Killer())
    config = (out / "config.json").read_text(encoding="utf-8")
    older = "\n".join(line for line in config.splitlines() if "muon_" not in line)
    (out / "config.json").write_text(older, encoding="utf-8")
    (out / "manifest.json").unlink()
    seal(out)
    monkeypatch.setattr(training_run, "build_optimizers", watched)
    lifecycle.resume(out, device=torch.device("cpu"))
    assert set(built) == {("bfloat16", "together")}
