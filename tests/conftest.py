"""Fixtures shared by all tests: sizes are tiny and everything random comes from a seed."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from filelock import FileLock

from helpers import FLOW, TRUNK, save_run, tiny_flow
from tarflowlm import compiled, flow
from tarflowlm.config import DataConfig, RunConfig, TokenizerConfig, TrainConfig
from tarflowlm.flow.numerics import reference
from tarflowlm.model_config import BaselineConfig


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Handing such small tensors to threads costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory):
    """No test reads or fills the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TARFLOWLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        # where transformers copies the code of an exported model before it is run
        patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        # commands compile nothing beside their work
        patch.setattr(compiled, "start", lambda: None)
        patch.setattr("tarflowlm_apps.address.Serving.compile_steps", lambda args: None)
        yield


@pytest.fixture(scope="session")
def compiled_functions(tmp_path_factory) -> Path:
    """A folder with the compiled functions, which all processes share."""
    place = tmp_path_factory.getbasetemp()
    place = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "compiled"
    with pytest.MonkeyPatch.context() as patch, FileLock(f"{place}.lock"):
        patch.setattr(compiled, "folder", lambda: place)
        assert compiled.prepare()
    return place


@pytest.fixture
def compiled_steps(compiled_functions, monkeypatch):
    """Texts are written by compiled steps."""
    monkeypatch.setattr(compiled, "folder", lambda: compiled_functions)


@pytest.fixture
def accelerator(monkeypatch):
    """The numerics take the path of accelerators, on a CPU."""
    monkeypatch.setattr(flow, "is_eager_cpu", lambda t: False)


@pytest.fixture
def short_search(monkeypatch):
    """A less exact inverse, where every operation takes long."""
    for dtype in (torch.float32, torch.float64):
        monkeypatch.setitem(reference.STEPS, dtype, (3, 3))


@pytest.fixture
def trained(tmp_path) -> Path:
    """A run directory of a tiny model of two blocks, with more in it than a model, trained on a
    file elsewhere.
    """
    model = tiny_flow(vocab_size=27, context=16).eval()
    folder = save_run(
        tmp_path / "run", model, source="/somewhere/else/text.txt", step="1", tokens="128"
    )
    (folder / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): a folder that `make(folder)` fills, once for all processes of pytest."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / f"once-{name}", root / f"once-{name}.done"
        with FileLock(root / f"once-{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def corpus_file(once) -> Path:
    """About 3,000 characters of a-z and spaces."""
    rng = random.Random(3)
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "saw",
        "nine",
        "old",
        "men",
        "quick",
        "dogs",
        "zebra",
    ]
    text = " ".join(rng.choice(words) for _ in range(700))
    folder = once("text", lambda folder: (folder / "words.txt").write_text(text, encoding="utf-8"))
    return folder / "words.txt"


@pytest.fixture(scope="session")
def runs(once, corpus_file) -> dict[str, Path]:
    """Finished runs by name, progressive, joint and the baseline; do not change them."""
    from tarflowlm.training.train import train

    seldom = {"evaluate_every": 3, "evaluate_windows": 5, "test_windows": 3}
    steps = TrainConfig(
        stage_steps=(6, 4, 4),
        batch_size=2,
        log_every=1,
        precision="float32",
        keep_idle=True,
        **seldom,
    )
    progressive = RunConfig(
        name="tiny",
        model=FLOW,
        data=DataConfig(source=str(corpus_file), tokenizer=TokenizerConfig()),
        train=steps,
    )
    joint = replace(progressive, train=replace(steps, mode="joint", stage_steps=(5,)))
    baseline = replace(joint, model=BaselineConfig(context=16, trunk=TRUNK, layers=1))
    asked = {"progressive": progressive, "joint": joint, "baseline": baseline}

    def make(folder: Path) -> None:
        for name, run in asked.items():
            train(run, folder / name, device=torch.device("cpu"))

    root = once("runs", make)
    return {name: root / name for name in asked}


@pytest.fixture
def script(monkeypatch) -> Callable[[str], ModuleType]:
    """script("benchmarks/blimp"): a script of a folder beside the package; it finds those beside
    it.
    """

    def load(name: str) -> ModuleType:
        folder, _, stem = name.rpartition("/")
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / folder)
        return import_module(stem)

    return load


@pytest.fixture
def local_tasks(monkeypatch) -> None:
    """lm-evaluation-harness fetches nothing."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    # its log would be tied to the first test's stderr
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", True)


@pytest.fixture
def run(capsys):
    """run(*argv): exit status, stdout and stderr of the command line."""
    # not at the top: most tests need no command line, and it imports everything
    from tarflowlm.cli.main import main

    def call(*argv: object) -> SimpleNamespace:
        status = 0
        try:
            main([str(a) for a in argv])
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return call


@pytest.fixture
def run_json(run):
    """run_json(*argv): the object that --json prints last."""

    def call(*argv: object) -> dict:
        result = run(*argv, "--json")
        assert result.status == 0, result.err
        return json.loads(result.out.splitlines()[-1])

    return call


@pytest.fixture
def refused(run):
    """refused(*argv, names=[...]): the command ends with status 2 and one line on stderr that holds
    all `names`.
    """

    def call(*argv: object, names: list[str]) -> str:
        result = run(*argv)
        assert result.status == 2, (result.status, result.err)
        assert result.out == ""
        assert result.err.startswith("tarflowlm: ")
        assert result.err.count("\n") == 1, result.err
        for name in names:
            assert name in result.err
        return result.err

    return call
