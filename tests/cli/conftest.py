"""Tiny untrained models as run directories, and one tiny run that the command line trained."""

import shutil
import signal
from pathlib import Path

import pytest
from command_cases import TINY

from helpers import save_run, tiny_ar, tiny_flow
from tarflowlm.cli.main import main


@pytest.fixture(autouse=True)
def long_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def interruptible():
    """A shell that runs the tests in the background has them, and what they start, ignore
    interrupts.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def models(tmp_path_factory, corpus_file) -> dict[str, Path]:
    """Untrained models of text8 with a context of 16: their texts are random, but must be shown and
    kept rightly.
    """
    root, fields = tmp_path_factory.mktemp("models"), {"vocab_size": 27, "context": 16}
    built = {
        "ar": tiny_ar(**fields),
        "patches-ar": tiny_ar(patch=2, **fields),
        "one": tiny_flow(couplings=("mixd",), **fields),
        "flow": tiny_flow(couplings=("mixd", "mix1"), **fields),
        "patches": tiny_flow(couplings=("mixd", "mix1"), patch=2, **fields),
        "affine": tiny_flow(couplings=("affine", "mix1"), **fields),
    }
    return {name: save_run(root / name, model, source=corpus_file) for name, model in built.items()}


@pytest.fixture
def model(models) -> Path:
    return models["flow"]


@pytest.fixture(scope="session")
def trained(once, corpus_file) -> Path:
    """A finished run of three blocks, six steps long."""
    words = ["--data", str(corpus_file), "--steps", "6", *TINY]
    made = once(
        "mine", lambda out: main(["train", "mini-mixd", "--out", str(out / "mine"), *words])
    )
    return made / "mine"


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of the trained run, to be damaged or resumed."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))
