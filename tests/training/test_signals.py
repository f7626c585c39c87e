"""SIGTERM and SIGINT save the run and leave; what is resumed is the run that was never stopped."""

import os
import signal

import pytest
import torch
from tarflowlm.training.lifecycle import resume, train

from tarflowlm.cli.main import main
from tarflowlm.cli.signals import stop_on_signals
from tarflowlm.errors import Stopped
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.terminal.training import ProgressReporter
from tarflowlm.training import parallel
from tarflowlm.training.metrics import Reporter

CPU = torch.device("cpu")


class Sender(Reporter):
    """Sends this process a signal at one of the run's events."""

    def __init__(self, event: str, at: int, number: int = signal.SIGTERM, times: int = 1) -> None:
        self.event, self.at, self.number, self.times, self.seen = event, at, number, times, 0

    def _event(self, event: str) -> None:
        if event == self.event:
            self.seen += 1
            if self.seen == self.at:
                for _ in range(self.times):
                    os.kill(os.getpid(), self.number)

    def step(self, num_tokens, share=None):
        self._event("step")

    def record(self, record):
        self._event(record["split"])

    def notice(self, text):
        self._event(text.split()[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_run, go):
    out, run = tmp_path_factory.mktemp("whole") / "run", tiny_run(log_every=3, stage_steps=(3, 2, 3), test_windows=3)
    go(run, out)
    return run, out


EVENTS = {
    "first-step": ("step", 1, 1, signal.SIGTERM),
    "between-lines": ("step", 4, 4, signal.SIGINT),
    "before-an-evaluation": ("step", 6, 6, signal.SIGTERM),
    "last-step": ("step", 8, 8, signal.SIGINT),
    "after-an-evaluation": ("valid", 2, 4, signal.SIGTERM),
    "in-the-test-evaluation": ("evaluating", 1, 8, signal.SIGINT),
}


@pytest.mark.parametrize(("event", "at", "step", "number"), EVENTS.values(), ids=EVENTS.keys())
def test_a_stopped_run_is_saved_and_goes_on_to_the_same_bits(
    tmp_path, whole, same_weights, read_metrics, event, at, step, number
):
    run, never_stopped = whole
    out, before = tmp_path / "run", [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped) as raised:
        train(run, out, device=CPU, reporter=Sender(event, at, number), stop_requests=stop_on_signals)
    assert str(raised.value) == (
        f"stopped by {signal.Signals(number).name} and saved at step {step}; continue with "
        f"`tarflowlm train --resume {out}`"
    )
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert load_checkpoint(out).info["step"] == str(step)
    resume(out, device=CPU)
    assert same_weights(out, never_stopped)
    assert same_weights(out / "best", never_stopped / "best")
    assert read_metrics(out) == read_metrics(never_stopped)


def test_a_stop_in_an_evaluation_that_no_checkpoint_precedes_saves_first(
    tmp_path, tiny_run, go, same_weights, read_metrics, monkeypatch
):
    run = tiny_run(stage_steps=(3, 2, 3), evaluate_every=2, checkpoint_every=100, test_windows=3)
    go(run, tmp_path / "whole")
    evaluate, calls = parallel.evaluate, []

    def signalled(*args, **options):
        calls.append(None)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "evaluate", signalled)
        with pytest.raises(Stopped, match="saved at step 2"):
            train(run, tmp_path / "cut", device=CPU, stop_requests=stop_on_signals)
    resume(tmp_path / "cut", device=CPU)
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_at_once(tmp_path, whole, number):
    run, _ = whole
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "run", device=CPU, reporter=Sender("step", 4, number, 2), stop_requests=stop_on_signals)
    assert signal.getsignal(signal.SIGTERM) == before
    # the checkpoint of step 3, the end of the first stage
    assert load_checkpoint(tmp_path / "run").info["step"] == "3"


def test_without_stop_requests_no_handler_is_touched(tmp_path, tiny_baseline, go):
    class Looks(Reporter):
        def step(self, num_tokens, share=None):
            seen.append(signal.getsignal(signal.SIGTERM))

    seen, before = [], signal.getsignal(signal.SIGTERM)
    go(tiny_baseline(stage_steps=(1,)), tmp_path / "run", Looks())
    assert seen == [before]


@pytest.mark.parametrize(("times", "status"), [(1, 75), (2, 130)])
def test_the_command_line_has_a_status_of_its_own_for_it(tmp_path, corpus_file, monkeypatch, capsys, times, status):
    out = tmp_path / "run"
    step, sender = ProgressReporter.step, Sender("step", 1, signal.SIGTERM, times)

    def signalled(self, num_tokens, share):
        step(self, num_tokens, share)
        sender.step(num_tokens)

    monkeypatch.setattr(ProgressReporter, "step", signalled)
    argv = ["train", "mini-ar", "--out", str(out), "--data", str(corpus_file), "--steps", "3", "--device", "cpu"]
    argv += ["--model.context", "16", "--model.trunk.width", "32", "--model.layers", "1"]
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    torch.set_flush_denormal(False)
    assert stopped.value.code == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert "tarflowlm train --resume" in last
    assert "Traceback" not in last
    if status == 75:
        assert f"saved at step 1; continue with `tarflowlm train --resume {out}`" in last
        monkeypatch.undo()
        main(["train", "--resume", str(out), "--device", "cpu", "--json"])
        torch.set_flush_denormal(False)
        assert (out / "summary.json").exists()
