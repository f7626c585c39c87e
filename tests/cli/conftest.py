"""A text, tiny untrained models as run directories, and one tiny run that the command line trained."""

import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from command_cases import TINY, save_untrained

from tarflowlm.cli.main import main
from tarflowlm.data import TEXT8_ALPHABET


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def private_places(cache, monkeypatch):
    """No test reads or fills the user's cache; lines have a known length."""
    monkeypatch.setenv("TARFLOWLM_CACHE", cache)
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def interruptible():
    """A shell that runs the tests in the background has them, and what they start, ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """About 8,000 characters of words made up of a-z."""
    rng = random.Random(1)
    words = ["".join(rng.choices(TEXT8_ALPHABET[1:], k=rng.randint(1, 7))) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(rng.choice(words) for _ in range(1600)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory, text_file, tiny_flow, tiny_ar) -> dict[str, Path]:
    """Untrained models of text8 with a context of 16: their texts are random, but must be shown and kept rightly."""
    root, fields = tmp_path_factory.mktemp("models"), {"vocab_size": 27, "context": 16}
    built = {
        "ar": tiny_ar(**fields),
        "patches-ar": tiny_ar(patch=2, **fields),
        "one": tiny_flow(couplings=("mixd",), **fields),
        "flow": tiny_flow(couplings=("mixd", "mix1"), **fields),
        "patches": tiny_flow(couplings=("mixd", "mix1"), patch=2, **fields),
        "affine": tiny_flow(couplings=("affine", "mix1"), **fields),
    }
    return {name: save_untrained(root / name, model, text_file) for name, model in built.items()}


@pytest.fixture
def model(models) -> Path:
    return models["flow"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, cache, text_file) -> Path:
    """A finished run of three blocks, six steps long."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TARFLOWLM_CACHE", cache)
        main(["train", "mini-mixd", "--out", str(out), "--data", str(text_file), "--steps", "6", *TINY])
    torch.set_flush_denormal(False)
    return out


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of the trained run, to be damaged or resumed."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))
