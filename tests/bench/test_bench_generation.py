"""The benchmarks of evaluation and generation on tiny random models: their rows, and what they refuse."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tarflowlm.baseline import BaselineConfig
from tarflowlm.bench import evaluation, generation, infilling
from tarflowlm.bench.arguments import EvaluationArgs, GenerationArgs, InfillingArgs
from tarflowlm.data import CharTokenizer
from tarflowlm.flow.transformer import TransformerConfig
from tarflowlm.language_model import seeded
from tarflowlm.model import FlowConfig, TarFlowLM, stack
from tarflowlm.runs.checkpoint import save_weights, write_run
from tarflowlm.runs.config import RunConfig, TrainConfig

TRUNK = TransformerConfig(width=8, num_heads=2, mlp_ratio=2)
FLOW = FlowConfig(context=32, latent_dim=2, trunk=TRUNK, blocks=stack(("mixd", "mix1"), (1, 1), (0, 2)))


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> list[Path]:
    """A baseline and a flow."""
    root, tokenizer = tmp_path_factory.mktemp("runs"), CharTokenizer(" abcdefghijklmnopqrstuvwxyz")
    configs = {"ar": BaselineConfig(context=32, trunk=TRUNK, layers=1), "flow": replace(FLOW, head_hidden=4)}
    for name, config in configs.items():
        run = RunConfig(name=name, model=config, train=TrainConfig(stage_steps=(3,), mode="joint"))
        with seeded(0):
            model = replace(config, vocab_size=27).build()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
        (root / name).mkdir()
        write_run(root / name, run, tokenizer)
        blocks = model.num_blocks if isinstance(model, TarFlowLM) else 0
        save_weights(root / name, model.state_dict(), {"step": "1", "tokens": "1", "blocks": str(blocks)})
    return [root / name for name in configs]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(rng.choice(["the", "cat", "sat", "on", "mats"]) for _ in range(3000)), encoding="utf-8")
    return path


def test_generation_rows(directories):
    result = generation.run(GenerationArgs(tuple(directories), batches=(2,), rounds=1, seeds=3))
    names = [row["name"] for row in result["models"]]
    assert names == ["ar steps", "flow steps", "flow steps below sweeps", "flow auto"]
    assert result["models"][0]["ratio"] == 1.0
    assert all(row["tokens_per_second"] > 0 for row in result["models"])
    assert [(row["block"], row["coupling"]) for row in result["blocks"]] == [(2, "mix1"), (1, "mixd")]
    assert all(1 <= row["sweeps"] <= 32 for row in result["blocks"])
    assert [len(row["milliseconds"]) for row in result["positions"]] == [4, 4]
    (same,) = result["identical"]
    assert (same["tokens"], same["differ_parallel"], same["differ_auto"]) == (96, 0, 0)
    console = Console(record=True, width=120)
    generation.print_result(result, console)
    assert "3 samples, 96 tokens" in console.export_text()


def test_evaluation_rows(directories, text):
    result = evaluation.run(EvaluationArgs(tuple(directories), data=str(text), windows=3, rounds=1))
    assert [row["bound"] for row in result["models"]] == ["exact", "elbo"]
    assert result["models"][0]["ratio"] == 1.0
    assert all(row["seconds_per_token"] > 0 and row["nats_per_token"] > 0 for row in result["models"])
    console = Console(record=True, width=120)
    evaluation.print_result(result, console)
    assert "over the first" in console.export_text()


def test_infilling_keeps_what_is_given_and_editing_with_strength_zero_changes_nothing(directories, text):
    args = InfillingArgs(
        tuple(directories), data=str(text), sentences=6, length=16, blanks=4, particles=(1, 3), strengths=(0.0, 1.0)
    )
    result = infilling.run(args)
    assert [row["particles"] for row in result["infilling"]] == [1, 3, 1, 3]
    assert all(row["kept"] == 1.0 for row in result["infilling"])
    assert all(1 <= row["ess"] <= row["particles"] + 1e-9 for row in result["infilling"])
    assert [(row["level"], row["strength"]) for row in result["editing"]] == [
        (level, strength) for level in (0, 1, 2) for strength in (0.0, 1.0)
    ]
    for row in result["editing"]:
        if row["strength"] == 0.0:
            assert (row["changed"], row["unchanged_texts"], row["bpc"]) == (0.0, 1.0, row["bpc_before"])
    assert len(result["examples"]) == 10
    assert all(len(e["hidden"]) == 4 and len(e["before"]) == 6 for e in result["examples"])
    console = Console(record=True, width=120)
    infilling.print_result(result, console)
    assert "infilling" in console.export_text()


def test_templates_on_the_command_line(directories, run, run_json):
    for directory in directories:
        result = run_json("sample", directory, "--template", "a_b__", "--particles", 3, "--num", 2)
        for sample in result["samples"]:
            assert (sample["text"][0], sample["text"][2], len(sample["text"])) == ("a", "b", 5)
            assert 1 <= sample["ess"] <= 3.0001
            assert isinstance(sample["log_evidence"], float)
            assert sample["pareto_k"] is None  # too few particles
    (sample,) = run_json("sample", directories[1], "--template", "a?b", "--blank", "?", "--states")["samples"]
    assert [len(state) for state in sample["states"]] == [3, 3, 3]
    assert len(sample["passes"]) == 3
    assert run("sample", directories[1], "--template", "a_", "--passes").status == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--template", ""], "template is empty"),
        (["--template", "a!_"], "'!' x1"),
        (["--template", "a__", "--blank", "a"], "alphabet"),
        (["--template", "a__", "--blank", "__"], "single character"),
        (["--template", "_" * 40], "length 40"),
        (["--template", "a_", "--prompt", "a"], "both a prompt and a template"),
        (["--template", "a_", "--particles", "0"], "particles 0"),
    ],
)
def test_bad_templates_are_one_line(directories, refused, options, words):
    refused("sample", directories[1], *options, names=[words])


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--strength", "0"],
        ["--words", "2", "--pick", "unlikely", "--candidates", "3"],
        ["--rewrite", "cat", "sat on", "--temperature", "1"],
        ["--toward", "a dog ran away"],
        ["--replace", "cat", "dog"],
        ["--level", "0", "--strength", "0"],
        ["--level", "2", "--words", "1"],
        ["--level", "1", "--toward", "a dog ran away"],
    ],
)
def test_edits_on_the_command_line(directories, run, run_json, options):
    text = "the cat sat on"
    result = run_json("edit", directories[1], "--text", text, *options, "--num", 2)
    assert result["before"] == text
    assert len({edit["bpc_before"] for edit in result["edits"]}) == 1
    for edit in result["edits"]:
        assert len(edit["text"]) == len(text)
        assert edit["changed"] == [a != b for a, b in zip(text, edit["text"], strict=True)]
        changed = [i for i, is_new in enumerate(edit["changed"]) if is_new]
        match options:
            case ["--strength", "0"] | ["--level", "0", *_]:
                assert (edit["text"], edit["bpc"]) == (text, edit["bpc_before"])
            case ["--replace", *_]:
                assert edit["text"][:7] == "the dog"
            case ["--rewrite", *_]:
                assert edit["text"][:4] == "the "
            case []:
                # one of the four words, not the first
                assert max(changed) - min(changed) < 3
                assert min(changed) >= 4
    assert run("edit", directories[1], "--text", text, *options).status == 0


def test_a_state_that_does_not_steer_the_text_is_said_to(directories, run, run_json):
    argv = ["edit", directories[1], "--text", "the cat sat on", "--level", 0, "--strength", 1]
    assert "state 0 does not steer this text" in run_json(*argv)["advice"]
    assert "without --level some words are redrawn" in run(*argv).out
    assert run_json(*argv[:4])["advice"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--replace", "a", "b", "--toward", "a"], "--toward and --replace are different edits"),
        (["--strength", "0.1", "--toward", "a"], "--strength has no effect with --toward"),
        (["--weight", "0.1"], "--weight has no effect with redrawn words"),
        (["--decoder", "auto"], "--decoder has no effect with redrawn words"),
        (["--decoder", "auto", "--toward", "a"], "--decoder has no effect with --toward without --level"),
        (
            ["--candidates", "4", "--toward", "a", "--level", "1"],
            "--candidates has no effect with --toward and --level",
        ),
        (["--candidates", "4", "--level", "1"], "--candidates has no effect with --level"),
        (["--level", "1", "--rewrite", "cat"], "--level has no effect with --rewrite"),
        (["--strength", "0.1", "--words", "1"], "give one of them"),
        (["--level", "1", "--pick", "unlikely"], "without --words"),
        (["--words", "4"], "words 4: the text has 3"),
        (["--words", "0"], "words 0"),
        (["--candidates", "0"], "candidates 0"),
        (["--temperature", "0"], "temperature 0"),
        (["--rewrite", "dog"], "does not occur"),
        (["--rewrite"], "rewrite"),
        (["--strength", "1.5"], "strength 1.5"),
        (["--strength", "0.5", "--level", "3"], "level 3"),
        (["--toward", ""], "empty"),
        (["--toward", "the dog ran", "--weight", "2"], "weight 2"),
        (["--replace", "cat", "horse"], "must agree"),
        (["--replace", "dog", "cat"], "does not occur"),
        (["--strength", "0.5", "--num", "0"], "num 0"),
        (["--text", ""], "empty"),
        (["--text", " "], "no words"),
        (["--strength", "0.5", "--text", "x!"], "'!' x1"),
        (["--strength", "0.5", "--text", "a" * 33], "33 tokens"),
    ],
)
def test_bad_edits_are_one_line(directories, refused, options, words):
    refused("edit", directories[1], "--text", "the cat sat", *options, names=[words])


def test_a_baseline_has_nothing_to_edit(directories, refused):
    refused("edit", directories[0], "--text", "a cat", "--strength", "0.5", names=["discrete baseline"])


def test_edits_normalise_all_texts(directories, run_json):
    options = ["--toward", "A Dog, ran B", "--weight", "1", "--normalize", "text8"]
    result = run_json("edit", directories[1], "--text", "The CAT sat", *options)
    assert result["before"] == " the cat sat"


def test_edits_take_upper_case(directories, run, run_json):
    argv = ["edit", directories[1], "--text", "The CAT sat"]
    for options in (["--rewrite", "Cat"], ["--replace", "CAT", "Dog"], ["--toward", "A dog ran B"]):
        assert run_json(*argv, *options)["before"] == "the cat sat"
    assert run(*argv).err.count("knows no upper case") == 1
