"""A run directory as a model: config.json, model.safetensors, tokenizer.json, never unpickled."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from tarflowlm.config import MODEL_TYPE, RunConfig
from tarflowlm.data import Tokenizer, load_tokenizer
from tarflowlm.device import compilation_problem, pick_device
from tarflowlm.errors import UserError, command
from tarflowlm.files import new_folder, read_json, write_json
from tarflowlm.flow.numerics import choose_maps
from tarflowlm.model import LanguageModel, TarFlowLM, seeded
from tarflowlm.model_config import FAMILIES, FlowConfig
from tarflowlm.runs import BEST, CONFIG, COUNTERS, STATE, SUMMARY, TOKENIZER, WEIGHTS
from tarflowlm.runs.hub import check_model, fetch, folder_of, is_reference, released
from tarflowlm.runs.named import check_imports, imports_of, stand_in, with_names
from tarflowlm.runs.weights import (
    SETTINGS,
    check_finite,
    check_size,
    is_whole,
    mismatch,
    read_header,
    read_weights,
    settings_sha256,
    write_weights,
)
from tarflowlm.schema import from_dict, to_dict

Summary = dict[str, Any]
"""The content of summary.json."""

logger = logging.getLogger("tarflowlm")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained model, in eval mode, with its tokenizer and configuration."""

    model: LanguageModel
    tokenizer: Tokenizer
    run: RunConfig
    info: dict[str, str]
    """step, tokens and blocks of the run when the weights were saved, as strings."""
    directory: Path
    """Where it was loaded from."""

    def to(self, device: str | torch.device) -> Self:
        """Move the model to a device of PyTorch, or auto, with the maps that are fastest there."""
        place = pick_device(device)
        compiled = place.type == "cuda" and compilation_problem("cuda") is None
        choose_maps(self.model, compiled=compiled)
        self.model.to(place)
        return self


def write_run(directory: Path, run: RunConfig, tokenizer: Tokenizer) -> None:
    """Write config.json and tokenizer.json of a run directory.

    Classes of a user's own come with the names of their modules, which are never imported from
    here. UserError for a model whose class has no name.
    """
    kind = type(run.model)
    if FAMILIES[kind.family].__qualname__ != kind.__qualname__:
        what = f"{kind.__name__} has the family {kind.family!r} of another class"
        raise UserError(f"{what}: give it one of its own, by which it is loaded")
    document = to_dict(run)
    imports = imports_of(document)
    head = {"model_type": MODEL_TYPE} | ({"imports": imports} if imports else {})
    write_json(directory / CONFIG, head | document)
    tokenizer.save(directory / TOKENIZER)


def read_run(directory: Path, *, is_shown: bool = False) -> RunConfig:
    """The configuration of a run directory.

    UserError if it is none, or damaged, or names something of a module that is not imported. A run
    that `is_shown` is not built, so of that the name is enough.
    """
    path = directory / CONFIG
    if not path.exists():
        remedy = "give a directory made by `tarflowlm train`"
        if str(directory) in released():
            remedy = f"`tarflowlm train --from {directory}` trains that model further"
        raise UserError(f"{directory} is not a run directory: {remedy}")
    document = read_json(path)
    is_run = isinstance(document, dict) and document.pop("model_type", None) == MODEL_TYPE
    if not is_run or not isinstance(imports := document.pop("imports", {}), dict):
        raise UserError(f"{path} is not the configuration of a run: train again, or restore it")
    missing = check_imports(document, imports, str(directory))
    if missing and not is_shown:
        module = imports[missing[0].label]
        what = f"{directory} has the {missing[0].label} of your module {module}"
        raise UserError(f"{what}: import that first, or pass --import {module}")
    names = {one.path: stand_in(one) for one in missing}
    try:
        run = from_dict(RunConfig, document, where=str(path))
    except UserError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise UserError(f"{where}{error}") from None
    return with_names(run, names)


def read_summary(directory: Path) -> Summary | None:
    """The results of a finished run, or None if there are none."""
    path = directory / SUMMARY
    found = (read_json(path) or None) if path.exists() else None
    fields = found if isinstance(found, dict) else {}
    test = fields.get("test")
    # the numbers that commands show
    numbers = {"bpc", "bound", "nats_per_token", "stderr", "windows"}
    has_test = isinstance(test, dict) and test.keys() >= numbers
    has_all = has_test and fields.keys() >= {"tokens", "seconds"} and fields.get("stage_valid_bpc")
    if found is not None and not has_all:
        raise UserError(f"{path} is damaged: remove it; `{resume_command(directory)}`")
    return found


def finished_summary(directory: Path) -> Summary | None:
    """The results of a run, or None if it is not finished or its weights must be restored."""
    try:
        read_weights(directory / WEIGHTS)
    except UserError:
        return None
    return read_summary(directory)


