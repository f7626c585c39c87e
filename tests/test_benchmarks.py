"""Every benchmark runs at a tiny size and prints its rows; models of others have the shape of
ours.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tarflowlm.baseline import TokenLM
from tarflowlm.model_config import BaselineConfig, TransformerConfig

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("command", "rows"),
    [
        (
            "training.py mini-ar mini-mixd --calls 1 --rounds 1 --batch-size 1"
            f" --against {FOLDER.parent}",
            ["mini-ar", "mini-mixd stage 1"],
        ),
        (
            "generation.py english-mini-ar english-mini --length 8 --rounds 1"
            " --batches 2 --compare 1",
            ["english-mini-ar, steps, batch 2", "english-mini, auto, batch 2"],
        ),
        (
            "generation.py english-mini-ar --length 8 --rounds 1 --batches 1 --peers",
            ["GPT-2, generate, batch 1", "exported, prompt look-up, batch 1"],
        ),
        (
            "generation.py --count mini-mixd",
            ["mini-mixd, block 1, draw, call of 8", "mini-mixd, block 2, steps"],
        ),
        ("launches.py mini-passes", ["mini-passes 1", "mini-passes 2"]),
        (
            "evaluation.py english-mini-ar english-mini --windows 1 --rounds 1 --data DATA",
            ["english-mini"],
        ),
        (
            "numerics.py --tokens 8 --channels 2 --components 2 --accuracy 50 --rounds 1",
            ["forward, ours, float32, K = 2", "inverse, ours, float64, K = 2"],
        ),
        ("numerics.py --loss --tokens 16 --rounds 1", ["Mix-d loss"]),
        (
            "scaling.py mini-ar --rounds 1 --batch-size 2",
            ["mini-ar, 1 process", "mini-ar, 2 processes, fsdp"],
        ),
    ],
)
def test_benchmark_prints_its_rows(command, rows, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the water of the people " * 400, encoding="utf-8")
    script, *options = command.replace("DATA", str(text)).split()
    argv = [sys.executable, str(FOLDER / script), *options, "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = {row[""]: row for row in json.loads(done.stdout)["rows"]}
    assert found.keys() >= set(rows)
    if "--against" in command:
        assert found["mini-ar"]["time over the other checkout"] > 0


@pytest.mark.nightly
def test_the_first_hour_of_a_gpu_in_a_minute_on_a_cpu():
    argv = [sys.executable, str(FOLDER / "first_hour.py"), "--tiny", "--steps", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [*rows] == sorted(rows)
    assert len(rows) == 6
    for row in rows.values():
        assert row["expected"].keys() - {"GB"} <= row["found"].keys()
        assert row["found"]["tokens/s"] > 0


HELP = """
import pathlib, runpy, sys
paths = sys.path[1:]
for script in sorted(pathlib.Path(sys.argv[1]).glob("*.py")):
    # as if Python had just started with this file
    sys.path[:], sys.argv = [str(script.parent), *paths], [str(script), "--help"]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
    for name in {"reproduction", *(path.stem for path in script.parent.glob("*.py"))}:
        for module in [one for one in sys.modules if one.split(".")[0] == name]:
            del sys.modules[module]
    print("began", script.stem)
"""


def test_benchmarks_start_from_any_folder(tmp_path, monkeypatch):
    """In one process, since importing torch takes the longest; none finds what another imported."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    argv = [sys.executable, "-c", HELP, str(FOLDER)]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    began = {line for line in done.stdout.splitlines() if line.startswith("began ")}
    assert began == {f"began {path.stem}" for path in FOLDER.glob("*.py")}


@pytest.fixture
def house(tmp_path):
    """A copy of house.py beside a package whose one file has something to count."""
    for name in ("src/tarflowlm/cli", "src/tarflowlm_apps", "docs", "benchmarks"):
        (tmp_path / name).mkdir(parents=True)
    core = tmp_path / "src" / "tarflowlm"
    for name in ("__init__", "config", "model_config", "requests", "options", "cli/options"):
        (core / f"{name}.py").write_text("", encoding="utf-8")
    (core / "config.py").write_text(
        "A, B = 1, 2\n@dataclass\nclass C:\n    KEY: ClassVar[str]\n    field: int\n"
        "    def one(self):\n        async def two(): ...\n",
        encoding="utf-8",
    )
    (core / "cli" / "__init__.py").write_text("", encoding="utf-8")
    tour = "# Tour\n\n## The spine\n\n1. [`config`](../src/tarflowlm/config.py): it.\n\n## End\n"
    (tmp_path / "docs" / "tour.md").write_text(tour, encoding="utf-8")
    shutil.copy(FOLDER / "house.py", tmp_path / "benchmarks")
    return tmp_path / "benchmarks" / "house.py"


def test_the_house_is_counted_beside_its_note(house):
    def printed(*words):
        argv = [sys.executable, str(house), *words]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        return {line[:20].strip(): line[20:].split() for line in done.stdout.splitlines()}

    first = printed("--note")
    # files, KB, functions and constants
    assert [word for word in first["spine"] if "(" not in word] == ["1", "0.1", "2", "2"]
    assert printed()["spine"] == ["1", "0.1", "2", "2"]
    assert printed()["fields and options"] == ["1"]
    (house.parent / "more.py").write_text("X = 1\n", encoding="utf-8")
    assert printed()["benchmarks"][-1] == "(+1)"


def test_peers_have_our_shape_and_are_causal(script):
    pytest.importorskip("transformers")
    shapes = script("benchmarks/shapes")
    trunk = TransformerConfig(width=24, num_heads=2, mlp_ratio=2)
    config = BaselineConfig(vocab_size=5, context=16, trunk=trunk, layers=2)

    def matrices(model: torch.nn.Module, part: str) -> int:
        return sum(
            p.numel() for name, p in model.named_parameters() if part in name and p.ndim == 2
        )

    ours = matrices(TokenLM(config), "transformer.layers.")
    assert matrices(shapes.gpt2(config), "transformer.h.") == ours
    assert 0.9 * ours < matrices(shapes.llama(config), "model.layers.") <= ours
    torch.manual_seed(0)
    tokens = torch.randint(5, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 5
    for make in (shapes.gpt2, shapes.llama):
        model = make(config).train()
        logits = model(input_ids=tokens).logits
        torch.testing.assert_close(logits, model.eval()(input_ids=tokens).logits)
        apart = (model(input_ids=changed).logits - logits).abs().amax((0, 2)) > 1e-6
        assert apart.nonzero().flatten().tolist() == list(range(9, 16))


@pytest.mark.nightly
def test_a_class_at_a_studio_gets_all_its_answers():
    pytest.importorskip("gradio")
    command = "studio.py english-mini --clients 3 --requests 2 --think 0 --bad 12"
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=FOLDER, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "6 of 6 requests were answered with a result" in done.stdout
    assert "a request after them: answered" in done.stdout
