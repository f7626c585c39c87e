"""`train --from`: a model is trained further on another text, and whatever interrupts that."""

import random
from dataclasses import replace

import pytest
import torch
from training_cases import CPU, Killer, assert_same_run, cut, resume

from helpers import metrics_of
from tarflowlm.data import TEXT8_ALPHABET, CharTokenizer, load_tokenizer
from tarflowlm.errors import UserError
from tarflowlm.runs.checkpoint import load_checkpoint, locate, read_run
from tarflowlm.runs.weights import checksum
from tarflowlm.training.configure import tuning
from tarflowlm.training.train import train
from tarflowlm_apps.hub.card import model_card


@pytest.fixture(scope="module")
def other_text(tmp_path_factory):
    """About 3,000 characters of words that `corpus_file` does not have."""
    path, rng = tmp_path_factory.mktemp("other") / "other.txt", random.Random(5)
    path.write_text(
        " ".join(rng.choice(["verily", "begat", "unto", "lord", "said"]) for _ in range(500)),
        "utf-8",
    )
    return str(path)


def tuned(parent, text, **options):
    """The configuration of a short tuning run."""
    run = tuning(parent, text, **({"steps": 7, "seed": 3} | options))
    return replace(
        run, train=replace(run.train, precision="float32", checkpoint_every=4, evaluate_every=4)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["progressive", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("joint", "baseline"))],
)
def test_tuning_begins_with_the_parent(name, runs, other_text, tmp_path):
    # a rate of next to nothing leaves the model as it was, in every stage
    parent = load_checkpoint(runs[name])
    train(tuned(parent, other_text, lr=1e-12), tmp_path / "run", device=CPU, parent=parent)
    child = load_checkpoint(tmp_path / "run")
    for key, tensor in parent.model.state_dict().items():
        torch.testing.assert_close(
            child.model.state_dict()[key], tensor, rtol=0, atol=1e-9, msg=key
        )
    assert child.tokenizer.fingerprint == parent.tokenizer.fingerprint
    assert child.run.parent == f"{name}@{checksum(parent.model.state_dict())}"
    assert child.run.model == parent.run.model


def test_tuning_asks_no_tracker_and_no_compiler_of_the_parent(runs, other_text):
    parent = load_checkpoint(runs["progressive"])
    theirs = replace(parent.run.train, track=("wandb",), compile=True)
    run = tuning(replace(parent, run=replace(parent.run, train=theirs)), other_text)
    assert (run.train.track, run.train.compile) == ((), None)


@pytest.mark.slow
def test_tuning_learns_the_text_and_a_kill_changes_nothing(runs, other_text, tmp_path):
    parent, counter = load_checkpoint(runs["progressive"]), Killer()
    run = tuned(parent, other_text, steps=24, lr=6e-3)
    options = {"device": CPU, "parent": parent}
    train(run, tmp_path / "whole", reporter=counter, **options)
    valid = [line["bpc"] for line in metrics_of(tmp_path / "whole") if line["split"] == "valid"]
    assert min(valid) < valid[0] - 0.2
    out = tmp_path / "killed"
    cut(run, out, random.Random(1).randrange(2, counter.events), parent=parent)
    resume(out)  # without the parent, of which the run keeps the weights and the tokenizer
    assert_same_run(tmp_path / "whole", out)
    assert read_run(tmp_path / "whole").parent.startswith("progressive@")
    assert "| tuned from | `progressive`" in model_card(load_checkpoint(out), out, "mine", None)


def test_what_does_not_fit_is_refused(runs, other_text, tmp_path):
    parent = load_checkpoint(runs["progressive"])
    for options, words in (
        ({"minutes": 0.0}, "minutes 0"),
        ({"lr": -1.0}, r"optim.lr -1.0"),
        ({"steps": 2}, "steps 2"),
    ):
        with pytest.raises(UserError, match=words):
            tuning(parent, other_text, **options)
    with pytest.raises(UserError, match=r"parent progressive@.*: give that model"):
        train(tuning(parent, other_text), tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


def test_texts_in_other_letters_are_refused(tmp_path):
    letters, pieces = CharTokenizer(TEXT8_ALPHABET), load_tokenizer(locate("english-small"))
    parent = load_checkpoint(locate("english-mini"))
    text = tmp_path / "text.txt"
    for words, tokenizer, refusal in (
        ("Für größere Bögen ", letters, r"of the letters .* not a-z"),
        ("Съешь ещё этих булок ", pieces, r"1\.\d tokens .* for a character"),
    ):
        text.write_text(words * 50, encoding="utf-8")
        with pytest.raises(UserError, match=rf"{refusal}.*train english-small --data"):
            tuning(replace(parent, tokenizer=tokenizer), str(text))
    text.write_text(
        "Façade and naïve are rare in English. " + "So they pass. " * 400, encoding="utf-8"
    )
    for tokenizer in (letters, pieces):
        tuning(replace(parent, tokenizer=tokenizer), str(text))
