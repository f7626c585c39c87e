"""Models for others: saved with a model card, and pushed to the Hugging Face hub (docs/hub.md)."""

import os
import re
import shutil
import tempfile
from pathlib import Path

from tarflowlm.card import model_card
from tarflowlm.errors import UserError
from tarflowlm.runs.checkpoint import Checkpoint, export, load_checkpoint
from tarflowlm.runs.hub import CARD, PREFIX, REPOSITORY, hub_errors
from tarflowlm.schema import check_type


def save_pretrained(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    half: bool = False,
    licence: str | None = None,
    repository: str | None = None,
) -> Path:
    """Write a model with its tokenizer, configuration and a model card into the new `folder`.

    A README.md next to the weights becomes the card. `half` as in `export`, `licence` an identifier
    of the hub (apache-2.0), `repository` the OWNER/NAME that the card is to name.
    """
    check_type(folder, "folder", (str, os.PathLike), "give the path of a new folder")
    try:
        folder = export(checkpoint, folder, half=half)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another") from None
    try:
        # the samples on the card are drawn with the weights that are saved
        saved = load_checkpoint(folder)
        card = model_card(saved, checkpoint.directory, repository or folder.name, licence)
        (folder / CARD).write_text(card, encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder


def push_to_hub(
    checkpoint: Checkpoint,
    repository: str,
    *,
    private: bool = False,
    half: bool = False,
    licence: str | None = None,
) -> str:
    """Upload what `save_pretrained` writes to OWNER/NAME; returns the address of the model."""
    repository = checked_repository(repository)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / repository.rpartition("/")[2]
        save_pretrained(checkpoint, folder, half=half, licence=licence, repository=repository)
        return push_folder(folder, repository, private=private)


def push_folder(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a saved model to OWNER/NAME, made if needed; returns the address."""
    import huggingface_hub
    from huggingface_hub import constants

    api = huggingface_hub.HfApi(library_name="tarflowlm")
    with hub_errors(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise UserError(f"{repository} exists and is public: name another")
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload a model made with tarflowlm",
        )
    return f"{constants.ENDPOINT}/{repository}"


def checked_repository(name: str) -> str:
    """OWNER/NAME, without hf: before it. UserError for anything else."""
    check_type(name, "repository", str, "give OWNER/NAME")
    name = name.removeprefix(PREFIX)
    if not re.fullmatch(REPOSITORY, name):
        rule = "give OWNER/NAME, of letters, digits and - _ . between them"
        raise UserError(f"{name!r} cannot be a name on the hub: {rule}")
    return name
