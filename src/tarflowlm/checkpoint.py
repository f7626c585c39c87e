"""A run directory as a model: config.json, model.safetensors, tokenizer.json. Reading one never unpickles."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tarflowlm.baseline import BaselineConfig, TokenLM
from tarflowlm.config import from_dict, to_dict
from tarflowlm.data import Tokenizer, load_tokenizer
from tarflowlm.errors import UserError
from tarflowlm.files import read_json, replacing, write_json
from tarflowlm.model import FlowConfig, TarFlowLM, seeded
from tarflowlm.training.config import RunConfig

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"

Model = TarFlowLM | TokenLM


@dataclass(frozen=True)
class Checkpoint:
    """A model with what it was made from. `info` holds step, tokens and blocks, as strings."""

    model: Model
    tokenizer: Tokenizer
    run: RunConfig
    info: dict[str, str]


def build_model(config: FlowConfig | BaselineConfig) -> Model:
    return TarFlowLM(config) if isinstance(config, FlowConfig) else TokenLM(config)


def write_run(directory: Path, run: RunConfig, tokenizer: Tokenizer) -> None:
    """Write the readable half of a run directory."""
    write_json(directory / CONFIG, to_dict(run))
    tokenizer.save(directory / TOKENIZER)


def save_weights(directory: Path, weights: dict[str, torch.Tensor], info: dict[str, str]) -> None:
    """Replace model.safetensors by a state dict. `info` travels in the file's header, so that weights and counts
    cannot disagree."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    with replacing(directory / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata=info)


def read_run(directory: Path) -> RunConfig:
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: give a run directory made by `tarflowlm train`")
    return from_dict(RunConfig, read_json(directory / CONFIG), where=str(directory / CONFIG))


def load_checkpoint(directory: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """The model of a run directory, in eval mode on `device`.

    A run that was stopped inside a progressive stage gives the blocks it had by then. Raises UserError, naming the
    file, for a directory that is missing, incomplete, damaged, or not one of ours.
    """
    directory = Path(directory)
    run = read_run(directory)
    tokenizer = load_tokenizer(directory / TOKENIZER)
    tensors, info = _read_weights(directory / WEIGHTS)
    config: Any = replace(run.model, vocab_size=tokenizer.vocab_size)
    if isinstance(config, FlowConfig) and info.get("blocks", "").isdigit():
        config = config.first_blocks(int(info["blocks"]))
    # the initial weights are overwritten: the caller's random numbers must not depend on them
    with seeded(0):
        model = build_model(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    _check_names_and_shapes(directory / WEIGHTS, expected, tensors)
    model.load_state_dict(tensors)
    return Checkpoint(model=model.to(device).eval(), tokenizer=tokenizer, run=run, info=info)


def load(directory: str | Path, device: str | torch.device = "cpu") -> tuple[Model, Tokenizer]:
    """The model and tokenizer of a run directory; the model is in eval mode. Errors as `load_checkpoint`."""
    checkpoint = load_checkpoint(directory, device)
    return checkpoint.model, checkpoint.tokenizer


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} holds no trained weights yet")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it or train anew") from None


def _check_names_and_shapes(path: Path, expected: dict[str, torch.Size], tensors: dict[str, torch.Tensor]) -> None:
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            lacking = "has no" if name not in tensors else "has an unexpected"
            raise UserError(f"{path} {lacking} tensor {name}: it does not belong to the {CONFIG} beside it")
        if tensors[name].shape != expected[name]:
            raise UserError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, {CONFIG} asks for {list(expected[name])}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise UserError(f"{path}: {name} holds non-finite values; the run diverged")
