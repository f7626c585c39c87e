"""Two tiny runs that a page may show, and the catalogue with them."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tarflowlm.baseline import BaselineConfig
from tarflowlm.config import RunConfig, TrainConfig
from tarflowlm.data import DataConfig
from tarflowlm.flow.transformer import TransformerConfig
from tarflowlm.model import FlowConfig, stack
from tarflowlm.studio.catalogue import Catalogue, collect
from tarflowlm.training.train import train

TRUNK = TransformerConfig(width=8, num_heads=2, mlp_ratio=2)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Finished runs `flow` and `baseline`; do not change them."""
    root = tmp_path_factory.mktemp("studio")
    rng = random.Random(3)
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text(" ".join(rng.choice(["the", "cat", "saw", "nine", "old", "men"]) for _ in range(600)), "utf-8")
    steps = TrainConfig(stage_steps=(4, 3), batch_size=2, log_every=1, evaluate_every=2, evaluate_windows=2)
    blocks = stack(("mixd", "mix1"), (1, 1), (0, 2))
    flow = RunConfig(
        name="tiny",
        model=FlowConfig(context=32, latent_dim=3, trunk=TRUNK, blocks=blocks, head_hidden=4),
        data=DataConfig(source=str(text)),
        train=replace(steps, test_windows=2),
    )
    baseline = replace(
        flow,
        model=BaselineConfig(context=32, trunk=TRUNK, layers=1),
        train=replace(flow.train, mode="joint", stage_steps=(4,)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TARFLOWLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name, run in (("flow", flow), ("baseline", baseline)):
            train(run, root / name, device=torch.device("cpu"))
    return root


@pytest.fixture(scope="session")
def catalogue(folder) -> Catalogue:
    return collect([str(folder)])
