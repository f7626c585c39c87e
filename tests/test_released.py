"""Models that come with the package, and `export`, which makes one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tarflowlm.flow.conditioner import Conditioner
from tarflowlm.generation import generate
from tarflowlm.pretrained import load
from tarflowlm.runs.checkpoint import export, load_checkpoint, locate
from tarflowlm.runs.hub import FOLDER, released


@pytest.fixture
def shelf(tmp_path, trained, monkeypatch):
    """A shelf of released models with one on it, by the name of tiny."""
    export(load_checkpoint(trained), tmp_path / "shelf" / "tiny")
    monkeypatch.setattr("tarflowlm.runs.hub.FOLDER", tmp_path / "shelf")
    monkeypatch.setattr("tarflowlm.runs.hub.DEFAULT", "tiny")


@pytest.mark.parametrize("half", [False, True])
def test_an_export_loads_and_knows_nothing_of_the_training(tmp_path, trained, half):
    out = export(load_checkpoint(trained), tmp_path / "out", half=half)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert (
        json.loads((out / "config.json").read_text(encoding="utf-8"))["data"]["source"]
        == "./text.txt"
    )
    (ours, _), (theirs, _) = load(out), load(trained)
    stored = load_file(out / "model.safetensors")
    for name, weight in theirs.state_dict().items():
        kept = ours.state_dict()[name]
        assert kept.dtype == torch.float32
        rounded = half and stored[name].dtype == torch.bfloat16
        assert torch.equal(kept, weight.bfloat16().float() if rounded else weight)
    halves = {name for name, weight in stored.items() if weight.dtype == torch.bfloat16}
    assert ("prior.blocks.0.transformer.layers.0.up.weight" in halves) == half
    exact = ("codebook.", "biases", "evidence", "norm", "start", "bias")
    assert not any(part in name for name in halves for part in exact)


@pytest.mark.slow
def test_a_released_model_is_found_by_name(shelf, trained, run_json, run):
    assert released() == ["tiny"]
    model, _ = load("tiny")
    (by_name,) = run_json("sample", "tiny", "--length", 8)["samples"]
    (by_path,) = run_json("sample", trained, "--length", 8)["samples"]
    (unnamed,) = run_json("sample", "--length", 8)["samples"]
    assert by_name == by_path == unnamed
    assert run("edit", "tiny", "--text", "abc", "--strength", "0.5").status == 0
    sample = generate(model, num_tokens=8, generator=torch.Generator().manual_seed(0))
    assert sample.tokens.shape == (1, 8)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir], ids=["file", "folder"])
def test_only_a_run_hides_a_released_model(shelf, tmp_path, trained, monkeypatch, run_json, make):
    monkeypatch.chdir(tmp_path)
    make(Path("tiny"))
    assert locate("tiny") == tmp_path / "shelf" / "tiny"
    assert run_json("info", "tiny")["source"] == "./text.txt"
    if Path("tiny").is_dir():
        shutil.copytree(trained, "tiny", dirs_exist_ok=True)
        assert locate("tiny") == Path("tiny")


def test_a_text_that_is_not_here_is_asked_for(shelf, refused):
    refused("eval", "tiny", names=["text.txt", "--data FILE"])


@pytest.mark.parametrize(
    "command", [["sample"], ["eval"], ["edit", "--text", "a", "--strength", "1"]]
)
def test_an_unknown_model_is_named_with_the_known_ones(shelf, refused, command):
    refused(*command, "no-such-run", names=["no-such-run", "tiny"])


RELEASED = [
    "english-mini",
    "english-mini-ar",
    "english-passes",
    "english-small",
    "stories",
    "stories-ar",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_released_models_generate_and_have_a_card(name):
    model, tokenizer = load(name)
    tokens = generate(model, num_tokens=64, generator=torch.Generator().manual_seed(0)).tokens[0]
    assert len(tokens) == 64
    # of a character model these are 64 characters
    assert len(tokenizer.decode(tokens)) == tokenizer.characters_per_token[tokens].sum()
    card = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    assert card.startswith(f"# {name}\n")
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card


def test_releases_are_small():
    assert released() == RELEASED
    sizes = {
        name: sum(f.stat().st_size for f in (FOLDER / name).rglob("model.safetensors"))
        for name in RELEASED
    }
    for name, size in sizes.items():
        assert size < (5e6 if "-mini" in name or "-passes" in name else 10e6), name
    assert sum(sizes.values()) <= 36e6


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_compiled_steps_are_those_of_the_plain_pass(name, request):
    """Log-weights to 1e-5 of the largest, and the same bits position by position."""
    pytest.importorskip("numba")
    request.getfixturevalue("compiled_steps")
    model = load(name).model
    sources: list[Conditioner] = [model] if model.is_exact else list(model.prior.blocks)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, 40), generator=generator)
    past = tokens
    if not model.is_exact:
        noise = torch.randn(*tokens.shape, model.config.latent_dim, generator=generator)
        past = model.codebook.encode(tokens, noise)
    for source in sources:
        with torch.no_grad():
            plain = source.features_of_all(past)
            cache = source.allocate_cache(2, 41)
            assert cache.is_compiled
            found = source.features_of(cache, past)
            head = source.head if model.is_exact else source.coupling.weight_head
            of_plain = head(plain.flatten(0, 1))
            log_w = cache.linear(head, found.flatten(0, 1))
            assert (log_w - of_plain).abs().max() < 1e-5 * of_plain.abs().max()
            again = source.allocate_cache(1, 41)
            past_of = past[1:].unflatten(1, (40, -1)) if model.is_exact else past[1:]
            steps = [source.features_at(again, past_of[:, n - 1] if n else None) for n in range(41)]
            assert torch.equal(torch.stack(steps, 1)[0], found[1])
