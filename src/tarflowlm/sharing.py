"""Models for others: saved with a model card, and pushed to the Hugging Face hub (docs/hub.md)."""

import json
import math
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tarflowlm.checks import check_type
from tarflowlm.config import RunConfig
from tarflowlm.errors import UserError
from tarflowlm.generation import generate
from tarflowlm.model_config import BaselineConfig
from tarflowlm.presets import PRESETS, preset, with_blocks
from tarflowlm.runs.checkpoint import (
    Checkpoint,
    corpus_digest,
    export,
    load_checkpoint,
    read_summary,
)
from tarflowlm.runs.hub import CARD, PREFIX, REPOSITORY, hub_client, hub_errors
from tarflowlm.schema import flatten

Source = Checkpoint | str | Path
"""A checkpoint, or whatever `load_checkpoint` takes."""
NUM_SAMPLES, LONGEST = 2, 256
"""Samples on a card, and their length in tokens unless the context is shorter."""

FLOW = """A TarFlowLM ([arXiv 2507.00425](https://arxiv.org/abs/2507.00425)): every token is a Gaussian in a learned
codebook, and a stack of autoregressive Transformer flows models the latent vectors. Figures of its likelihood are
upper bounds (<=)."""
BASELINE = (
    "A discrete autoregressive Transformer, the baseline of a TarFlowLM. Its likelihood is exact."
)
LIMITS = """Samples are untrue, follow no instructions, and may repeat passages of the training text. Figures compare
with those of other models only on the same text, with the same windows and per the same unit."""


def save_pretrained(
    source: Source,
    folder: str | Path,
    *,
    half: bool = False,
    licence: str | None = None,
    repository: str | None = None,
) -> Path:
    """Write a model with its tokenizer, configuration and a model card into the new `folder`.

    A README.md beside the `source` becomes the card. `half` as in `export`, `licence` an identifier
    of the hub (apache-2.0), `repository` the OWNER/NAME that the card is to name. Nothing is left
    behind if this fails.
    """
    check_type(folder, "folder", (str, os.PathLike), "give the path of a new folder")
    checkpoint = source if isinstance(source, Checkpoint) else load_checkpoint(source)
    folder = export(checkpoint, folder, half=half)
    try:
        # samples are those of the weights that are saved
        card = model_card(
            load_checkpoint(folder), checkpoint.directory, repository or folder.name, licence
        )
        (folder / CARD).write_text(card, encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder


ADDRESS = "https://github.com/tarflowlm/tarflowlm"


def push_to_hub(
    source: Source,
    repository: str,
    *,
    private: bool = False,
    half: bool = False,
    licence: str | None = None,
) -> str:
    """`save_pretrained` into a temporary folder, and `push_folder`; returns the address of the
    model.
    """
    repository = checked_repository(repository)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / repository.rpartition("/")[2]
        save_pretrained(source, folder, half=half, licence=licence, repository=repository)
        return push_folder(folder, repository, private=private)


def push_folder(
    folder: Path, repository: str, *, private: bool = False, space: bool = False
) -> str:
    """Upload what `save_pretrained` wrote as a commit to OWNER/NAME, made if it is not there;
    returns the address.
    """
    hub = hub_client(f"pushing {repository}")
    api, kind = hub.HfApi(library_name="tarflowlm"), {"repo_type": "space"} if space else {}
    with hub_errors(repository):
        new = kind | ({"space_sdk": "gradio"} if space else {})
        api.create_repo(repository, private=private or None, exist_ok=True, **new)
        if private and not api.repo_info(repository, **kind).private:
            raise UserError(
                f"{repository} exists and is public: make it private in its settings, or name another"
            )
        message = "Upload a model made with tarflowlm"
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, **kind)
    return f"{hub.constants.ENDPOINT}/{'spaces/' * space}{repository}"


APP = """from tarflowlm.cli.main import main

main(["studio", ".", "--host", "0.0.0.0", "--no-browser"])
"""


