"""The draft of a run: trained beside a frozen model, stored, resumed, exported and found."""

import errno
import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from tarflowlm.draft import DraftConfig
from tarflowlm.errors import Stopped, UserError
from tarflowlm.generation import generate
from tarflowlm.language_model import seeded
from tarflowlm.runs.checkpoint import export, load_checkpoint, seal
from tarflowlm.runs.drafts import load_draft, save_draft
from tarflowlm.training.draft import DraftTraining, train_draft
from tarflowlm.training.draft_pairs import draft_loss, draw_frontiers, guesses, pairs_of, tokens_per_pass

CONFIG = DraftConfig(width=8, hidden=16, past=2, ahead=3)
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
    options.setdefault("training", DraftTraining(steps=5, batch_size=2, evaluate_every=2))
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
    learn(run_directory, training=DraftTraining(steps=120, batch_size=4, evaluate_every=60))
    lines = [json.loads(line) for line in (run_directory / "draft" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < 0.8 * losses[0]


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
    training = DraftTraining(minutes=1e-6, batch_size=2)
    assert learn(run_directory, training=training)["steps"] == 1


@pytest.mark.parametrize(("evaluate_every", "steps", "seconds"), [(40, 80, 120.0), (39, 78, 118.0), (50, 80, 120.0)])
def test_the_last_measurement_is_within_the_time(run_directory, monkeypatch, evaluate_every, steps, seconds):
    now = [0.0]

    class Timed:
        def __init__(self, before):
            now[0] = before

        def seconds(self):
            return now[0]

    def takes(seconds, made):
        def call(*args):
            now[0] += seconds
            return made(*args)

        return call

    monkeypatch.setattr("tarflowlm.training.draft.Clock", Timed)
    monkeypatch.setattr("tarflowlm.training.draft.draft_loss", takes(1.0, draft_loss))
    monkeypatch.setattr("tarflowlm.training.draft.tokens_per_pass", takes(20.0, tokens_per_pass))
    training = DraftTraining(minutes=2.0, batch_size=2, evaluate_every=evaluate_every)
    summary = learn(run_directory, training=training)
    assert (summary["steps"], summary["seconds"]) == (steps, seconds)
    assert learn(run_directory, training=None, resume=True)["steps"] == steps


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


@pytest.mark.parametrize("full", ["write_json", "save_state"])
def test_a_full_disk_names_a_remedy_that_works(run_directory, monkeypatch, full):
    """At the end, with a state; and before the first one."""

    def fail(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"tarflowlm.training.draft.{full}", fail)
        with pytest.raises(UserError, match="No space left on device") as raised:
            learn(run_directory)
    if full == "write_json":
        assert "continue with" in str(raised.value)
        learn(run_directory, resume=True)
    else:
        assert f"remove {run_directory / 'draft'} and start again with" in str(raised.value)
        shutil.rmtree(run_directory / "draft")
        learn(run_directory)
    assert load_checkpoint(run_directory).model.draft is not None


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


def test_sealing_accepts_the_draft_as_it_is(run_directory):
    learn(run_directory)
    (run_directory / "draft" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"or remove .*draft, the model works without"):
        load_checkpoint(run_directory)
    seal(run_directory)
    assert load_checkpoint(run_directory).model.draft is not None


@pytest.mark.parametrize("patch", [1, 2])
def test_guesses_are_of_the_positions_ahead(patch, tiny_flow):
    """A draft that adds nothing repeats the features of the frontier, and guesses see what lies behind them alone."""
    model = tiny_flow(couplings=("mixd",), patch=patch, context=16, log_std=-6.0)
    tokens = torch.randint(5, (2, 16), generator=torch.Generator().manual_seed(0))
    pairs = pairs_of(model, tokens, torch.Generator().manual_seed(1))
    N = 16 // patch
    assert torch.equal(pairs.tokens, tokens.view(2, N, patch))
    draft = model.new_draft(CONFIG).double()
    front = torch.arange(N - CONFIG.ahead).expand(2, -1)
    for guessed in guesses(draft, pairs, front):
        assert torch.equal(guessed, pairs.features[:, : N - CONFIG.ahead])
    with seeded(0):
        nn.init.normal_(draft.out.weight)
    changed = replace(pairs, z=pairs.z.clone(), features=pairs.features.clone())
    changed.z[:, 4:] += 1.0
    changed.features[:, 4:] += 1.0
    for i, (one, other) in enumerate(
        zip(guesses(draft, pairs, front), guesses(draft, changed, front), strict=True), 1
    ):
        same = (one == other).all(-1).all(0)
        # the guess of position n + i reads features up to n and latents up to n + i - 1
        assert same[: min(4, 5 - i)].all()
        assert not same[min(4, 5 - i) :].any()


@pytest.mark.parametrize("coupling", ["mixd", "mix1", "affine"])
def test_the_loss_is_least_at_the_features_themselves(coupling, tiny_flow):
    model = tiny_flow(couplings=(coupling,), context=16)
    random = torch.Generator().manual_seed(0)
    pairs = pairs_of(model, torch.randint(5, (2, 16), generator=random), torch.Generator().manual_seed(1))
    block = model.prior.block(0).coupling
    exact = block.divergence(pairs.features, pairs.features, pairs.z)
    torch.testing.assert_close(exact, torch.zeros(2, 16, dtype=torch.float64), rtol=0, atol=1e-12)
    guessed = (pairs.features + 0.5 * torch.randn(pairs.features.shape, generator=random)).requires_grad_()
    off = block.divergence(pairs.features, guessed, pairs.z)
    assert off.mean() > 0
    assert torch.autograd.grad(off.sum(), guessed)[0].abs().sum() > 0


def test_tokens_per_pass_counts_up_to_the_first_wrong_draft(tiny_flow):
    model = tiny_flow(couplings=("mixd",), context=16, log_std=-6.0)
    tokens = torch.randint(1, 5, (2, 16), generator=torch.Generator().manual_seed(0))
    pairs = pairs_of(model, tokens, torch.Generator().manual_seed(1))
    draft = model.new_draft(CONFIG).double()

    class Knowing(type(draft)):
        def start(self, features):
            return torch.arange(2 * 16).view(2, 16, 1)

        def step(self, state, features, z):
            step = next(self.steps)
            known = pairs.features.flatten(0, 1)[state[:, 0] + step]
            # latents that are not a number decode to token 0, which is not there
            return state, known if step <= self.right else torch.full_like(known, torch.nan)

    draft.__class__ = Knowing
    for right, expected in ((3, 4.0), (1, 2.0)):
        draft.right, draft.steps = right, iter(range(1, 10))
        assert tokens_per_pass(model, draft, pairs) == pytest.approx(2 * 16 / (2 * -(-15 // expected) + 2))


def test_frontiers_leave_room_for_drafts(tiny_flow):
    model = tiny_flow(couplings=("mixd",), context=16, log_std=-6.0)
    pairs = pairs_of(model, torch.randint(5, (2, 16)), torch.Generator().manual_seed(1))
    draft = model.new_draft(CONFIG).double()
    front = draw_frontiers(draft, pairs, 50, torch.Generator().manual_seed(2))
    assert front.shape == (2, 50)
    assert front.unique().tolist() == list(range(16 - CONFIG.ahead))
    assert draft_loss(model, draft, pairs, front) > 0


def test_a_finished_training_has_nothing_to_do(run_directory):
    first = learn(run_directory)
    before = tensors(run_directory)
    again = learn(run_directory, training=None, resume=True)
    assert (again["steps"], again["tokens_per_pass"]) == (first["steps"], first["tokens_per_pass"])
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(run_directory).items())


def test_a_folder_without_weights_or_state_is_no_draft(run_directory):
    (run_directory / "draft").mkdir()
    assert learn(run_directory)["steps"] == 5


def test_an_exported_draft_is_removed_to_start_again(run_directory, tmp_path):
    learn(run_directory)
    out = export(run_directory, tmp_path / "out")
    with pytest.raises(UserError, match="exists already: remove it to start again"):
        learn(out)


def test_nothing_is_left_of_a_copy_that_could_not_begin(run_directory, tmp_path):
    with pytest.raises(UserError):
        learn(run_directory, data=str(tmp_path / "missing.txt"), out=tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_the_draft_follows_its_model(run_directory):
    learn(run_directory)
    model = load_checkpoint(run_directory).model.double()
    assert {p.dtype for p in model.draft.parameters()} == {torch.float64}
    slow, fast = (
        generate(model, num_tokens=8, decoder=decoder, generator=torch.Generator().manual_seed(0))
        for decoder in ("sequential", "drafted")
    )
    assert torch.equal(slow.tokens, fast.tokens)
