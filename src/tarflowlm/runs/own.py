"""A model from a training loop of one's own, described as a checkpoint is."""

import os
from pathlib import Path
from typing import cast

from tarflowlm.config import (
    TEXT8_ALPHABET,
    DataConfig,
    Kind,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
)
from tarflowlm.data import Tokenizer
from tarflowlm.language_model import LanguageModel
from tarflowlm.model_config import BaselineConfig, FlowConfig

OWN = Path(os.devnull, "own")
"""The directory of a model that was not loaded: below a file, where nothing can be."""


def own_run(model: LanguageModel, tokenizer: Tokenizer) -> RunConfig:
    """The configuration with which a model of one's own is saved and tuned."""
    config = model.config
    assert isinstance(config, FlowConfig | BaselineConfig)
    alphabet = "".join(tokenizer.symbols) if tokenizer.kind == "char" else TEXT8_ALPHABET
    how = TokenizerConfig(
        kind=cast(Kind, tokenizer.kind),
        alphabet=alphabet,
        source="own" if tokenizer.kind == "bpe" else "",
        normalize=tokenizer.normalization,
    )
    return RunConfig(
        name="own",
        model=config,
        data=DataConfig(source="own", tokenizer=how),
        train=TrainConfig(stage_steps=(1000,) * model.num_blocks),
    )
