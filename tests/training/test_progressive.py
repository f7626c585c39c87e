"""Whole runs: stages, what stays frozen, what is written, and what stops a run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tarflowlm.errors import UserError
from tarflowlm.language_model import seeded
from tarflowlm.model import TarFlowLM
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.runs.manifest import write_manifest
from tarflowlm.training import lifecycle
from tarflowlm.training.metrics import Reporter

FILES = {
    "config.json", "model.safetensors", "tokenizer.json", "manifest.json", "metrics.jsonl", "summary.json", "state",
    "best", ".lock",
}  # fmt: skip
TRAIN_KEYS = {
    "split", "step", "tokens", "block", "nats_per_token", "bpc", "lr", "grad_norm", "grad_norm_max",
    "tokens_per_second",
}  # fmt: skip
VALID_KEYS = {"split", "step", "tokens", "block", "nats_per_token", "bpc", "stderr"}


class Snapshots(Reporter):
    """Keeps the weights on disk at the start of every stage, and what was said."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.weights, self.stages, self.notices = directory, {}, [], []

    def stage(self, index, num_stages, num_steps, done, description):
        self.stages.append((index, num_stages, num_steps, done, description))
        if index > 0:
            self.weights[index] = load_file(self.directory / "model.safetensors")

    def notice(self, text):
        self.notices.append(text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_run, go):
    """A three-stage run: directory, summary, what its reporter saw."""
    out = tmp_path_factory.mktemp("runs") / "progressive"
    seen = Snapshots(out)
    return out, go(tiny_run(), out, seen), seen


def test_a_run_directory_holds_the_documented_files(finished):
    assert {path.name for path in finished[0].iterdir()} == FILES


def test_metrics_lines_have_the_documented_keys(finished):
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        assert line.keys() == (TRAIN_KEYS if line["split"] == "train" else VALID_KEYS)
        # one character a token
        assert line["bpc"] == pytest.approx(line["nats_per_token"] / math.log(2))
    train_lines = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in train_lines] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["tokens"] for line in train_lines] == [32 * step for step in range(1, 8)]
    assert [line["block"] for line in train_lines] == [1, 1, 1, 2, 2, 3, 3]


def test_every_stage_ends_with_its_bound_in_log_and_summary(finished, read_metrics):
    out, summary, _ = finished
    ends = [line["bpc"] for line in read_metrics(out) if line["split"] == "valid" and line["step"] in (3, 5, 7)]
    assert ends == summary["stage_valid_bpc"]
    assert len(ends) == 3


def test_summary_says_what_was_done(finished):
    out, summary, _ = finished
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == summary
    assert (summary["preset"], summary["seed"], summary["steps"], summary["tokens"]) == ("tiny", 0, 7, 224)
    assert summary["stage_tokens"] == [96, 64, 64]
    assert len(summary["stage_seconds"]) == 3
    model = load_checkpoint(out).model
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert 0 < summary["trunk_parameters"] < summary["parameters"]
    assert summary["test"].keys() >= {
        "bound", "nats_per_token", "bpc", "ppl", "stderr", "samples", "windows", "tokens", "characters"
    }  # fmt: skip
    assert (summary["test"]["bound"], summary["test"]["windows"], summary["test"]["tokens"]) == ("elbo", 3, 48)
    assert summary["device"] == "cpu"


def test_stages_are_announced(finished):
    stages = finished[2].stages
    assert stages == [(0, 3, 3, 0, "block 1 mixd"), (1, 3, 2, 0, "block 2 mix1"), (2, 3, 2, 0, "block 3 mix1")]


def test_later_stages_leave_codebook_and_earlier_blocks_bit_identical(finished):
    out, _, seen = finished
    final = load_file(out / "model.safetensors")
    for stage, before in seen.weights.items():
        after = seen.weights.get(stage + 1, final)
        assert {name.split(".")[2] for name in before if name.startswith("prior.blocks.")} == set("012"[:stage])
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]), name
        new = {name: t for name, t in after.items() if name not in before}
        assert all(name.startswith(f"prior.blocks.{stage}.") for name in new)


