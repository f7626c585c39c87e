"""A text, and a tiny trained run of every family."""

import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from command_cases import FAMILIES, TINY

from tarflowlm.cli.main import main
from tarflowlm.data import TEXT8_ALPHABET


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def private_places(cache, monkeypatch):
    """No test reads or fills the user's cache; lines have a known length."""
    monkeypatch.setenv("TARFLOWLM_CACHE", cache)
    monkeypatch.setenv("COLUMNS", "100")


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
def models(tmp_path_factory, cache, text_file) -> dict[str, Path]:
    """One tiny run of every family, made by the command line."""
    root = tmp_path_factory.mktemp("runs")
    steps = ["--steps", "6", "--train.evaluate-windows", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TARFLOWLM_CACHE", cache)
        for name, layers in FAMILIES.items():
            main(["train", name, "--out", str(root / name), "--data", str(text_file), *steps, *TINY, *layers])
    torch.set_flush_denormal(False)
    return {name: root / name for name in FAMILIES}


@pytest.fixture
def model(models) -> Path:
    return models["mini-mixd"]


@pytest.fixture
def damaged(models, tmp_path) -> Path:
    """A copy of a run to be damaged."""
    return Path(shutil.copytree(models["mini-mixd"], tmp_path / "damaged", ignore=shutil.ignore_patterns("state")))