def add_space(folder: Path, title: str) -> None:
    """Add to a saved model what makes a Space of it: app.py, requirements.txt and a head of the
    card.
    """
    (folder / "app.py").write_text(APP, encoding="utf-8")
    (folder / "requirements.txt").write_text(
        f"tarflowlm[studio] @ git+{ADDRESS}\n", encoding="utf-8"
    )
    card = (folder / CARD).read_text(encoding="utf-8")
    head = f"---\ntitle: {title}\nsdk: gradio\napp_file: app.py\npython_version: 3.12\n"
    (folder / CARD).write_text(head + card.removeprefix("---\n"), encoding="utf-8")


def checked_repository(name: str) -> str:
    """OWNER/NAME, without hf: before it."""
    check_type(name, "repository", str, "give OWNER/NAME, a text")
    name = name.removeprefix(PREFIX)
    if not re.fullmatch(REPOSITORY, name):
        raise UserError(
            f"{name!r} is no name on the hub: give OWNER/NAME, of letters, digits and - _ . between them"
        )
    return name


def model_card(checkpoint: Checkpoint, origin: Path, name: str, licence: str | None) -> str:
    """README.md of the saved model `checkpoint`: a head of metadata for the hub, then Markdown.

    `origin` is the folder that it was made from, with the results of its training; a README.md
    there is kept as the text. `name` is its OWNER/NAME or the name of its folder.
    """
    summary, written = read_summary(origin) or {}, origin / CARD
    if written.is_file():
        text = written.read_text(encoding="utf-8")
        if not text.startswith("---\n"):
            return _head(checkpoint, summary, name, licence) + text
        if licence is not None:
            raise UserError(
                f"licence {licence!r}: {written} has a head, which is kept: state it there"
            )
        return text
    rows = "".join(
        f"| {left} | {right} |\n" for left, right in _rows(checkpoint, origin, summary, licence)
    )
    reference, length = (
        f"hf:{name}" if "/" in name else name,
        min(LONGEST, checkpoint.run.model.context),
    )
    return f"""{_head(checkpoint, summary, name, licence)}# {name.rpartition("/")[2]}

{BASELINE if checkpoint.model.is_exact else FLOW}

```
pip install 'tarflowlm[hub]'
tarflowlm sample {reference} --num 2
```

```python
model, tokenizer = tarflowlm.from_pretrained("{name}")
```

| | |
| --- | --- |
{rows}
## Samples

Not selected: `tarflowlm sample {reference} --num {NUM_SAMPLES} --length {length} --seed 0 --device cpu`

{_samples(checkpoint, length)}## Limits

{LIMITS}
"""


def _head(checkpoint: Checkpoint, summary: dict[str, Any], name: str, licence: str | None) -> str:
    """Metadata in YAML, of which JSON values are a part."""
    values: dict[str, Any] = {"library_name": "tarflowlm", "pipeline_tag": "text-generation"}
    values |= {"license": licence} if licence else {}
    values["tags"] = (
        ["tarflowlm", "normalizing-flows"] if not checkpoint.model.is_exact else ["tarflowlm"]
    )
    if test := summary.get("test"):
        kind = "exact" if test["bound"] == "exact" else f"upper bound, {test['bound']}"
        metric = {
            "type": "bpc",
            "name": f"bits per character ({kind})",
            "value": round(test["bpc"], 4),
        }
        data = {"name": checkpoint.run.data.source, "type": "text"}
        result = {"task": {"type": "text-generation"}, "dataset": data, "metrics": [metric]}
        values["model-index"] = [{"name": name.rpartition("/")[2], "results": [result]}]
    return (
        "---\n"
        + "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())
        + "---\n\n"
    )


