"""A tiny flow of three blocks, and run directories: written without training, read back and damaged."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tarflowlm.config import DataConfig, FlowConfig, RunConfig, TrainConfig, TransformerConfig, stack
from tarflowlm.data import TEXT8_ALPHABET, CharTokenizer, Tokenizer
from tarflowlm.language_model import LanguageModel
from tarflowlm.runs.checkpoint import save_weights, write_run

FILLS = {"couplings": ("mixd",) * 3, "components": (0,) * 3, "channel_mix": False, "certainty": 0.35}
"""Fields of `tiny_flow`: blocks that fill in what they are sure of, below one that writes the rest."""
TRUNK = TransformerConfig(width=8, num_heads=2, mlp_ratio=2)
BLOCKS = stack(("mixd", "mix1", "mix1"), (1, 1, 1), (0, 2, 2))
FLOW = FlowConfig(
    context=16, latent_dim=3, trunk=replace(TRUNK, input_taps=3), blocks=BLOCKS, head_hidden=4, reads_tokens=True
)
TEXT8 = CharTokenizer(TEXT8_ALPHABET)


def save_run(
    folder: Path, model: LanguageModel, *, source: object = "english", tokenizer: Tokenizer = TEXT8, **info: str
) -> Path:
    """The folder, now a run directory of the model."""
    folder.mkdir()
    train, data = TrainConfig(mode="joint", stage_steps=(1,)), DataConfig(source=str(source))
    write_run(folder, RunConfig(name="mini-mixd", model=model.config, train=train, data=data), tokenizer)
    save_weights(folder, model.float().state_dict(), {"blocks": str(getattr(model, "num_blocks", 0))} | info)
    return folder


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def flip(path: Path) -> None:
    """Changes one bit."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
