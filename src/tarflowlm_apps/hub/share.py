"""Models for others: saved with a card, and pushed to the Hugging Face hub."""

import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub

from tarflowlm.errors import UserError, first_line
from tarflowlm.runs import CARD, WEIGHTS
from tarflowlm.runs.checkpoint import Checkpoint, export, load_checkpoint
from tarflowlm.runs.hub import PREFIX, REPOSITORY, hub_errors
from tarflowlm.runs.records import is_export
from tarflowlm.runs.weights import read_weights
from tarflowlm.schema import check_path, check_type
from tarflowlm_apps.hub.card import model_card


def save_pretrained(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    half: bool = False,
    licence: str | None = None,
    repository: str | None = None,
    overwrite: bool = False,
) -> Path:
    """`Pretrained.save_pretrained`, of any checkpoint."""
    check_path(folder, "folder", "give the path of a new folder")
    if licence is not None and not re.fullmatch(r"[a-z0-9.-]+", licence):
        raise UserError(f"licence {licence!r}: give an identifier of the hub, such as apache-2.0")
    target = place = Path(folder)
    if is_export(target):
        if not overwrite:
            remedy = "remove it, choose another, or in Python pass overwrite=True"
            raise UserError(f"{target} exists already: {remedy}")
        target = target.resolve()  # "." has no name
        place = target.with_name(f".{target.name}.new")
        shutil.rmtree(place, ignore_errors=True)
    stored = checkpoint.directory / WEIGHTS
    if stored.is_file():
        tensors, _ = read_weights(stored)
        weights = checkpoint.model.state_dict()
        unchanged = all(
            name in tensors and weight.cpu().equal(tensors[name].to(weight.dtype))
            for name, weight in weights.items()
        )
        if not unchanged:
            run = replace(checkpoint.run, data=replace(checkpoint.run.data, source="own"))
            info = {"blocks": str(checkpoint.model.num_blocks)}
            checkpoint = replace(checkpoint, run=run, info=info, directory=place)
    try:
        export(checkpoint, place, half=half)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose another") from None
    try:
        # the samples on the card are drawn with the weights that are saved
        saved = load_checkpoint(place)
        card = model_card(saved, checkpoint.directory, repository or target.name, licence)
        (place / CARD).write_text(card, encoding="utf-8")
        if place != target:
            # a kill between the renames loses neither model
            old = target.with_name(f".{target.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            place.rename(target)
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return target


def push_to_hub(
    checkpoint: Checkpoint,
    repository: str,
    *,
    private: bool = False,
    half: bool = False,
    licence: str | None = None,
) -> str:
    """`Pretrained.push_to_hub`, of any checkpoint."""
    repository = checked_repository(repository)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / repository.rpartition("/")[2]
        save_pretrained(checkpoint, folder, half=half, licence=licence, repository=repository)
        return push_folder(folder, repository, private=private)


def push_folder(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a saved model to OWNER/NAME, made if needed; returns the address."""
    api = huggingface_hub.HfApi(library_name="tarflowlm")
    with hub_errors(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise UserError(f"{repository} exists and is public: name another")
        try:
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message="Upload a model made with tarflowlm",
            )
        except ValueError as error:
            # the hub refuses a head of the card that it cannot read
            what = f"{repository} exists now, but the hub refuses {CARD} ({first_line(error)})"
            raise UserError(f"{what}: mend its head, or the licence, and push again") from None
    return f"{huggingface_hub.constants.ENDPOINT}/{repository}"


def checked_repository(name: str) -> str:
    """OWNER/NAME, without hf: before it. UserError for anything else."""
    check_type(name, "repository", str, "give OWNER/NAME")
    name = name.removeprefix(PREFIX)
    if not re.fullmatch(REPOSITORY, name):
        rule = "give OWNER/NAME, of letters, digits and - _ . between them"
        raise UserError(f"{name!r} cannot be a name on the hub: {rule}")
    return name
