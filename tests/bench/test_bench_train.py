"""The training benchmark says what is true of the models it names."""

from dataclasses import replace

import pytest
import torch

from tarflowlm.bench.arguments import TrainArgs
from tarflowlm.bench.scaling import scaling
from tarflowlm.bench.train import run
from tarflowlm.evaluation.flops import training_flops
from tarflowlm.runs.config import TrainConfig
from tarflowlm.runs.presets import preset


def small(name, **changes):
    """A preset at a size that a test can afford."""
    whole = preset(name)
    model = replace(whole.model, vocab_size=27, context=64, **changes)
    return replace(whole, model=model, train=replace(whole.train, batch_size=2))


def test_speed_rows_and_utilisation():
    args = TrainArgs(
        presets=("mini-ar",),
        rounds=1,
        steps=1,
        memory=False,
        scaling=False,
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
