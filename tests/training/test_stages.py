"""Whole runs: stages, what stays frozen, what is written, dropout, and what cannot start."""

import itertools
import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_cases import go, same_weights, tiny_run

from helpers import metrics_of
from tarflowlm.config import OptimConfig
from tarflowlm.errors import Progress, UserError
from tarflowlm.flow.transformer import PreNormLayer
from tarflowlm.model import TarFlowLM, seeded
from tarflowlm.runs.checkpoint import load_checkpoint, read_summary
from tarflowlm.runs.records import read_record
from tarflowlm.training import optim
from tarflowlm.training.parallel import parallelise
from tarflowlm.training.train import accumulate_gradients
from tarflowlm_apps.hub.card import model_card

FILES = {
    "asked.json",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "metrics.jsonl",
    "summary.json",
    "state",
    "best",
    ".lock",
}
TRAIN_KEYS = {
    "split",
    "step",
    "tokens",
    "seconds",
    "block",
    "nats_per_token",
    "bpc",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "data_share",
}
VALID_KEYS = TRAIN_KEYS - {"lr", "grad_norm", "tokens_per_second", "data_share"} | {
    "stderr",
    "text",
}


class Watcher(Progress):
    """Keeps the weights on disk at the start of every stage, and the parts of the run."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.weights, self.parts, self.done = directory, [], [], {}

    def stage(self, name, total=None, done=0):
        self.parts.append((name, total, done))
        self.done[name] = done
        if name.startswith("stage") and (self.directory / "model.safetensors").exists():
            self.weights.append(load_file(self.directory / "model.safetensors"))

    def advance(self, count=1):
        self.done[self.parts[-1][0]] += count


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus_file):
    """A three-stage run: directory, summary, its reporter."""
    out = tmp_path_factory.mktemp("runs") / "progressive"
    watcher = Watcher(out)
    return out, go(tiny_run(corpus_file), out, watcher), watcher


@pytest.mark.slow
def test_run_directory_holds_the_documented_files_and_summary(finished):
    out, summary, _ = finished
    assert {path.name for path in out.iterdir()} == FILES
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == summary
    assert (summary["preset"], summary["seed"], summary["steps"], summary["tokens"]) == (
        "tiny",
        0,
        7,
        224,
    )
    model = load_checkpoint(out).model
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert 0 < summary["trunk_parameters"] < summary["parameters"]
    assert (summary["test"]["bound"], summary["test"]["windows"], summary["test"]["tokens"]) == (
        "elbo",
        3,
        48,
    )


def test_metrics_lines_have_the_documented_keys(finished):
    out, summary, _ = finished
    lines = metrics_of(out)
    for line in lines:
        assert line.keys() == (TRAIN_KEYS if line["split"] == "train" else VALID_KEYS)
        # one character per token
        assert line["bpc"] == pytest.approx(line["nats_per_token"] / math.log(2))
    train = [line for line in lines if line["split"] == "train"]
    assert [(line["step"], line["tokens"]) for line in train] == [
        (step, 32 * step) for step in range(1, 8)
    ]
    assert [line["block"] for line in train] == [1, 1, 1, 2, 2, 3, 3]
    valid = [line for line in lines if line["split"] == "valid"]
    # a stage is evaluated as it begins, too: the weights it begins with may be its best
    assert [line["step"] for line in valid if line["block"] == 2] == [3, 4, 5]
    kept = [min(line["bpc"] for line in valid if line["block"] == block) for block in (1, 2, 3)]
    assert kept == summary["stage_valid_bpc"]


@pytest.mark.slow
def test_texts_of_a_run_are_by_its_present_weights(tmp_path, corpus_file, request):
    """Also where compiled steps read packed weights, which fused steps of AdamW do not mark as
    changed.
    """
    config = tiny_run(corpus_file, mode="joint", stage_steps=(6,), evaluate_every=2)
    config = replace(config, optim=OptimConfig(optimizer="adamw", lr=0.3))
    go(config, tmp_path / "plain")
    request.getfixturevalue("compiled_steps")
    go(config, tmp_path / "compiled")
    plain, packed = (
        [line["text"] for line in metrics_of(tmp_path / name) if line["split"] == "valid"]
        for name in ("plain", "compiled")
    )
    assert plain == packed
    assert len(set(plain)) > 2


def test_one_window_has_no_standard_error_and_json_no_nan(tmp_path, corpus_file):
    config = tiny_run(
        corpus_file, mode="joint", stage_steps=(2,), evaluate_windows=1, test_windows=1
    )
    out = tmp_path / "run"
    summary = go(config, out)
    texts = [(out / name).read_text(encoding="utf-8") for name in ("metrics.jsonl", "summary.json")]
    assert not any("NaN" in text for text in texts)
    assert summary["test"]["stderr"] is summary["test"]["elbo_stderr"] is None
    assert read_summary(out) == summary
    assert read_record(out).summary == summary
    card = model_card(load_checkpoint(out), out, "mine", None)
    # in this order, whatever the order of the weights' header
    assert "2 steps, 64 tokens, seed 0" in card
    assert "over 1 window of the test split" in card
    assert "standard error" not in card


def test_reporter_follows_stages_and_test_split(finished):
    parts = [
        part for part in finished[2].parts if part[0].startswith(("stage", "evaluating the test"))
    ]
    assert parts == [
        ("stage 1/3: block 1 mixd", 3, 0),
        ("stage 2/3: block 2 mix1", 2, 0),
        ("stage 3/3: block 3 mix1", 2, 0),
        ("evaluating the test split", 3, 0),
    ]
    assert all(finished[2].done[name] == total for name, total, _ in parts)


@pytest.mark.slow
def test_later_stages_leave_codebook_and_earlier_blocks_bit_identical(finished):
    out, _, watcher = finished
    snapshots = [*watcher.weights, load_file(out / "model.safetensors")]
    for stage, (before, after) in enumerate(itertools.pairwise(snapshots), start=1):
        assert {name.split(".")[2] for name in before if name.startswith("prior.blocks.")} == set(
            "012"[:stage]
        )
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        assert all(
            name.startswith(f"prior.blocks.{stage}.") for name in after.keys() - before.keys()
        )


def test_every_stage_trains_its_block(finished, corpus_file):
    """Against the same blocks as they are built: everything moved, the codebook included."""
    final = load_file(finished[0] / "model.safetensors")
    config = replace(tiny_run(corpus_file).model, vocab_size=27)
    with seeded(0):
        model = TarFlowLM(config.first_blocks(1))
    model.config = config
    for stage in (1, 2):
        with seeded(1000 * stage):
            model.append_block()
    for name, start in model.state_dict().items():
        # a Mix-1 weight or a residual branch may start at zero and wait for another to move
        if name.startswith("codebook") or name.endswith(
            ("input.linear.weight", "biases.1", "weight_head.bias")
        ):
            assert not torch.equal(start, final[name]), name


# dropout


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "keep"), [(0, "best"), (0, "last"), (9, "best")])
def test_a_later_stage_that_gains_nothing_changes_nothing(
    tmp_path, corpus_file, caplog, steps, keep
):
    caplog.set_level(logging.INFO, "tarflowlm")
    # at this rate the blocks go astray, unless they are not trained at all
    config = tiny_run(corpus_file, stage_steps=(1, steps, steps), keep=keep, optim={"lr": 1.0})
    first, *later = go(config, tmp_path / "run")["stage_valid_bpc"]
    assert later == pytest.approx([first, first], rel=2e-3)
    assert caplog.text.count("as it started") == 2
    assert len([line for line in metrics_of(tmp_path / "run") if line["split"] == "train"]) == (
        1 + 2 * steps
    )


def idle_run(corpus_file, **fields):
    """Block 2 has no step, and block 3 a rate at which it goes astray: both gain nothing."""
    fields = {"stage_steps": (3, 0, 4), "keep_idle": False} | fields
    return tiny_run(corpus_file, **fields, optim={"lr": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_block_that_gained_nothing_leaves_the_model(tmp_path, corpus_file, caplog, keep):
    caplog.set_level(logging.INFO, "tarflowlm")
    summary = go(idle_run(corpus_file, keep=keep), tmp_path / "run")
    # trained to the end, and no better for it, a last block is what was asked for
    num_blocks = 1 if keep == "best" else 2
    for folder in (tmp_path / "run", tmp_path / "run" / "best"):
        found = load_checkpoint(folder)
        steps = found.run.train.stage_steps
        assert (found.model.num_blocks, found.info["blocks"]) == (num_blocks, str(num_blocks))
        assert (found.run.num_stages, steps) == (num_blocks, (3, 4)[:num_blocks])
        assert [block.coupling for block in found.run.model.blocks] == ["mixd", "mix1"][:num_blocks]
    assert len(summary["stage_valid_bpc"]) == num_blocks
    assert summary["steps"] == 7
    left = [line for line in caplog.text.splitlines() if "leaves the model" in line]
    assert "stage 2/3: block 2 mix1 has no time: the block leaves the model" in left[0]
    assert len(left) == 3 - num_blocks
    train = [line for line in metrics_of(tmp_path / "run") if line["split"] == "train"]
    assert [line["block"] for line in train] == [1, 1, 1, 3, 3, 3, 3]


@pytest.mark.slow
def test_a_block_that_ends_worse_than_the_model_without_it_leaves(tmp_path, corpus_file):
    """Mix-d does not start as the identity: training lowers the bound, but not far enough."""
    config = tiny_run(
        corpus_file,
        couplings=("mixd", "mixd"),
        stage_steps=(3, 2),
        evaluate_every=1,
        keep_idle=False,
    )
    config = replace(config, model=replace(config.model, channel_mix=False))
    summary = go(config, tmp_path / "run")
    assert len(summary["stage_valid_bpc"]) == 1
    valid = [line for line in metrics_of(tmp_path / "run") if line["split"] == "valid"]
    first, *later = (line["bpc"] for line in valid if line["block"] == 2)
    assert first > min(later) > summary["stage_valid_bpc"][0]


@pytest.mark.slow
def test_a_model_without_its_idle_blocks_is_the_one_of_its_first_stage(tmp_path, corpus_file):
    """Which continues prompts exactly, as a model of one block does."""
    go(idle_run(corpus_file, stage_steps=(3, 0, 0)), tmp_path / "run")
    alone = tiny_run(corpus_file, couplings=("mixd",), stage_steps=(3,), optim={"lr": 1.0})
    go(alone, tmp_path / "alone")
    assert same_weights(tmp_path / "run", tmp_path / "alone")
    ours, theirs = load_checkpoint(tmp_path / "run"), load_checkpoint(tmp_path / "alone")
    assert ours.run.model == theirs.run.model


@pytest.mark.slow
def test_patience_ends_a_stage_whose_bound_no_longer_falls(tmp_path, corpus_file):
    config = tiny_run(
        corpus_file, stage_steps=(4, 90, 90), patience=2, evaluate_every=2, optim={"lr": 1.0}
    )
    go(config, tmp_path / "run")
    valid = [line for line in metrics_of(tmp_path / "run") if line["split"] == "valid"]
    for block in (2, 3):
        bounds = [line["bpc"] for line in valid if line["block"] == block]
        assert bounds.index(min(bounds)) == len(bounds) - 3


def model_with(run, **fields):
    """A model with noise in all weights, its bound, and the configuration of its training."""
    train = replace(run.train, **fields)
    with seeded(0):
        model = replace(run.model, vocab_size=27).build().train()
        for p in model.parameters():
            # projections to the residual stream start at zero, where dropout changes nothing
            torch.nn.init.normal_(p, std=0.2)
    return model, parallelise(model, train), train


def loss(model, bound, train) -> float:
    tokens, generator = torch.arange(48).view(3, 16) % 27, torch.Generator().manual_seed(0)
    return float(accumulate_gradients(model, bound, tokens, generator, train))


def test_dropout_changes_the_loss_repeatably_and_leaves_global_generators_alone(corpus_file):
    run = tiny_run(corpus_file)
    plain, thinned = model_with(run), model_with(run, dropout=0.5)
    before = torch.get_rng_state()
    assert loss(*thinned) == loss(*thinned) != loss(*plain)
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpointed_activations_repeat_dropout(corpus_file):
    run, gradients = tiny_run(corpus_file), []
    for checkpointed in (False, True):
        model, *rest = model_with(run, dropout=0.3, checkpoint_activations=checkpointed)
        loss(model, *rest)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_parts_of_a_batch_add_up_to_its_gradient(corpus_file):
    run, gradients, losses = tiny_run(corpus_file), [], []
    for at_once in (0, 1, 40):  # in one part, in single rows, and in two rows and one
        model, bound, train = model_with(run, tokens_at_once=at_once)
        losses.append(loss(model.double(), bound, train))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other)


def test_dropout_spares_evaluation_and_frozen_blocks(corpus_file):
    run = tiny_run(corpus_file)
    model, thinned, _ = model_with(run, dropout=0.5)
    other, plain, _ = model_with(run)
    tokens, noise = torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 16, 3)
    model.eval()
    other.eval()
    assert torch.equal(thinned(tokens, noise), plain(tokens, noise))
    other.train_only(2)
    parallelise(other.train(), replace(run.train, dropout=0.5), frozen=2)
    shares = [layer.dropout for layer in other.modules() if isinstance(layer, PreNormLayer)]
    assert shares == [0.0, 0.0, 0.5]


@pytest.mark.slow
def test_averaged_weights_are_the_averages_of_all_steps(tmp_path, monkeypatch, corpus_file):
    """In joint training, which moves all blocks in one stage."""
    run = tiny_run(corpus_file, mode="joint", stage_steps=(12,), ema=0.7, checkpoint_every=3)
    with seeded(0):
        model = replace(run.model, vocab_size=27).build()
    average = {n: p.detach().double() for n, p in model.named_parameters()}
    last = dict(average)
    decays = (min(0.7, (1 + step) / (10 + step)) for step in itertools.count(1))
    take_step = optim.take_step

    def watched(optimizers, parameters, *args, **options):
        take_step(optimizers, parameters, *args, **options)
        decay = next(decays)
        last.update({n: p.detach().double().clone() for n, p in parameters.items()})
        average.update({n: decay * average[n] + (1 - decay) * weight for n, weight in last.items()})

    monkeypatch.setattr(optim, "take_step", watched)
    go(run, tmp_path / "run")
    found = load_file(tmp_path / "run" / "model.safetensors")
    for name, expected in average.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-6)
    for block in range(3):
        name = f"prior.blocks.{block}.input.linear.weight"
        assert (average[name] - last[name]).abs().max() > 1e-4


# what cannot start


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": "missing.txt"}, r"missing\.txt"),
        ({"data": "short.txt"}, r"split .* has \d+ tokens, fewer than the context of 16"),
        ({"vocab_size": 5}, "vocab_size 5: the tokenizer has 27"),
    ],
)
def test_run_that_cannot_start_leaves_no_directory(tmp_path, fields, message, corpus_file):
    out, run = tmp_path / "deep" / "run", tiny_run(corpus_file)
    (tmp_path / "short.txt").write_text(
        "too short a text for three windows of it", encoding="utf-8"
    )
    if "data" in fields:
        run = replace(run, data=replace(run.data, source=str(tmp_path / fields["data"])))
    else:
        run = replace(run, model=replace(run.model, **fields))
    with pytest.raises(UserError, match=message):
        go(run, out)
    assert not out.parent.exists()


@pytest.mark.parametrize("minutes", ["0", "-1"])
def test_no_time_at_all_is_refused(tmp_path, refused, minutes):
    out = tmp_path / "run"
    refused("train", "mini-ar", "--out", out, "--minutes", minutes, names=["minutes", minutes])
    assert not out.exists()


def test_muon_with_shards_is_refused_and_names_the_optimiser_to_take(corpus_file):
    with pytest.raises(UserError, match=r"optim\.optimizer '?muon'?: .*adamw"):
        tiny_run(corpus_file, parallel="fsdp")
    assert tiny_run(corpus_file, parallel="fsdp", optim={"optimizer": "adamw"})
