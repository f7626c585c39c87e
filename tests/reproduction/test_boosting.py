"""Second blocks on frozen models: exact maps, and what they learn."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.autograd.functional import jacobian

from helpers import tiny_ar, tiny_flow
from reproduction import cipher
from reproduction.boosting import (
    Below,
    Further,
    Mixed,
    Reader,
    Weights,
    evaluate,
    fit,
    write,
)
from tarflowlm.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from tarflowlm.data import eval_windows, prepare_corpus
from tarflowlm.errors import Progress
from tarflowlm.flow.numerics import standard_normal_log_prob
from tarflowlm.model import seeded
from tarflowlm.model_config import TransformerConfig

TRUNK = TransformerConfig(width=16, num_heads=2, mlp_ratio=1)
V, T, d = 4, 3, 2


@pytest.fixture
def below() -> Below:
    return Below(tiny_flow(couplings=("mixd",), vocab_size=V, latent_dim=d, context=T, seed=1))


def weights(below: Below, reads: str = "text", *, adds: bool = False, scale: float = 0.0):
    """A block 2 of one layer, whose head has random weights of this size."""
    with seeded(2):
        reader = Reader(below, TRUNK, layers=1, reads=reads)
        block = Weights(reader, below.codebook.vocab_size, adds=adds)
        torch.nn.init.normal_(block.head.weight, std=scale)
    return block.to(below.codebook.mean.dtype)


@pytest.mark.parametrize("reads", ["noise", "text", "text, features"])
def test_new_weights_are_a_triangular_map_with_the_density_of_these(below, reads):
    block = weights(below, reads, adds=reads == "noise", scale=1.0)
    tokens = torch.tensor([[2, 0, 3]])
    noise = torch.randn(1, T, d, generator=torch.Generator().manual_seed(0)).double()
    z = below.codebook.encode(tokens, noise).detach()

    def first(v: torch.Tensor) -> torch.Tensor:
        return below.known(tokens, v.view(1, T, d)).noise[0].flatten()

    def both(v: torch.Tensor) -> torch.Tensor:
        known = below.known(tokens, v.view(1, T, d))
        return known.mapped(block.log_weights(known))[0].flatten()

    by_z = jacobian(both, z.flatten())
    by_u = by_z @ jacobian(first, z.flatten()).inverse()
    assert by_u.triu(1).abs().max() < 1e-9
    expected = torch.linalg.slogdet(by_z).logabsdet
    expected = expected + standard_normal_log_prob(both(z.flatten()).view(1, T, d))[0]
    found = block.log_prob(below(tokens, noise)).sum()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_writing_inverts_both_blocks(below):
    block = weights(below, scale=1.0)
    noise = torch.randn(2, T, d, generator=torch.Generator().manual_seed(1)).double()
    z = write(below, block, noise)
    known = below.known(below.codebook.decode(z), z)
    torch.testing.assert_close(known.mapped(block.log_weights(known))[0], noise)
    alone = write(below, None, noise)
    torch.testing.assert_close(below.model.prior(alone)[0], noise)
    assert not torch.allclose(alone, z)


@pytest.mark.parametrize("adds", [False, True])
def test_further_training_starts_at_the_trained_map(below, adds):
    trained = weights(below, adds=adds, scale=1.0)
    further = Further(trained).double()
    known = below(torch.tensor([[2, 0, 3]]), torch.zeros(1, T, d).double())
    assert torch.equal(further.log_weights(known), trained.log_weights(known))
    names = {name.split(".")[0] for name, p in further.named_parameters() if p.requires_grad}
    assert names == {"head", "more"}


def test_blocks_that_add_start_as_the_identity(below):
    tokens = torch.randint(V, (6, T), generator=torch.Generator().manual_seed(1))
    below = below.float()
    with seeded(2):
        mixed = Mixed(below, Reader(below, TRUNK, layers=1, reads="noise"))
    for block in (weights(below, adds=True), mixed):
        gain, _ = evaluate(below, block, tokens).gain
        assert abs(gain) < 2e-3


def test_the_bound_of_a_baseline_as_a_block_is_its_likelihood():
    model = tiny_ar(vocab_size=27, context=8).float()
    below = Below(model)
    tokens = torch.randint(27, (64, 8), generator=torch.Generator().manual_seed(1))
    found = evaluate(below, weights(below), tokens)
    nats = -model.token_log_prob(tokens).mean(-1)
    torch.testing.assert_close(found.below, nats.detach() / math.log(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.both, torch.full((64,), math.log2(27)), rtol=1e-5, atol=1e-5)


@pytest.fixture
def alternating(tmp_path) -> RunConfig:
    """A training on alternating letters, of which an untrained baseline knows nothing."""
    text = tmp_path / "text.txt"
    text.write_text("ab" * 2000, encoding="utf-8")
    return RunConfig(
        name="tiny",
        model=tiny_ar(vocab_size=27, context=8).config,
        data=DataConfig(source=str(text)),
        optim=OptimConfig(lr=1e-2),
        train=TrainConfig(batch_size=8, stage_steps=(40,), evaluate_every=20, evaluate_windows=8),
    )


@pytest.mark.slow
def test_a_block_that_reads_tokens_learns_what_a_frozen_baseline_does_not_know(alternating):
    below = Below(tiny_ar(vocab_size=27, context=8, scale=0.0).float())
    corpus = prepare_corpus(alternating.data)
    frozen = [p.clone() for p in below.parameters()]
    block = fit(lambda: weights(below), below, corpus, alternating)
    windows = eval_windows(corpus.split("valid"), 8)
    # the first token of a window is not known
    assert evaluate(below, block, windows).both.mean() < 0.75
    run = replace(alternating, train=replace(alternating.train, stage_steps=(3,)))
    further = fit(lambda: Further(block), below, corpus, run)
    assert evaluate(below, further, windows).both.mean() < 0.75
    for before, after in zip(frozen, below.parameters(), strict=True):
        assert torch.equal(before, after)


class Count(Progress):
    def __init__(self) -> None:
        self.counts = list[int]()

    def advance(self, count: int = 1) -> None:
        self.counts.append(count)


def test_a_training_by_minutes_counts_the_seconds_of_a_core(alternating, monkeypatch):
    below = Below(tiny_ar(vocab_size=27, context=8).float())
    train = replace(alternating.train, stage_steps=(1,), minutes=0.1)
    progress = Count()
    # a step takes two seconds
    monkeypatch.setattr("time.process_time", itertools.count(0, 2).__next__)
    run = replace(alternating, train=train)
    fit(lambda: weights(below), below, prepare_corpus(run.data), run, progress)
    assert progress.counts == [2, 2, 2]


def test_an_answer_is_yes_if_every_seed_saves_bits():
    named = dict.fromkeys(name for question in cipher.QUESTIONS for name in question[1:])
    rows = [
        {"model": model, "block 2": arm and arm.label, "reads": arm and arm.reads, cipher.BPC: 2.0}
        for model, arm in named
        for _seed in range(2)
    ]
    assert {row["answer"] for row in cipher.answers(rows)} == {"no"}
    of_block = [row for row in rows if row["reads"] == "text, features"][:2]
    for row, answer in zip(of_block, ("in some seeds", "yes"), strict=True):
        row[cipher.BPC] = 1.9
        assert cipher.answers(rows)[0]["answer"] == answer
