"""The baseline with codes."""

from dataclasses import replace

import pytest
import torch

from helpers import TRUNK
from reproduction.coded import CodedConfig
from tarflowlm import generate
from tarflowlm.config import RunConfig
from tarflowlm.presets import preset
from tarflowlm.schema import from_dict, to_dict

KINDS = {
    "fixed": {"table": 0.0, "code_dim": 3},
    "both": {"code_dim": 3},
    "third": {"table": 1 / 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_coded_baseline_trains_its_input_and_samples_from_a_cache(kind):
    config = CodedConfig(vocab_size=5, context=8, trunk=TRUNK, layers=1, **KINDS[kind])
    run = replace(preset("mini-ar"), model=config)
    assert from_dict(RunConfig, to_dict(run)) == run
    assert run.model.bound == "exact"
    model = config.build()
    torch.nn.init.normal_(model.head.weight)
    tokens = torch.tensor([[0, 3, 1, 4]])
    model(tokens).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert ("input.table.weight" in trained) == (kind in ("both", "third"))
    assert "input.codebook.mean" not in trained
    assert ("input.map.lift.weight" in trained) == (kind != "third")
    cache = model.allocate_cache(1, 4)
    features = [model.features_at(cache, None)]
    features += [model.features_at(cache, tokens[:, t : t + 1]) for t in range(3)]
    torch.testing.assert_close(model.head(torch.stack(features, 1)), model.logits(tokens))
    one, two = (generate(model, num_tokens=8, num=2, generator=seed()) for _ in range(2))
    assert torch.equal(one.tokens, two.tokens)


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)
