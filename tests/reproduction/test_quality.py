"""Sample statistics on texts whose answers are known, MAUVE at its ends, the whole of it on a tiny
model.
"""

import math
from dataclasses import replace

import pytest
import torch

from helpers import save_run, tiny_ar, tiny_flow
from reproduction import quality
from reproduction.judges import Judge
from reproduction.quality import (
    SamplingConfig,
    distinct,
    draw_samples,
    mauve,
    repetition,
    sequence_entropy,
)
from tarflowlm.data import CharTokenizer

TOKENIZER = CharTokenizer(" abcd", "none")


def test_entropy_is_per_sequence():
    """Not of all together, which would be log 4."""
    assert sequence_entropy([[0, 1] * 4, [2, 3] * 4]) == pytest.approx(math.log(2))
    assert sequence_entropy([[7] * 5, [1, 2, 3, 4]]) == pytest.approx(math.log(4) / 2)
    expected = torch.distributions.Categorical(torch.tensor([3.0, 1.0, 4.0]) / 8).entropy().item()
    assert sequence_entropy([list("aaabcccc")]) == pytest.approx(expected)
    assert sequence_entropy([[]]) == 0


def test_distinct_and_repetition():
    same = [["the", "cat", "sat"]] * 4
    assert distinct(same, 1) == 3 / 12
    assert distinct(same, 2) == 2 / 8
    assert repetition(same, 2) == 0
    loop = [list("ababab"), list("abcdef"), ["short"]]
    assert repetition(loop, 2) == pytest.approx((1 - 2 / 5) / 2)
    assert distinct(loop, 4) == 5 / 6
    assert repetition([["short"]], 4) is None
    assert distinct([[]], 1) is None


@pytest.mark.slow
def test_mauve():
    pytest.importorskip("mauve")
    draws = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    shifted = draws[200:] + torch.tensor([6.0] + [0.0] * 7)
    alike = mauve(draws[:200], draws[200:])
    assert alike > 0.9
    assert mauve(draws[:200], shifted) < 0.1
    assert mauve(draws[:200], draws[200:]) == alike


class LetterJudge(Judge):
    """Gives every letter a probability of its own, whatever stands before it."""

    name, kind, context, source = "letters", "a table", 6, "some text"
    log_p = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1]).log()

    def encode(self, text):
        return TOKENIZER.encode(text).tolist()

    def score(self, tokens):
        return -self.log_p[tokens], torch.nn.functional.one_hot(tokens, 5).float()


@pytest.fixture(params=["flow", "ar"])
def model(request):
    return (tiny_flow(log_std=-2.0) if request.param == "flow" else tiny_ar()).float().eval()


@pytest.fixture
def windows():
    return torch.randint(5, (30, 8), generator=torch.Generator().manual_seed(2))


CONFIG = SamplingConfig(num=20, seed=3)


def test_quality_of_a_tiny_model(model, windows):
    pytest.importorskip("mauve")
    config = replace(CONFIG, temperature=0.8, top_k=3)
    result = quality.measure_quality(
        model, TOKENIZER, LetterJudge(), windows, config, trained_on="other"
    )
    samples = draw_samples(model, config)
    for tokens, statistics in ((samples, result.samples), (windows, result.text)):
        assert statistics.texts == len(tokens)
        assert statistics.judge_tokens == tokens.numel()
        assert statistics.perplexity == pytest.approx(
            (-LetterJudge.log_p[tokens].mean()).exp().item(), rel=1e-5
        )
        assert statistics.entropy == pytest.approx(sequence_entropy(tokens.tolist()))
        words = [TOKENIZER.decode(row).split() for row in tokens.tolist()]
        assert statistics.word_entropy == pytest.approx(sequence_entropy(words))
        assert statistics.distinct_2 == distinct(words, 2)
    features = [
        torch.nn.functional.one_hot(tokens[:, 5], 5).float() for tokens in (windows, samples)
    ]
    assert result.mauve == mauve(*features)  # of the first chunk, which ends after six tokens
    decoder = "auto" if hasattr(model, "codebook") else "steps"
    assert result.sampling == replace(config, length=8, decoder=decoder)
    assert result.to_json()["temperature"] == 0.8
    assert (result.dtype, result.judge) == ("float32", "letters")


@pytest.mark.slow
def test_samples_depend_on_the_seed_alone(model, monkeypatch):
    first = draw_samples(model, CONFIG)
    assert first.shape == (20, 8)
    assert torch.equal(draw_samples(model, CONFIG), first)
    assert not torch.equal(draw_samples(model, replace(CONFIG, seed=4)), first)
    monkeypatch.setattr(quality, "SAMPLED_TOKENS", 7 * 8)
    several = draw_samples(model, replace(CONFIG, length=5))
    assert several.shape == (20, 5)
    assert not torch.equal(several[:10], several[10:])


@pytest.fixture
def runs(tmp_path, corpus_file):
    """Run directories of a flow and of a baseline, both untrained."""
    return {
        name: save_run(tmp_path / name, build(vocab_size=27, context=16), source=corpus_file)
        for name, build in (("flow", tiny_flow), ("ar", tiny_ar))
    }


@pytest.mark.slow
def test_the_command_measures_samples(run_json, run, runs):
    pytest.importorskip("mauve")
    argv = ["quality", runs["flow"], "--judge", runs["ar"], "--num", 30, "--length", 12]
    argv += ["--temperature", 0.9]
    found = run_json(*argv)
    assert (found["length"], found["temperature"], found["seed"]) == (12, 0.9, 0)
    assert (found["samples"]["texts"], found["samples"]["judge_tokens"]) == (30, 360)
    shown = run(*argv).out
    for part in (f"{found['samples']['perplexity']:.3f}", f"{found['mauve']:.4f}"):
        assert part in shown
    assert all(remark in shown for remark in found["remarks"])


def test_wrong_requests_of_the_command_are_named(refused, runs):
    pytest.importorskip("mauve")
    argv = ["quality", runs["flow"], "--judge"]
    refused(*argv, runs["flow"], names=[str(runs["flow"]), "mini-ar"])
    for option, value in (
        ("--num", "1"),
        ("--length", "17"),
        ("--temperature", "nan"),
        ("--top-k", "0"),
        ("--top-p", "-1"),
        ("--seed", "-1"),
    ):
        refused(*argv, runs["ar"], option, value, names=[value])
