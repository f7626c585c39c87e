"""Samples of a report: the same every time, escaped, and the passes as rows."""

from dataclasses import replace

import pytest

from tarflowlm.model import stack
from tarflowlm.report.samples import Samples, draw_samples, passes_rows, texts_markup
from tarflowlm.runs.checkpoint import load_checkpoint, read_run


@pytest.mark.parametrize("name", ["progressive", "baseline"])
def test_samples_are_the_same_every_time(runs, name):
    checkpoint = load_checkpoint(runs[name])
    ticks = []
    first = draw_samples(checkpoint.model, checkpoint.tokenizer, lambda done, total: ticks.append((done, total)))
    assert first == draw_samples(checkpoint.model, checkpoint.tokenizer)
    assert [len(text) for text in first.texts] == [16] * 3
    assert first.temperature == 0.8
    assert ticks[-1][0] == ticks[-1][1] == 16 * checkpoint.model.num_blocks
    if name == "baseline":
        assert first.passes == []
    else:
        assert len(first.passes) == 4
        assert "".join(first.passes[-1]) == first.texts[0]


def test_an_affine_block_1_is_sampled_at_temperature_1(runs):
    tokenizer = load_checkpoint(runs["joint"]).tokenizer
    config = read_run(runs["joint"]).model
    affine = replace(config, vocab_size=tokenizer.vocab_size, blocks=stack(("affine",), (1,), (1,)))
    samples = draw_samples(affine.build(), tokenizer)
    assert (samples.temperature, samples.passes) == (1.0, [])


def test_rows_of_passes():
    rows = passes_rows([list("qxz"), list("qaz"), list("cat")])
    assert [row.label for row in rows] == ["noise", "after block 2: 1 of 3 changed", "after block 1: 2 of 3 changed"]
    kinds = [[token.kind for token in row.tokens] for row in rows]
    assert kinds == [["noise"] * 3, ["noise", "changed", "noise"], ["changed", "final", "changed"]]


def test_texts_are_escaped():
    html = texts_markup(Samples(["<b>&"], [], 4, 0.8)).html
    assert "&lt;b&gt;&amp;" in html
