"""Functions shared by the tests: noise, tiny models with random parameters, run directories written
without training.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor, nn

from tarflowlm.baseline import TokenLM
from tarflowlm.config import DataConfig, RunConfig, TokenizerConfig, TrainConfig
from tarflowlm.data import (
    TEXT8_ALPHABET,
    CharTokenizer,
    Corpus,
    Tokenizer,
    encode_text,
    infer_tokenizer,
    prepare_corpus,
)
from tarflowlm.model import LanguageModel, TarFlowLM, seeded
from tarflowlm.model_config import BaselineConfig, BlockConfig, FlowConfig, TransformerConfig
from tarflowlm.runs import WEIGHTS
from tarflowlm.runs.checkpoint import write_run
from tarflowlm.runs.weights import write_weights

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def stack(
    couplings: Sequence[str], layers: Sequence[int], components: Sequence[int], **fields: Any
) -> tuple[BlockConfig, ...]:
    """Blocks from their couplings, layers and components, with other fields where they have them.

    Affine blocks have no components.
    """
    blocks = []
    for name, depth, count in zip(couplings, layers, components, strict=True):
        kind = BlockConfig.KINDS[name]
        names = {one.name for one in dataclasses.fields(kind)}
        given = fields | {"layers": depth, "components": count}
        blocks.append(kind(**{name: value for name, value in given.items() if name in names}))
    return tuple(blocks)


FILLS = {
    "couplings": ("mixd",) * 3,
    "components": (0,) * 3,
    "channel_mix": False,
    "certainty": 0.35,
}
"""Fields of `tiny_flow`: blocks that fill in what they are sure of, below one that writes the
rest.
"""
TRUNK = TransformerConfig(width=8, num_heads=2, mlp_ratio=2)
BLOCKS = stack(("mixd", "mix1", "mix1"), (1, 1, 1), (0, 2, 2))
FLOW = FlowConfig(
    context=16,
    latent_dim=3,
    trunk=replace(TRUNK, input_taps=3),
    blocks=BLOCKS,
    head_hidden=4,
    reads_tokens=True,
)
TEXT8 = CharTokenizer(TEXT8_ALPHABET)


def mostly_slow(names: Iterable[str], *fast: str) -> list[ParameterSet]:
    """Parameters of a test that are marked slow, but for those that are fast."""
    return _marked(names, fast, pytest.mark.slow)


def mostly_nightly(names: Iterable[str], *always: str) -> list[ParameterSet]:
    """Names of models or cases; those that are not run `always` are marked nightly."""
    return _marked(names, always, pytest.mark.slow, pytest.mark.nightly)


def _marked(
    names: Iterable[str], others: Sequence[str], *marks: pytest.MarkDecorator
) -> list[ParameterSet]:
    return [pytest.param(n, marks=() if n in others else marks) for n in names]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """float64 noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomise(module: AnyModule, seed: int = 0, scale: float = 0.3) -> AnyModule:
    """The module in float64, with noise added to all of its parameters.

    At the start of training heads and residual branches are zero, which would hide most mistakes.
    """
    module.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    return module


def tiny_flow(
    *, log_std: float = -0.5, seed: int = 0, scale: float = 0.3, **fields: Any
) -> TarFlowLM:
    """A randomised float64 TarFlowLM with these fields of FlowConfig, `couplings` and `layers` by
    block.

    `log_std` sets every log sigma of the codebook; -0.5 makes neighbours overlap, -6 keeps them
    well apart.
    """
    couplings = fields.pop("couplings", ("mixd", "mix1"))
    usual = {"token-affine": 1, "affine": 1, "mix1": 3, "mixd": 4}
    components = tuple(0 if (i, c) == (0, "mixd") else usual[c] for i, c in enumerate(couplings))
    layers = fields.pop("layers", (1,) * len(couplings))
    of_block = {
        name: fields.pop(name)
        for name in ("sees_channels", "sees_tokens", "certainty", "in_patch")
        if name in fields
    }
    defaults = {
        "vocab_size": 5,
        "context": 8,
        "latent_dim": 2,
        "trunk": TRUNK,
        "blocks": stack(couplings, layers, fields.pop("components", components), **of_block),
        "head_hidden": 4,
    }
    with seeded(seed):
        model = TarFlowLM(FlowConfig(**(defaults | fields)))
    randomise(model, seed, scale)
    with torch.no_grad():
        model.codebook.log_std.fill_(log_std)
    return model


def tiny_ar(*, seed: int = 0, scale: float = 0.3, **fields: Any) -> TokenLM:
    """A randomised float64 baseline with these fields of BaselineConfig."""
    defaults = {"vocab_size": 5, "context": 8, "trunk": TRUNK, "layers": 1}
    with seeded(seed):
        model = TokenLM(BaselineConfig(**(defaults | fields)))
    return randomise(model, seed, scale)


def save_run(
    folder: Path,
    model: LanguageModel,
    *,
    source: object = "tales",
    tokenizer: Tokenizer = TEXT8,
    **info: str,
) -> Path:
    """The folder, now a run directory of the model."""
    folder.mkdir()
    train, data = (
        TrainConfig(mode="joint", stage_steps=(1,)),
        DataConfig(source=str(source), tokenizer=TokenizerConfig()),
    )
    write_run(
        folder, RunConfig(name="mini-mixd", model=model.config, train=train, data=data), tokenizer
    )
    write_weights(
        folder / WEIGHTS,
        model.float().state_dict(),
        {"blocks": str(getattr(model, "num_blocks", 0))} | info,
    )
    return folder


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def flip(path: Path) -> None:
    """Changes one bit."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


# texts


def prepared(source: object, wanted: Tokenizer | TokenizerConfig, out=None, **options) -> Corpus:
    """The corpus of a text for a tokenizer, or for the one that a configuration describes."""
    if isinstance(wanted, Tokenizer):
        return prepare_corpus(DataConfig(source=str(source)), wanted, out=out, **options)
    text = DataConfig(source=str(source), tokenizer=wanted)
    return prepare_corpus(text, out=out, **options)


def encoded(source: object, tokenizer: Tokenizer, split: str):
    """The tokens of a split of a text."""
    return encode_text(DataConfig(source=str(source)), tokenizer, split)


def suited_to(source: object, config: TokenizerConfig, **options) -> TokenizerConfig:
    """The tokenizer of a text with what was left open."""
    return infer_tokenizer(DataConfig(source=str(source), tokenizer=config, **options)).tokenizer