def locate(directory: str | Path) -> Path:
    """The folder of a model: a path, the name of a released model (`folder_of`), or hf:OWNER/NAME.

    Weights from the hub that fail their checksum are removed from its client's cache.
    """
    path = folder_of(directory)
    if path.exists() or not is_reference(path):
        return path
    folder = fetch(path)
    weights = folder / WEIGHTS
    try:
        read_weights(weights)
    except UserError as error:
        # in the client's cache a file is a link to its bytes
        weights.resolve().unlink(missing_ok=True)
        weights.unlink(missing_ok=True)
        what = f"{path.as_posix()}: {error}, and is removed from the cache"
        raise UserError(f"{what}; run this again to download it") from None
    return folder


def load_checkpoint(directory: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Load a run directory, the released model of that name, or hf:OWNER/NAME, onto `device`.

    A progressive run that was stopped early gives the blocks it had by then. UserError, naming the
    file, for a directory that is incomplete or damaged.
    """
    check_model(directory)
    directory = locate(directory)
    run = read_run(directory)
    path = directory / WEIGHTS
    # first, since weights are written last: without weights the other files may be incomplete
    with _restorable(directory):
        shapes, info = read_header(path)
    tokenizer = load_tokenizer(directory / TOKENIZER)
    config = replace(run.model, vocab_size=tokenizer.vocab_size)
    blocks = info.get("blocks", "")
    if blocks.isdigit() and int(blocks) > 0:
        config = config.first_blocks(int(blocks))
    check_size(shapes, config, path)
    with _restorable(directory):
        tensors, _ = read_weights(path)
    # the initial weights are overwritten; drawing them must not advance the caller's generator
    with seeded(0):
        if isinstance(config, FlowConfig) and config.model == FlowConfig.model:
            means = tensors.get("codebook.mean", torch.empty(0))
            fits = means.shape == (config.vocab_size, config.latent_dim)
            given = means.to(torch.get_default_dtype()).clone() if fits else None
            model: LanguageModel = TarFlowLM(config, means=given)
        else:
            model = config.build()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise mismatch(path, str(error).splitlines()[1].strip()) from None
    check_finite(tensors, str(path))
    if info.get(SETTINGS, settings := settings_sha256(read_json(directory / CONFIG))) != settings:
        what = "its model or its temperature was changed after the weights were saved"
        logger.warning("%s: %s, so results may differ", directory / CONFIG, what)
    return Checkpoint(model.eval(), tokenizer, run, info, directory).to(device)


@contextmanager
def _restorable(directory: Path) -> Iterator[None]:
    """Let an error of the weights of a run say how to get them back."""
    try:
        yield
    except UserError as error:
        state = undamaged_state(directory)
        restores = f"`{resume_command(directory)}` restores it"
        raise UserError(f"{error}: {'train again' if state is None else restores}") from None


def undamaged_state(directory: Path) -> Path | None:
    """The newest undamaged training state of a run directory."""
    states = sorted((directory / STATE).glob("step-*"), reverse=True)
    return next((state for state in states if is_whole(state)), None)


def corpus_digest(directory: Path) -> str | None:
    """The fingerprint of the corpus that a run trains on; None without its training state.

    Its folder `best` gives the fingerprint of the run.
    """
    state = undamaged_state(directory.parent if directory.name == BEST else directory)
    return None if state is None else read_json(state / COUNTERS).get("corpus")


def import_words(directory: Path) -> list[str]:
    """The words of a command, --import MODULE, for the modules whose couplings a run has."""
    words: list[str] = []
    with suppress(UserError, AttributeError, TypeError):  # a message may tell of a damaged run
        for module in sorted({*read_json(directory / CONFIG).get("imports", {}).values()}):
            words += ["--import", str(module)]
    return words


def resume_command(directory: Path) -> str:
    """The command that continues the run in a directory."""
    words = ["--resume", str(directory), *import_words(directory)]
    return f"tarflowlm train {command(words)}"


def export(checkpoint: Checkpoint, out: str | Path, *, half: bool = False) -> Path:
    """Write the files that load a model into the new directory `out`.

    `half` stores the matrices of linear layers, and the ones between channels of a head, in
    bfloat16, which loading converts to float32. Paths in the configuration are cut to file names.
    """
    weights = checkpoint.model.state_dict()
    check_finite(weights, "model")
    data = checkpoint.run.data
    tokenizer = replace(data.tokenizer, source=_without_folders(data.tokenizer.source))
    data = replace(data, source=_without_folders(data.source), tokenizer=tokenizer)
    for name, weight in weights.items():
        is_matrix = (name.endswith(".weight") and weight.ndim == 2) or name.endswith(".cross")
        # weights that came in bfloat16 lose nothing
        if is_matrix and (half or weight.equal(weight.bfloat16().to(weight.dtype))):
            weights[name] = weight.bfloat16()
    with new_folder(Path(out)) as folder:
        write_run(folder, replace(checkpoint.run, data=data), checkpoint.tokenizer)
        info = checkpoint.info | {SETTINGS: settings_sha256(to_dict(checkpoint.run))}
        write_weights(folder / WEIGHTS, weights, info)
        summary = read_summary(checkpoint.directory)
        if summary is not None:
            write_json(folder / SUMMARY, summary | {"source": data.source})
    return Path(out)


def _without_folders(source: str) -> str:
    """./NAME for an absolute path; other names, such as the name of a corpus, are kept."""
    path = Path(source)
    return f"./{path.name}" if path.is_absolute() else source
