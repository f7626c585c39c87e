"""One writer per run directory."""

import pytest
import torch
from tarflowlm.training.lifecycle import resume, train

from tarflowlm.errors import UserError
from tarflowlm.files import LOCK, writer_lock
from tarflowlm.training.metrics import Reporter


def test_a_run_cannot_be_begun_or_resumed_twice(tmp_path, tiny_run, go, same_weights):
    out, run, refused = tmp_path / "run", tiny_run(), []

    class Second(Reporter):
        def step(self, num_tokens, share=None):
            for again in (lambda: resume(out, device=torch.device("cpu")), lambda: go(run, out)):
                with pytest.raises(UserError) as raised:
                    again()
                refused.append(str(raised.value))

    go(run, out, Second())
    assert len(refused) == 14
    assert all("is being written by" in message or "exists already" in message for message in refused)
    assert any("is being written by" in message for message in refused)
    go(run, tmp_path / "alone")
    assert same_weights(out, tmp_path / "alone")


def test_a_run_that_began_meanwhile_is_not_overwritten(tmp_path, tiny_run, go, monkeypatch):
    """Between the look at the directory and its lock another run may have begun and ended there."""
    out, run, done = tmp_path / "run", tiny_run(), []

    class Faster(Reporter):
        def notice(self, text):
            pass

    def mkdir(self, **options):
        real(self, **options)
        if self == out and not done:
            done.append(None)
            go(run, out)
            done.append((out / "metrics.jsonl").read_bytes())

    real = type(out).mkdir
    monkeypatch.setattr(type(out), "mkdir", mkdir)
    with pytest.raises(UserError, match="exists already"):
        train(run, out, device=torch.device("cpu"), reporter=Faster())
    assert (out / "metrics.jsonl").read_bytes() == done[1]


def test_a_directory_with_nothing_but_a_lock_is_free(tmp_path, tiny_baseline, go):
    with writer_lock(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} <= {LOCK}
    go(tiny_baseline(stage_steps=(1,)), tmp_path)
