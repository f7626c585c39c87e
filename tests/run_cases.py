"""Three tiny runs, for reports and pages about them: progressive, joint and the baseline."""

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
from tarflowlm.training.train import train

TRUNK = TransformerConfig(width=8, num_heads=2, mlp_ratio=2)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Finished runs by name; do not change them."""
    root = tmp_path_factory.mktemp("runs")
    rng = random.Random(5)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "nine", "old", "men"]
    text = root / "words.txt"
    text.write_text(" ".join(rng.choice(words) for _ in range(900)), encoding="utf-8")
    steps = TrainConfig(
        stage_steps=(6, 4, 4), batch_size=2, log_every=1, evaluate_every=3, evaluate_windows=5, test_windows=3
    )
    blocks = stack(("mixd", "mix1", "mix1"), (1, 1, 1), (0, 2, 2))
    flow = FlowConfig(context=16, latent_dim=3, trunk=TRUNK, blocks=blocks, head_hidden=4)
    progressive = RunConfig(name="tiny", model=flow, data=DataConfig(source=str(text)), train=steps)
    joint = replace(progressive, train=replace(steps, mode="joint", stage_steps=(5,)))
    baseline = replace(joint, model=BaselineConfig(context=16, trunk=TRUNK, layers=1))
    made = {"progressive": progressive, "joint": joint, "baseline": baseline}
    with pytest.MonkeyPatch.context() as patch:
        # no test reads or fills the user's cache
        patch.setenv("TARFLOWLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name, run in made.items():
            train(run, root / name, device=torch.device("cpu"))
        yield {name: root / name for name in made}