def test_every_stage_trains_its_block(finished, tiny_run):
    """Against the same blocks as they are built: everything moved, the codebook included."""
    final = load_file(finished[0] / "model.safetensors")
    config = replace(tiny_run().model, vocab_size=27)
    with seeded(0):
        model = TarFlowLM(config.first_blocks(1))
    model.config = config
    for stage in (1, 2):
        with seeded(1000 * stage):
            model.append_block()
    for name, start in model.state_dict().items():
        # a Mix-1 weight or a residual branch may start at zero and wait for another to move
        if name.startswith("codebook") or name.endswith(("input.linear.weight", "biases.1", "weight_head.bias")):
            assert not torch.equal(start, final[name]), name


def test_a_stage_advances_when_its_bound_stalls(tmp_path, tiny_run, go, read_metrics):
    # no improvement is large enough: the first evaluation sets the mark, the next two stall
    run = tiny_run(
        stage_steps=(50, 50, 3), advance="stall", stall_evaluations=2, stall_tolerance=1e9, log_every=100,
        checkpoint_every=100,
    )  # fmt: skip
    summary = go(run, tmp_path / "run")
    assert summary["steps"] == 6 + 6 + 3
    assert summary["stage_tokens"] == [6 * 32, 6 * 32, 3 * 32]
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["split"] == "valid"] == [2, 4, 6, 8, 10, 12, 14, 15]


def test_joint_training_moves_every_block_in_one_stage(tmp_path, tiny_run, go, read_metrics):
    run = tiny_run(
        stage_steps=(4,), mode="joint", model={"couplings": ("affine", "mix1", "mixd"), "components": (1, 2, 3)}
    )
    seen = Snapshots(tmp_path / "run")
    summary = go(run, tmp_path / "run", seen)
    assert seen.stages == [(0, 1, 4, 0, "all blocks")]
    assert (summary["steps"], len(summary["stage_valid_bpc"])) == (4, 1)
    final = load_file(tmp_path / "run" / "model.safetensors")
    with seeded(0):
        start = TarFlowLM(replace(run.model, vocab_size=27)).state_dict()
    assert start.keys() == final.keys()
    for block in range(3):
        name = f"prior.blocks.{block}.input.linear.weight"
        assert not torch.equal(start[name], final[name])
    assert {line["block"] for line in read_metrics(tmp_path / "run")} == {1}


def test_the_baseline_trains_in_one_stage_and_its_likelihood_is_exact(tmp_path, tiny_baseline, go):
    summary = go(tiny_baseline(), tmp_path / "run")
    assert (summary["steps"], summary["test"]["bound"]) == (5, "exact")
    assert summary["stage_valid_bpc"][0] < math.log2(27) + 0.5


def test_same_seed_same_run_and_another_seed_another(tmp_path, tiny_run, go, finished, same_weights):
    go(tiny_run(), tmp_path / "again")
    go(tiny_run(seed=1), tmp_path / "other")
    assert same_weights(tmp_path / "again", finished[0])
    assert not same_weights(tmp_path / "other", finished[0])


