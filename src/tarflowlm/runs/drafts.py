"""The draft of a model in its run directory: the folder draft/ with config.json, draft.safetensors and a manifest."""

import json
from pathlib import Path

import torch

from tarflowlm.draft import Draft, DraftConfig
from tarflowlm.errors import UserError
from tarflowlm.files import read_json
from tarflowlm.language_model import seeded
from tarflowlm.model import TarFlowLM
from tarflowlm.runs.manifest import problem_of, replacing_listed, write_manifest
from tarflowlm.runs.strict_json import from_dict, to_dict
from tarflowlm.runs.weights import check_weights, halved, read_weights, write_weights

DRAFT = "draft"
"""Folder of the draft inside a run directory."""
CONFIG, WEIGHTS = "config.json", "draft.safetensors"


def save_draft(directory: Path, draft: Draft, info: dict[str, str] | None = None, *, half: bool = False) -> None:
    """Write a draft into the run directory `directory`; `info` goes into the header, `half` as in `export`.

    FloatingPointError if a parameter is not finite.
    """
    weights = draft.state_dict()
    if broken := [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]:
        raise FloatingPointError(f"parameters of the draft are not finite: {', '.join(broken[:3])}; lower its rate")
    folder = directory / DRAFT
    folder.mkdir(exist_ok=True)
    with replacing_listed(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(to_dict(draft.config), indent=2) + "\n", encoding="utf-8")
    write_weights(folder / WEIGHTS, halved(weights) if half else weights, info or {})


def load_draft(directory: Path, model: TarFlowLM, *, sealed: bool = True) -> Draft | None:
    """The draft in the run directory of `model`, or None where there is none (or none yet).

    `sealed`: compare its files with their manifest. UserError, naming the file, for one that is damaged or belongs to
    another model.
    """
    folder = directory / DRAFT
    if not (folder / WEIGHTS).exists():
        return None
    try:
        if sealed and (problem := problem_of(folder, [CONFIG, WEIGHTS])) is not None:
            raise UserError(problem)
        config = from_dict(DraftConfig, read_json(folder / CONFIG), where=str(folder / CONFIG))
        # its random start must not advance the caller's generator
        with seeded(0):
            draft = model.new_draft(config)
        tensors = read_weights(folder / WEIGHTS)[0]
        check_weights(folder / WEIGHTS, draft, tensors, CONFIG)
    except UserError as error:
        raise UserError(f"{error}; or remove {folder}, the model works without") from None
    draft.load_state_dict(tensors)
    return draft


def seal_draft(directory: Path) -> list[str]:
    """Write a new manifest for the draft in a run directory, if there is one; the names of its files."""
    folder = directory / DRAFT
    if not (folder / WEIGHTS).exists():
        return []
    write_manifest(folder, (CONFIG, WEIGHTS))
    return [f"{DRAFT}/{CONFIG}", f"{DRAFT}/{WEIGHTS}"]
