"""A run directory as a model: config.json, model.safetensors, tokenizer.json. Reading one never unpickles.

manifest.json beside them holds their hashes, which are checked on load (docs/reliability.md).
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tarflowlm.data import Tokenizer, load_tokenizer
from tarflowlm.errors import UserError
from tarflowlm.files import read_json
from tarflowlm.language_model import LanguageModel, seeded
from tarflowlm.runs.config import RunConfig, current_form
from tarflowlm.runs.manifest import MANIFEST, is_whole, problem_of, replacing_listed, write_manifest
from tarflowlm.runs.released import locate, released
from tarflowlm.runs.strict_json import from_dict, to_dict

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
SUMMARY = "summary.json"
"""Written at the end of a run: what it came to."""
BEST = "best"
"""Inside a run directory: the weights of the best validation bound, with all that is needed to load them."""
STATE, COUNTERS = "state", "counters.json"
"""Inside a run directory: what is resumed, in a folder per step; the part of it that is readable."""
LISTED = {"manifest": "sha256"}
"""In the header of weights that have a manifest beside them: theirs is not to be missing."""


@dataclass(frozen=True)
class Checkpoint:
    """A model with what it was made from. `info` holds step, tokens and blocks, as strings."""

    model: LanguageModel
    tokenizer: Tokenizer
    run: RunConfig
    info: dict[str, str]


def write_run(directory: Path, run: RunConfig, tokenizer: Tokenizer) -> None:
    """Write the readable half of a run directory."""
    with replacing_listed(directory / CONFIG) as temporary:
        temporary.write_text(json.dumps(to_dict(run), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with replacing_listed(directory / TOKENIZER) as temporary:
        temporary.write_text(tokenizer.to_json(), encoding="utf-8", newline="")


def save_weights(directory: Path, weights: dict[str, torch.Tensor], info: dict[str, str]) -> None:
    """Replace model.safetensors by a state dict. `info` travels in the file's header, so that weights and counts
    cannot disagree."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    with replacing_listed(directory / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata=info | LISTED)


