"""The draft of a run: trained beside a frozen model, stored, resumed, exported and found."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch

from tarflowlm.draft import DraftConfig
from tarflowlm.errors import Stopped, UserError
from tarflowlm.flow.transformer import TransformerConfig
from tarflowlm.generation import generate
from tarflowlm.language_model import seeded
from tarflowlm.runs.checkpoint import export, load_checkpoint
from tarflowlm.runs.drafts import load_draft, save_draft
from tarflowlm.training.draft import DraftTraining, train_draft
from tarflowlm.training.draft_pairs import OUTSIDE, draft_loss, guesses, pairs_of, tokens_per_pass

CONFIG = DraftConfig(layers=1, trunk=TransformerConfig(width=8, num_heads=2, mlp_ratio=2), past=2, ahead=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(tiny_run, go, tmp_path_factory):
    """A finished run, to be copied."""
    out = tmp_path_factory.mktemp("finished") / "run"
    go(tiny_run(), out)
    return out


@pytest.fixture
def run_directory(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def learn(directory, **options):
    options.setdefault("training", DraftTraining(steps=5, batch_size=2, frontiers=3, evaluate_every=2))
    return train_draft(directory, config=CONFIG, device=CPU, **options)


def tensors(directory):
    draft = load_checkpoint(directory).model.draft
    return draft.state_dict()


def test_a_trained_draft_is_found_and_the_model_stays_as_it_was(run_directory, same_weights, finished):
    summary = learn(run_directory)
    assert summary["steps"] == 5
    assert 1 <= summary["tokens_per_pass"] <= 4
    assert json.loads((run_directory / "draft" / "summary.json").read_text()) == summary
    assert same_weights(run_directory, finished)
    model = load_checkpoint(run_directory).model
    assert model.draft.config == CONFIG
    assert not [name for name in model.state_dict() if "draft" in name]
    slow, fast = (
        generate(model, num_tokens=16, num=2, decoder=decoder, generator=torch.Generator().manual_seed(0))
        for decoder in ("sequential", "drafted")
    )
    assert torch.equal(slow.tokens, fast.tokens)


def test_training_lowers_the_loss(run_directory):
    learn(run_directory, training=DraftTraining(steps=120, batch_size=4, frontiers=8, evaluate_every=60))
    lines = [json.loads(line) for line in (run_directory / "draft" / "metrics.jsonl").read_text().splitlines()]
    model = load_checkpoint(run_directory).model
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < 0.9 * torch.tensor(model.config.vocab_size).log()


def test_a_stopped_training_resumes_to_the_same_draft(run_directory, tmp_path):
    whole = shutil.copytree(run_directory, tmp_path / "whole")
    learn(whole)

    @contextmanager
    def at_third_step():
        calls = iter(range(100))
        yield lambda: "SIGTERM" if next(calls) == 2 else None

    with pytest.raises(Stopped, match=r"at step 3; continue with `tarflowlm draft .* --resume`"):
        learn(run_directory, stop_requests=at_third_step)
    assert load_checkpoint(run_directory).model.draft is not None
    assert learn(run_directory, training=None, resume=True)["steps"] == 5
    ours, theirs = tensors(run_directory), tensors(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # more steps than before
    assert learn(run_directory, training=DraftTraining(steps=7), resume=True)["steps"] == 7


def test_time_ends_a_training(run_directory):
    training = DraftTraining(minutes=1e-6, batch_size=2, frontiers=3)
    assert learn(run_directory, training=training)["steps"] == 1


def test_export_takes_the_draft_along(run_directory, tmp_path):
    learn(run_directory)
    for half in (False, True):
        out = export(run_directory, tmp_path / str(half), half=half)
        assert sorted(path.name for path in (out / "draft").iterdir()) == [
            "config.json", "draft.safetensors", "manifest.json",
        ]  # fmt: skip
        ours, theirs = tensors(out), tensors(run_directory)
        tolerance = 1e-2 if half else 0.0
        assert all(torch.allclose(ours[n], theirs[n], rtol=tolerance, atol=0.0) for n in theirs)


def test_a_copy_gets_the_draft_and_the_run_none(run_directory, tmp_path):
    learn(run_directory, out=tmp_path / "copy")
    assert load_checkpoint(tmp_path / "copy").model.draft is not None
    assert load_checkpoint(run_directory).model.draft is None


def test_a_baseline_has_no_block_1(tiny_baseline, go, tmp_path):
    go(tiny_baseline(), tmp_path / "run")
    with pytest.raises(UserError, match="is a baseline, which has no block 1"):
        learn(tmp_path / "run")


def test_a_run_is_finished_first(run_directory):
    (run_directory / "summary.json").unlink()
    with pytest.raises(UserError, match="is not finished: continue it with `tarflowlm train --resume"):
        learn(run_directory)


def test_a_draft_is_not_overwritten_and_nothing_is_not_resumed(run_directory):
    with pytest.raises(UserError, match="holds no training state"):
        learn(run_directory, resume=True)
    learn(run_directory)
    with pytest.raises(UserError, match="exists already: continue it with --resume"):
        learn(run_directory)


def test_another_text_is_not_resumed(run_directory, tmp_path):
    learn(run_directory)
    other = tmp_path / "other.txt"
    other.write_text("the cat sat on the mat and saw " * 60, encoding="utf-8")
    with pytest.raises(UserError, match="was trained on another text"):
        learn(run_directory, data=str(other), resume=True)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"minutes": -1.0}, {"lr": 0.0}, {"frontiers": 0}, {"seed": -1}], ids=str
)
def test_training_out_of_range(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        DraftTraining(**wrong)


def test_a_damaged_or_foreign_draft_is_named(run_directory, tiny_flow):
    learn(run_directory)
    path = run_directory / "draft" / "draft.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(UserError, match=r"draft.safetensors is damaged.*or remove .*the model works without"):
        load_checkpoint(run_directory)
    path.write_bytes(content)
    other = tiny_flow(vocab_size=9)
    save_draft(run_directory, other.new_draft(CONFIG))
    with pytest.raises(UserError, match=r"draft.safetensors: .* has shape"):
        load_checkpoint(run_directory)
    assert load_draft(run_directory.parent, other) is None


@pytest.mark.parametrize("patch", [1, 2])
def test_targets_are_the_tokens_that_the_noise_gives(patch, tiny_flow):
    model = tiny_flow(couplings=("mixd",), patch=patch, context=16, log_std=-6.0)
    tokens = torch.randint(5, (2, 16), generator=torch.Generator().manual_seed(0))
    pairs = pairs_of(model, tokens, torch.Generator().manual_seed(1))
    found = model.prior.block(0).inverse(pairs.u)
    assert torch.equal(model.codebook.decode(model.prior.patch.inverse(found)), tokens)
    with seeded(0):
        draft = model.new_draft(CONFIG).double()
    N = 16 // patch
    logits, targets = guesses(draft, pairs, torch.tensor([[0, N - 2], [3, N - 1]]))
    assert logits.shape == (4, 4, patch, 5)
    shaped, outside = tokens.view(2, N, patch), torch.full((1, patch), OUTSIDE)
    # the first is a guess of the last known position, from what came before it
    assert torch.equal(targets[0], torch.cat((outside, shaped[0, :3])))
    assert torch.equal(targets[1], torch.cat((shaped[0, N - 3 :], outside)))
    assert torch.equal(targets[2], shaped[1, 2:6])


def test_a_draft_behind_a_wrong_one_hardly_counts():
    targets = torch.zeros(4, 3, 1, dtype=torch.long)
    logits = torch.zeros(4, 3, 1, 2)
    logits[:, 0, 0, 1] = 1.0  # all wrong from the first on
    logits[:, 1:, 0, 0] = 1.0
    loss, share = draft_loss(logits, targets, 3)
    first = torch.nn.functional.cross_entropy(logits[:, 0, 0], targets[:, 0, 0])
    assert 0 <= first - loss < 0.05
    assert share.tolist() == [0.0, 0.0, 0.0]


def test_tokens_per_pass_counts_up_to_the_first_wrong_draft(tiny_flow):
    model = tiny_flow(couplings=("mixd",), context=16, log_std=-6.0)
    tokens = torch.zeros(2, 16, dtype=torch.long)
    pairs = pairs_of(model, tokens, torch.Generator().manual_seed(1))
    draft = model.new_draft(CONFIG).double()
    for favourite, expected in ((0, 4.0), (1, 1.0)):
        with torch.no_grad():
            draft.head.bias[5:10] = 100.0 * (draft.rank.argsort() == favourite)
        assert tokens_per_pass(draft, pairs) == expected
