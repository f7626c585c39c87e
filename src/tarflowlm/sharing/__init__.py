"""Models for others: saved with a model card, and pushed to the Hugging Face hub (docs/hub.md)."""

import os
import re
import shutil
import tempfile
from pathlib import Path

from tarflowlm.errors import UserError
from tarflowlm.language_model import check_type
from tarflowlm.runs.checkpoint import Checkpoint, export, load_checkpoint
from tarflowlm.runs.hub import CARD, PREFIX, REPOSITORY, hub_client, hub_errors
from tarflowlm.sharing.card import model_card


def save_pretrained(
    source: Checkpoint | str | Path,
    folder: str | Path,
    *,
    half: bool = False,
    licence: str | None = None,
    repository: str | None = None,
) -> Path:
    """Write a model with its tokenizer, configuration and a model card into the new `folder`.

    `source` is a checkpoint, or whatever `load_checkpoint` takes; a README.md beside it becomes the card. `half` as
    in `export`, `licence` an identifier of the hub (apache-2.0), `repository` the OWNER/NAME that the card is to
    name. Returns `folder`. UserError as in `export`; nothing is left behind if this fails.
    """
    check_type(folder, "folder", (str, os.PathLike), "give the path of a new folder")
    checkpoint = source if isinstance(source, Checkpoint) else load_checkpoint(source)
    folder = export(checkpoint, folder, half=half)
    try:
        # samples are those of the weights that are saved
        card = model_card(load_checkpoint(folder), checkpoint.directory, repository or folder.name, licence)
        (folder / CARD).write_text(card, encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder


def push_to_hub(
    source: Checkpoint | str | Path,
    repository: str,
    *,
    private: bool = False,
    half: bool = False,
    licence: str | None = None,
) -> str:
    """`save_pretrained` into a temporary folder, and `push_folder`; returns the address of the model."""
    repository = checked_repository(repository)
    with tempfile.TemporaryDirectory() as place:
        name = repository.rpartition("/")[2]
        folder = save_pretrained(source, Path(place) / name, half=half, licence=licence, repository=repository)
        return push_folder(folder, repository, private=private)


def push_folder(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload what `save_pretrained` wrote as one commit to OWNER/NAME, made if it is not there; returns its address.

    UserError, naming the remedy, if the hub cannot be reached or refuses, or if `private` is asked for and the
    repository exists and is public.
    """
    hub = hub_client(f"pushing {repository}")
    api = hub.HfApi(library_name="tarflowlm")
    with hub_errors(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UserError(f"{repository} exists and is public: make it private in its settings, or name another")
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload a model made with tarflowlm",
            delete_patterns=["draft/*", "manifest.json"],  # of earlier versions
        )
    return f"{hub.constants.ENDPOINT}/{repository}"


def checked_repository(name: str) -> str:
    """OWNER/NAME, without hf: before it. UserError for anything else."""
    check_type(name, "repository", str, "give OWNER/NAME, a text")
    name = name.removeprefix(PREFIX)
    if not re.fullmatch(REPOSITORY, name):
        raise UserError(f"{name!r} is no name on the hub: give OWNER/NAME, of letters, digits and - _ . between them")
    return name