def _rows(
    checkpoint: Checkpoint, origin: Path, summary: dict[str, Any], licence: str | None
) -> Iterator[tuple[str, str]]:
    run, model, tokenizer, config = (
        checkpoint.run,
        checkpoint.model,
        checkpoint.tokenizer,
        checkpoint.run.model,
    )
    if isinstance(config, BaselineConfig):
        shape = f"{config.layers} layers"
    else:
        shape = ", ".join(
            f"{config.describe(b)} ({config.blocks[b].layers})" for b in range(model.num_blocks)
        )
        shape = f"{shape}, Transformer layers in brackets; d = {config.latent_dim}"
    shape += f"; width {config.trunk.width}, context {config.context}"
    yield (
        "model",
        f"preset `{run.name}`: {shape}; {sum(p.numel() for p in model.parameters()):,} parameters",
    )
    yield (
        "symbols",
        f"{tokenizer.vocab_size:,} ({tokenizer.kind}), normalisation {tokenizer.normalization}",
    )
    units = (("step", "steps"), ("tokens", "tokens"))
    counts = [
        f"{int(checkpoint.info[key]):,} {unit}" for key, unit in units if key in checkpoint.info
    ]
    yield "trained on", ", ".join([f"`{run.data.source}`", *counts, f"seed {run.seed}"])
    if run.parent:
        parent, _, weights = run.parent.partition("@")
        yield "tuned from", f"`{parent}`, sha256 of its weights `{weights}`"
    if digest := corpus_digest(origin):
        yield "tokens", f"sha256 of the hashes of their shards `{digest}`"
    if (command := training_command(run)) is not None:
        yield "command", f"`{command}`"
    if test := summary.get("test"):
        sign = "=" if test["bound"] == "exact" else "<="
        nats = f"{sign} {test['nats_per_token']:.4f} nats per token"
        if math.isfinite(test["stderr"]):  # one window alone has none
            nats += f" (standard error {test['stderr']:.4f})"
        bits, over = (
            f"{sign} {test['bpc']:.4f} bits per character",
            f"over {test['windows']:,} windows",
        )
        yield "test", f"{bits}, {nats}, {over} of the test split ({test['bound']})"
    else:
        yield "test", "not recorded"
    yield "licence", licence or "not stated by its owner"


def _samples(checkpoint: Checkpoint, length: int) -> str:
    generator = torch.Generator().manual_seed(0)
    how: dict[str, Any] = {"generator": generator, "temperature": checkpoint.run.temperature}
    tokens = generate(checkpoint.model, num_tokens=length, num=NUM_SAMPLES, **how).tokens
    texts = map(checkpoint.tokenizer.decode, tokens.tolist())
    # indented, so that nothing in a sample is taken for Markdown
    samples = ("".join(f"        {line}\n" for line in text.splitlines()) for text in texts)
    return "".join(f"{number}.\n\n{sample}\n" for number, sample in enumerate(samples, 1))


def training_command(run: RunConfig) -> str | None:
    """The `tarflowlm train` that gives `run`: its preset and every field that differs; None where
    no preset does.
    """
    if run.name not in PRESETS:
        return None
    options, base = ["--data", run.data.source], preset(run.name)
    missing = max(0, base.model.num_blocks - run.model.num_blocks)
    if missing:
        base = with_blocks(base, run.model.num_blocks)
        options += ["--blocks", str(run.model.num_blocks)]
    theirs, ours = flatten(base), flatten(run)
    if theirs.keys() != ours.keys():
        return None
    # the size of the vocabulary comes from the data
    for name in sorted(ours.keys() - {"data.source", "model.vocab_size"}):
        if ours[name] != theirs[name]:
            value, option = ours[name], "--" + name.replace("_", "-")
            if name == "train.stage_steps" and run.train.mode == "progressive":
                # one for each block of the preset, of which --blocks keeps the first
                value = [*value, *[1] * missing]
            if isinstance(value, bool) and isinstance(theirs[name], bool):
                # a flag; `train.compile` takes a value, and no preset sets it
                options.append(option if value else re.sub(r"([^.]+)$", r"no-\1", option))
            else:
                options += [option, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(["tarflowlm", "train", run.name, "--out", f"runs/{run.name}", *options])
