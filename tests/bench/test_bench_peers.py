"""The peers are what they are said to be, and are timed in the same way."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from io import StringIO

import pytest
import torch
from rich.console import Console

from tarflowlm.baseline import BaselineConfig, TokenLM
from tarflowlm.bench.peers import PARTS, gpt2, llama, peers, peers_table
from tarflowlm.errors import UserError
from tarflowlm.flow.transformer import TransformerConfig
from tarflowlm.runs.config import RunConfig, TrainConfig
from tarflowlm.runs.presets import preset

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
TINY = BaselineConfig(
    vocab_size=5, context=16, trunk=TransformerConfig(width=24, num_heads=2, mlp_ratio=2), layers=2
)  # fmt: skip


def tiny(**fields) -> RunConfig:
    return RunConfig(name="tiny", model=replace(TINY, **fields), train=TrainConfig(batch_size=2))


def parameters_in_layers(model: torch.nn.Module, part: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if part in name and p.ndim == 2)


@needs_transformers
def test_matrices_of_the_layers_are_as_large_as_ours():
    config = replace(preset("mini-ar").model, vocab_size=27)
    ours = parameters_in_layers(TokenLM(config), "transformer.layers.")
    assert parameters_in_layers(gpt2(config), "transformer.h.") == ours
    assert 0.98 * ours < parameters_in_layers(llama(config), "model.layers.") <= ours


@needs_transformers
@pytest.mark.parametrize("make", [gpt2, llama])
def test_peers_are_causal_and_do_the_same_in_training(make):
    torch.manual_seed(0)
    model = make(TINY).train()
    tokens = torch.randint(5, (2, 16))
    logits = model(input_ids=tokens).logits
    torch.testing.assert_close(logits, model.eval()(input_ids=tokens).logits)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 5
    apart = (model(input_ids=changed).logits - logits).abs().amax((0, 2)) > 1e-6
    assert apart.nonzero().flatten().tolist() == list(range(9, 16))


@needs_transformers
def test_rows():
    rows = peers(tiny(vocab_size=0), 5, rounds=1, steps=1, device=torch.device("cpu"))
    assert [row["name"] for row in rows] == ["tiny", "GPT-2", "Llama"]
    assert rows[0]["ratio"] == 1.0
    assert rows[0]["parameters"] == sum(p.numel() for p in TokenLM(TINY).parameters())
    for row in rows:
        assert min(row[name] for name in (*PARTS, "milliseconds", "ratio")) > 0
    out = StringIO()
    Console(file=out, width=80).print(peers_table(rows))
    assert "ours over it" in out.getvalue()


@pytest.mark.parametrize("run", [tiny(patch=2), preset("mini-mixd")], ids=lambda run: run.name)
def test_a_baseline_of_single_tokens_is_asked_for(run):
    with pytest.raises(UserError, match=f"put one, like mini-ar, in place of {run.name}"):
        peers(run, 5, rounds=1, steps=1, device=torch.device("cpu"))


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'tarflowlm\[quality\]'"):
        peers(tiny(), 5, rounds=1, steps=1, device=torch.device("cpu"))