def read_run(directory: Path, *, check: bool = True) -> RunConfig:
    """What the run of a directory was asked to do. UserError also where config.json is not as it was written."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: give a run directory made by `tarflowlm train`")
    if check:
        _check(directory, CONFIG)
    return from_dict(RunConfig, current_form(read_json(directory / CONFIG)), where=str(directory / CONFIG))


def load_checkpoint(directory: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """The model of a run directory, or of one that comes with the package by its name, in eval mode on `device`.

    A run that was stopped inside a progressive stage gives the blocks it had by then. Raises UserError, naming the
    file, for a directory that is missing, incomplete, damaged, or not one of ours.
    """
    directory = locate(directory)
    if not directory.is_dir():
        raise UserError(
            f"{directory} is not a directory: give a run directory made by `tarflowlm train`, or one of "
            + ", ".join(released())
        )
    for name in (CONFIG, TOKENIZER, WEIGHTS):
        _check(directory, name)
    return _load(directory, device)


def seal(directory: str | Path) -> None:
    """Accept the files of a run directory as they are: load them unchecked, and write manifest.json anew.

    For one that was edited by hand, or whose manifest was lost. Raises UserError where they do not load.
    """
    directory = Path(directory)
    _load(directory, "cpu")
    write_manifest(directory, (CONFIG, TOKENIZER, WEIGHTS))


def export(directory: str | Path, out: str | Path, *, half: bool = False) -> Path:
    """Copy what is needed to load a model into the new directory `out`, and nothing that was needed to train it.

    `half` keeps the matrices of linear maps in bfloat16; they are float32 again when loaded. Codebooks, and what
    couplings start from and add up (biases, evidence), stay as they are. Files named in the configuration lose their
    folders.
    """
    checkpoint, out = load_checkpoint(directory), Path(out)
    if out.exists():
        raise UserError(f"{out} exists already: choose a new directory")
    out.mkdir(parents=True)
    data = checkpoint.run.data
    tokenizer = replace(data.tokenizer, source=_without_folders(data.tokenizer.source))
    data = replace(data, source=_without_folders(data.source), tokenizer=tokenizer)
    write_run(out, replace(checkpoint.run, data=data), checkpoint.tokenizer)
    weights = checkpoint.model.state_dict()
    if half:
        weights = {
            name: w.bfloat16() if w.ndim == 2 and name.endswith(".weight") else w for name, w in weights.items()
        }
    save_weights(out, weights, checkpoint.info)
    return out


def _without_folders(source: str) -> str:
    """A path as ./NAME, which no corpus or hub is named; names stay."""
    path = Path(source)
    return f"./{path.name}" if path.is_absolute() else source


def _load(directory: Path, device: str | torch.device) -> Checkpoint:
    run = read_run(directory, check=False)
    # the weights are what is written last: without them nothing else is to be blamed
    tensors, info = _read_weights(directory / WEIGHTS)
    tokenizer = load_tokenizer(directory / TOKENIZER)
    config = replace(run.model, vocab_size=tokenizer.vocab_size)
    blocks = info.get("blocks", "")
    if blocks.isdigit() and int(blocks) > 0:
        config = config.first_blocks(int(blocks))
    # the initial weights are overwritten: the caller's random numbers must not depend on them
    with seeded(0):
        model = config.build()
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    _check_names_and_shapes(directory / WEIGHTS, expected, tensors)
    model.load_state_dict(tensors)
    return Checkpoint(model=model.to(device).eval(), tokenizer=tokenizer, run=run, info=info)


def load(directory: str | Path, device: str | torch.device = "cpu") -> tuple[LanguageModel, Tokenizer]:
    """The model and tokenizer of a run directory; the model is in eval mode. Errors as `load_checkpoint`."""
    checkpoint = load_checkpoint(directory, device)
    return checkpoint.model, checkpoint.tokenizer


def whole_states(directory: Path) -> list[Path]:
    """The states of a run that are complete and as they were written, oldest first."""
    return [state for state in sorted((directory / STATE).glob("step-*")) if is_whole(state, COUNTERS)]


def weights_problem(directory: Path) -> str | None:
    """What is wrong with the weights of a run directory, in words; None where they are whole, or not there yet."""
    return problem_of(directory, [WEIGHTS])


def _check(directory: Path, name: str) -> None:
    """UserError where the file is not as it was written; it says what is still whole, and how to use it."""
    if not (directory / MANIFEST).exists() and not _wants_manifest(directory):
        return  # written before there were manifests
    try:
        problem = problem_of(directory, [name])
    except UserError as error:
        raise UserError(f"{error}; or accept the files as they are with `tarflowlm seal {directory}`") from None
    if problem is not None:
        raise UserError(f"{problem}: {_remedies(directory, name)}")


def _wants_manifest(directory: Path) -> bool:
    try:
        return "manifest" in _read_weights(directory / WEIGHTS, header_alone=True)[1]
    except UserError:
        return False


def _remedies(directory: Path, name: str) -> str:
    """What can be done about a damaged file: the checkpoints around it that are whole, or accepting it."""
    found = []
    if name == WEIGHTS and (states := whole_states(directory)):
        found.append(f"`tarflowlm train --resume {directory}` writes it again from {STATE}/{states[-1].name}")
    other = directory.parent if directory.name == BEST else directory / BEST
    if is_whole(other, WEIGHTS):
        found.append(f"{other} is whole")
    if name != WEIGHTS:
        found.append(f"`tarflowlm seal {directory}` accepts a change of your own")
    return "; ".join(found or ["restore it or train anew"])


def _read_weights(path: Path, *, header_alone: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} holds no trained weights yet")
    try:
        with safe_open(path, framework="pt") as file:
            names = [] if header_alone else file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
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
