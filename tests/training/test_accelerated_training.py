"""Training on an accelerator, for which `pretend_device` stands in: a CPU's numbers, few waits."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_cases import Killed, Killer, tiny_baseline, tiny_run

from helpers import metrics_of, mostly_nightly, randomise
from pretend_device import PretendDevice, pretend
from tarflowlm import chunks
from tarflowlm.config import DataConfig, RunConfig, TokenizerConfig
from tarflowlm.model import LanguageModel, seeded
from tarflowlm.model_config import FlowConfig
from tarflowlm.presets import preset
from tarflowlm.training.parallel import parallelise
from tarflowlm.training.train import accumulate_gradients, train

LARGE = 1024
"""A vocabulary of which few components are near a latent."""
SYMBOLS = {"mini": 27, "owt": LARGE}
TOKENS = 8, 16
ROWS = 64
"""Rows of [rows, LARGE] in a chunk."""
COSTS = {
    "mini-ar": [(0, 140)],
    "mini-affine": [(0, 800)],
    "mini-mix1": [(0, 1360)],
    "mini-mixd": [(0, 280), (1, 770), (1, 1030)],
    "mini-mixd-p2": [(0, 335), (1, 790), (1, 1050)],
    "mini-passes": [(0, 280), (1, 360)],
    "owt-ar": [(0, 170)],
    "owt-affine": [(2, 680)],
    "owt-mixd": [(3, 360), (4, 1700), (4, 1950)],
}
"""The most waits and launches of a part of a step, for every stage of a tiny model on `cuda`."""


def tiny(name: str) -> RunConfig:
    """A preset with a tiny model of its kind."""
    run = preset(name)
    trunk = replace(run.model.trunk, width=8, num_heads=2)
    vocab_size = SYMBOLS[name.partition("-")[0]]
    model = replace(run.model, context=TOKENS[1], trunk=trunk, vocab_size=vocab_size)
    if isinstance(model, FlowConfig):
        blocks = tuple(replace(block, layers=1) for block in model.blocks)
        model = replace(model, blocks=blocks, head_hidden=4)
    else:
        model = replace(model, layers=1)
    return replace(
        run, model=model, train=replace(run.train, tokens_at_once=0, precision="float32")
    )


def built(run: RunConfig, stage: int) -> LanguageModel:
    with seeded(0):
        model = run.model_of_stage(stage).build()
    randomise(model, scale=0.1).float()
    model.train_only(stage)
    return model


def part(
    model: LanguageModel, run: RunConfig, stage: int, tokens: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of a part of a step."""
    bound = parallelise(model, run.train, frozen=stage)
    generator = torch.Generator(device=model.device).manual_seed(1)
    loss = accumulate_gradients(model, bound, tokens, generator, run.train)
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("name", COSTS)
def test_a_part_of_a_step_has_the_numbers_of_a_cpu_and_few_waits(name, kind, monkeypatch):
    monkeypatch.setattr(chunks, "HELD_ACCELERATOR", ROWS * LARGE)
    run = tiny(name)
    for stage, (waits, launches) in enumerate(COSTS[name]):
        model = built(run, stage)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, TOKENS, generator=generator)
        expected, gradients = part(copy.deepcopy(model), run, stage, tokens)
        with pretend(kind) as gpu:
            there = copy.deepcopy(model).to(kind), run, stage, tokens.to(kind)
            with gpu.counting() as counted:
                loss, found = part(*there)
            assert found.keys() == gradients.keys()
            torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=0)
            for key, gradient in gradients.items():
                torch.testing.assert_close(found[key].cpu(), gradient, rtol=1e-3, atol=1e-5)
        if kind == "cuda":
            assert counted.num_waits <= waits, str(counted)
            assert counted.num_launches <= launches, counted.num_launches


def on_device(gpu: PretendDevice, run: RunConfig | None, out: Path, **options) -> list[float]:
    """Train a run on the device; the losses in its log."""
    train(run, out, device=gpu.device, **options)
    return [line["nats_per_token"] for line in metrics_of(out)]


