"""Models for others: saved with a model card, and pushed to the Hugging Face hub (docs/hub.md).

A card describes the model and its training, and shows samples.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import indent

from tarflowlm.errors import UserError, counted, first_line
from tarflowlm.evaluation.likelihood import sign_of
from tarflowlm.generation.texts import write_texts
from tarflowlm.presets import PRESETS, preset
from tarflowlm.requests import Writing
from tarflowlm.runs import CARD, WEIGHTS
from tarflowlm.runs.checkpoint import (
    Checkpoint,
    corpus_digest,
    export,
    load_checkpoint,
    read_summary,
    read_weights,
)
from tarflowlm.runs.hub import PREFIX, REPOSITORY, hub_errors, read_card
from tarflowlm.runs.records import is_export
from tarflowlm.schema import check_type, flatten

FLOW = """A TarFlowLM ([arXiv 2507.00425](https://arxiv.org/abs/2507.00425)): every token is a
Gaussian in a learned codebook, and a stack of autoregressive Transformer flows models the latent
vectors. Its bits and nats are upper bounds (<=)."""
BASELINE = """A discrete autoregressive Transformer, the baseline of a TarFlowLM. Its likelihood is
exact."""
TEMPLATE = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
"""The card of a model that brings none."""


def save_pretrained(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    half: bool = False,
    licence: str | None = None,
    repository: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model with its tokenizer, configuration and a model card into the new `folder`.

    A README.md next to the weights becomes the card. Weights that have changed since they were
    loaded get neither the card nor the figures of their directory. `half` as in `export`,
    `licence` an identifier of the hub (apache-2.0), `repository` the OWNER/NAME that the card is to
    name. `overwrite` replaces a saved model in the folder, but never a run with the log of its
    training.
    """
    check_type(folder, "folder", (str, os.PathLike), "give the path of a new folder")
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
    """Upload the files of `save_pretrained` to OWNER/NAME; returns the address of the model."""
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
    return f"{constants.ENDPOINT}/{repository}"


def checked_repository(name: str) -> str:
    """OWNER/NAME, without hf: before it. UserError for anything else."""
    check_type(name, "repository", str, "give OWNER/NAME")
    name = name.removeprefix(PREFIX)
    if not re.fullmatch(REPOSITORY, name):
        rule = "give OWNER/NAME, of letters, digits and - _ . between them"
        raise UserError(f"{name!r} cannot be a name on the hub: {rule}")
    return name


def model_card(checkpoint: Checkpoint, origin: Path, name: str, licence: str | None) -> str:
    """README.md of the saved model `checkpoint`: a head of metadata for the hub, then Markdown.

    `origin` is the folder that it was made from; a README.md there is kept. `name` is its
    OWNER/NAME or the name of its folder.
    """
    # metadata in YAML, which includes JSON
    values: dict[str, object] = {"library_name": "tarflowlm", "pipeline_tag": "text-generation"}
    if licence:
        values["license"] = licence
    values["tags"] = ["tarflowlm"]
    if not checkpoint.model.is_exact:
        values["tags"] = ["tarflowlm", "normalizing-flows"]
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())
    head = f"---\n{lines}---\n\n"
    written = read_card(origin)
    if written.startswith("---\n"):
        if licence is not None:
            raise UserError(f"licence {licence!r}: {origin / CARD} has a head: state it there")
        return written
    if written:
        return head + written
    request = Writing(num=2, num_tokens=min(256, checkpoint.run.model.context))
    # indented, so that nothing in a sample is taken for Markdown
    samples = [
        f"{number}.\n\n{indent(text, ' ' * 8)}\n\n"
        for number, text in enumerate(write_texts(request, checkpoint), 1)
    ]
    facts = _facts(checkpoint, origin, licence)
    return TEMPLATE.format(
        head=head,
        title=name.rpartition("/")[2],
        what=BASELINE if checkpoint.model.is_exact else FLOW,
        name=name,
        reference=f"hf:{name}" if "/" in name else name,
        facts="".join(f"| {fact} | {value} |\n" for fact, value in facts),
        num=request.num,
        length=request.num_tokens,
        samples="".join(samples),
    )


def _facts(checkpoint: Checkpoint, origin: Path, licence: str | None) -> Iterator[tuple[str, str]]:
    """The rows of the card's table."""
    run = checkpoint.run
    tokenizer = checkpoint.tokenizer
    model = checkpoint.model
    blocks = ", ".join(run.model.describe(block) for block in range(model.num_blocks))
    size = f"{model.num_parameters:,} parameters, context {run.model.context}"
    yield "model", f"preset `{run.name}`: {blocks}; {size}"
    symbols = f"{tokenizer.vocab_size:,} ({tokenizer.kind})"
    yield "symbols", f"{symbols}, normalisation {tokenizer.normalization}"
    info = checkpoint.info
    units = {"step": "step", "tokens": "token"}
    counts = [counted(int(info[key]), unit) for key, unit in units.items() if key in info]
    yield "trained on", ", ".join([f"`{run.data.source}`", *counts, f"seed {run.seed}"])
    if run.parent:
        parent, _, weights = run.parent.partition("@")
        yield "tuned from", f"`{parent}`, sha256 of its weights `{weights}`"
    digest = corpus_digest(origin)
    if digest is not None:
        yield "tokens", f"sha256 of the hashes of their splits `{digest}`"
    if run.name in PRESETS:
        theirs = flatten(preset(run.name)) | {"data.source": run.data.source}
        ours = flatten(replace(run, model=replace(run.model, vocab_size=0)))
        changes = [f"`{name}` {ours[name]}" for name in ours if ours[name] != theirs.get(name)]
        yield "other than the preset", ", ".join(changes) or "nothing"
    test = (read_summary(origin) or {}).get("test")
    result = "not recorded"
    if test:
        sign = sign_of(test["bound"])
        nats = f"{test['nats_per_token']:.4f} nats per token"
        if test["windows"] > 1:
            nats += f" (standard error {test['stderr']:.4f})"
        windows = f"{counted(test['windows'], 'window')} of the test split ({test['bound']})"
        result = f"{sign} {test['bpc']:.4f} bits per character, {sign} {nats}, over {windows}"
    yield "test", result
    yield "licence", licence or "not stated by its owner"
