"""The training benchmark says what is true of the models it names."""

from dataclasses import replace

import pytest
import torch

from tarflowlm.bench.scaling import scaling
from tarflowlm.bench.sizes import kept_bytes, size
from tarflowlm.bench.train import Args, run
from tarflowlm.checkpoint import build_model
from tarflowlm.evaluation.flops import training_flops
from tarflowlm.presets import preset
from tarflowlm.training.config import TrainConfig


def small(name, **changes):
    """A preset at a size that a test can afford."""
    whole = preset(name)
    model = replace(whole.model, vocab_size=27, context=64, **changes)
    return replace(whole, model=model, train=replace(whole.train, batch_size=2))


def test_sizes_count_what_a_real_model_holds():
    row = size(small("mini-mixd"))
    model = build_model(small("mini-mixd").model)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert row["trunk_parameters"] == sum(p.numel() for n, p in model.named_parameters() if "transformer." in n)
    first = build_model(small("mini-mixd").model.first_blocks(1))
    count = sum(p.numel() for p in first.parameters())
    muon = sum(p.numel() for n, p in first.named_parameters() if "transformer.layers." in n and p.ndim == 2)
    assert row["weights_gb"] == row["gradients_gb"] == pytest.approx(4 * count / 1e9)
    assert row["optimizer_gb"] == pytest.approx(4 * (muon + 2 * (count - muon)) / 1e9)
    assert row["training_flops"] == training_flops(first.config) / 64
    assert len(row["stages"]) == 3
    # an upper stage trains one block alone
    assert row["stages"][1]["gradients_gb"] < 0.5 * row["gradients_gb"]
    assert row["checkpointed_gb"] < 0.5 * row["activations_gb"]


def test_kept_activations_are_those_of_the_real_kernels():
    run_config = small("mini-ar")
    # not as long as a head is wide
    run_config = replace(run_config, model=replace(run_config.model, context=96))
    with torch.device("meta"):
        shapes = build_model(run_config.model)
    real = build_model(run_config.model)
    for checkpointed in (False, True):
        ours = kept_bytes(shapes, run_config, 0, checkpointed=checkpointed)
        assert ours == pytest.approx(kept_bytes(real, run_config, 0, checkpointed=checkpointed), rel=0.01)


def test_speed_rows_and_utilisation():
    args = Args(
        presets=("mini-ar",),
        rounds=1,
        steps=1,
        memory=False,
        scaling=False,
        sizes=False,
        device="cpu",
        peak_tflops=2.0,
    )
    (row,) = run(args)["rows"]
    config = replace(preset("mini-ar").model, vocab_size=27)
    assert row["tflops"] == pytest.approx(row["tokens_per_second"] * training_flops(config) / config.context / 1e12)
    assert row["mfu"] == pytest.approx(row["tflops"] / 2.0)
    assert row["ratio"] == 1.0


def test_scaling_times_one_process_and_two():
    runs = [replace(small("mini-ar", layers=1), train=TrainConfig(batch_size=2))]
    rows = scaling(runs, 27, rounds=1, steps=1, device=torch.device("cpu"))
    names = [row["name"] for row in rows]
    assert names == [f"mini-ar, {label}" for label in ("1 process", "2 processes, ddp", "2 processes, fsdp")]
    assert rows[0]["ratio"] == 1.0
    assert all(row["tokens_per_second"] > 0 for row in rows)