def on_cpu(run: RunConfig, out: Path) -> list[float]:
    train(run, out, device=torch.device("cpu"))
    return [line["nats_per_token"] for line in metrics_of(out)]


FEW = {"stage_steps": (2, 2, 2), "keep": "last", "evaluate_every": 9, "checkpoint_every": 9}


@pytest.mark.parametrize("kind", mostly_nightly(["cuda", "mps"], "cuda"))
def test_a_run_has_the_log_of_a_cpu(kind, corpus_file, tmp_path):
    run = tiny_run(corpus_file, tokens_at_once=16, ema=0.9, checkpoint_activations=True, **FEW)
    run = replace(run, train=replace(run.train, stage_steps=(2, 1, 1)))
    expected = on_cpu(run, tmp_path / "cpu")
    # a GPU whose peak is not known: counting operations takes a second
    with pretend(kind, index=int(kind == "cuda"), name="T4") as gpu:
        found = on_device(gpu, run, tmp_path / "there")
        assert found == pytest.approx(expected, rel=1e-4)
    lines = [line for line in metrics_of(tmp_path / "there") if line["split"] == "train"]
    if kind == "cuda":
        # of this device, and not of the first one
        assert all(line["memory_gb"] > 0 for line in lines)
        # whoever writes checkpoints has chosen it, too
        assert not gpu.lost


def test_blocks_that_fill_in_are_counted(corpus_file, tmp_path):
    """Their number of rows depends on numbers, which operations are counted without."""
    run = tiny("mini-passes")
    data = DataConfig(source=str(corpus_file), tokenizer=TokenizerConfig())
    steps = replace(tiny_run(corpus_file, **FEW).train, stage_steps=(2, 2))
    run = replace(run, model=replace(run.model, vocab_size=0), data=data, train=steps)
    with pretend("cuda") as gpu:
        on_device(gpu, run, tmp_path / "run")
    lines = [line for line in metrics_of(tmp_path / "run") if line["split"] == "train"]
    assert [line["block"] for line in lines] == [1, 1, 2, 2]
    assert all(line["mfu"] > 0 for line in lines)


@pytest.mark.slow
@pytest.mark.nightly
def test_half_precision_follows_the_rules_of_cuda(corpus_file, tmp_path):
    """Compiled layers run eagerly here, by the code that would be compiled."""
    for make in (tiny_run, tiny_baseline):
        steps = FEW if make is tiny_run else FEW | {"stage_steps": (2,)}
        expected = on_cpu(make(corpus_file, **steps), tmp_path / f"cpu-{make.__name__}")
        with pretend("cuda", name="T4") as gpu:
            run = make(corpus_file, **steps | {"precision": "auto"})
            found = on_device(gpu, run, tmp_path / make.__name__)
        assert found == pytest.approx(expected, rel=1e-2)
        assert found != pytest.approx(expected, rel=1e-7)


def test_a_stopped_run_continues_on_the_device_and_on_a_cpu(corpus_file, tmp_path):
    steps = {"stage_steps": (3, 2), "keep": "last", "checkpoint_every": 2, "evaluate_every": 9}
    run = tiny_run(corpus_file, couplings=("mixd", "affine"), dropout=0.1, **steps)
    with pretend("cuda", name="T4") as gpu:
        on_device(gpu, run, tmp_path / "whole")
        with pytest.raises(Killed):
            on_device(gpu, run, tmp_path / "there", reporter=Killer(7))
        shutil.copytree(tmp_path / "there", tmp_path / "here")
        on_device(gpu, None, tmp_path / "there")
    train(None, tmp_path / "here", device=torch.device("cpu"))
    weights, same, moved = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "there", "here")
    )
    for name, weight in weights.items():
        assert weight.equal(same[name]), name
        # other noise, as a generator does not move
        torch.testing.assert_close(weight, moved[name], rtol=0, atol=0.1)