def test_bfloat16_products_leave_weights_and_bounds_in_float32(tmp_path, tiny_run, go):
    summary = go(tiny_run(precision="bfloat16"), tmp_path / "run")
    assert math.isfinite(summary["test"]["bpc"])
    assert {t.dtype for t in load_file(tmp_path / "run" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("mode", "stage", "name", "blamed"),
    [
        ("progressive", 1, "prior.blocks.1.coupling.head.weights.1", "log-det of block 2"),
        ("joint", 0, "prior.blocks.1.coupling.head.biases.0", "log-det of block 2"),
        ("joint", 0, "prior.blocks.0.start", "log-det of block 1"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_culprit(
    tmp_path, tiny_run, go, monkeypatch, mode, stage, name, blamed
):
    train_stage = lifecycle.train_stage

    def poisoned(run):
        if run.counters.stage == stage:
            dict(run.model.named_parameters())[name].data.fill_(math.nan)
        return train_stage(run)

    monkeypatch.setattr(lifecycle, "train_stage", poisoned)
    run = tiny_run(mode=mode, stage_steps=(4,) if mode == "joint" else (3, 4, 2), log_every=3, evaluate_every=100)
    run = replace(run, train=replace(run.train, checkpoint_every=100))
    with pytest.raises(FloatingPointError) as raised:
        go(run, tmp_path / "run")
    message = str(raised.value)
    terms, parameters = message.split("; ")[:2]
    assert "\n" not in message
    assert blamed in terms
    assert "4 in a row" in message
    assert "reconstruction" not in terms
    assert "log_q" not in terms
    assert parameters == f"parameters {name}"
    if mode == "progressive":
        # the last good weights are those of the end of stage 1
        assert load_checkpoint(tmp_path / "run").info["blocks"] == "1"


def test_a_baseline_that_is_not_finite_stops_too(tmp_path, tiny_baseline, go, monkeypatch):
    train_stage = lifecycle.train_stage

    def poisoned(run):
        run.model.head.bias.data[0] = math.inf
        return train_stage(run)

    monkeypatch.setattr(lifecycle, "train_stage", poisoned)
    with pytest.raises(FloatingPointError, match=r"log_prob; parameters head\.bias"):
        go(tiny_baseline(checkpoint_every=100), tmp_path / "run")


def test_what_cannot_start_leaves_no_directory(tmp_path, tiny_run, go):
    out, run = tmp_path / "deep" / "run", tiny_run()
    short = tmp_path / "short.txt"
    short.write_text("too short a text for three windows of it", encoding="utf-8")
    impossible = {
        r"no file and no corpus name": replace(run, data=replace(run.data, source=str(tmp_path / "missing.txt"))),
        r"split .* has \d+ tokens, fewer than the context of 16": replace(
            run, data=replace(run.data, source=str(short))
        ),
        r"vocab_size 5: the tokenizer has 27": replace(run, model=replace(run.model, vocab_size=5)),
    }
    for message, wrong in impossible.items():
        with pytest.raises(UserError, match=message):
            go(wrong, out)
        assert not out.parent.exists()


def test_a_kill_between_the_first_two_files_is_no_dead_end(tmp_path, tiny_run, go):
    """The manifest takes its place before the file that it lists."""
    write_manifest(tmp_path, ())
    for name in (".config.json.abc.tmp", ".lock"):
        (tmp_path / name).touch()
    assert go(tiny_run(), tmp_path)["steps"] == 7


def test_a_start_that_saved_nothing_may_be_begun_again(tmp_path, tiny_run, go, read_metrics):
    """As one that ran out of memory: with other options, since the same ones would fail again."""

    class Dies(Reporter):
        def step(self, num_tokens, share=None):
            raise MemoryError

    with pytest.raises(MemoryError):
        go(tiny_run(log_every=1), tmp_path / "run", Dies())
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    go(tiny_run(stage_steps=(1, 1, 1)), tmp_path / "run")
    go(tiny_run(stage_steps=(1, 1, 1)), tmp_path / "other")
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "other")
    # but not a folder of another program with files of these names
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        go(tiny_run(), tmp_path / "foreign")


def test_an_existing_directory_is_left_alone(tmp_path, tiny_run, go):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        go(tiny_run(), tmp_path)
    with pytest.raises(UserError, match="exists already"):
        go(tiny_run(), tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_directory_may_be_used(tmp_path, tiny_baseline, go):
    assert go(tiny_baseline(stage_steps=(1,)), tmp_path)["steps"] == 1


@pytest.mark.parametrize(
    ("mode", "steps"), [("progressive", (3, 2)), ("progressive", (3,)), ("joint", (3, 2)), ("joint", (0,))]
)
def test_stages_must_fit_the_mode(tiny_run, mode, steps):
    with pytest.raises(UserError, match="stage_steps"):
        tiny_run(mode=mode, stage_steps=steps)
