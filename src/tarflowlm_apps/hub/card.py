"""The model card, README.md of a saved model: what it is, how it was trained, and samples."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tarflowlm.data.sources import HUB, split_field
from tarflowlm.errors import UserError, counted
from tarflowlm.evaluation.likelihood import in_bits, sign_of
from tarflowlm.generation.texts import write_texts
from tarflowlm.presets import PRESETS, preset
from tarflowlm.requests import Writing
from tarflowlm.runs import CARD
from tarflowlm.runs.checkpoint import Checkpoint, corpus_digest, read_summary
from tarflowlm.runs.hub import read_card
from tarflowlm.schema import flatten

FLOW = """A TarFlowLM ([arXiv 2507.00425](https://arxiv.org/abs/2507.00425)): every token is a
Gaussian in a learned codebook, and a stack of autoregressive Transformer flows models the latent
vectors. Its bits and nats are upper bounds (<=)."""
BASELINE = """A discrete autoregressive Transformer, the baseline of a TarFlowLM. Its likelihood is
exact."""


class TrainingText(NamedTuple):
    """What a card says of the text that a model was trained on."""

    what: str
    licence: str
    language: str | None = None
    """As the hub calls it; None if nobody has said it."""
    repository: str | None = None
    """The set of the hub."""


TEXTS = {
    "tales": TrainingText("fairy tales and children's stories", "public domain", "en"),
    "stories": TrainingText(
        "short stories in simple words, about 2 % of TinyStories, written by GPT-3.5 and GPT-4",
        "CDLA-Sharing-1.0, of which trained models are free",
        "en",
        "roneneldan/TinyStories",
    ),
    "text8": TrainingText(
        "the start of the English Wikipedia in 27 symbols", "GFDL and CC BY-SA", "en"
    ),
    "openwebtext": TrainingText(
        "web pages that were linked to on Reddit",
        "that of each page; CC0-1.0 for the collection",
        "en",
        "Skylion007/openwebtext",
    ),
}
"""The texts that have names."""
OWN = TrainingText("a text of the owner of this model", "not stated by its owner")

TEMPLATE = Path(__file__).with_suffix(".md")
"""The card of a model that brings none, for Jinja."""


def model_card(checkpoint: Checkpoint, origin: Path, name: str, licence: str | None) -> str:
    """The card of the saved model `checkpoint`: a head of metadata for the hub, then Markdown.

    `origin` is the folder that it was made from; a README.md there is kept. `name` is its
    OWNER/NAME or the name of its folder.
    """
    is_flow = not checkpoint.model.is_exact
    text = text_of(checkpoint.run.data.source)
    results = [*_results(checkpoint, origin)]
    head = ModelCardData(
        library_name="tarflowlm",
        pipeline_tag="text-generation",
        license=licence,
        language=text.language,
        datasets=text.repository and [text.repository],
        tags=["tarflowlm", "normalizing-flows"] if is_flow else ["tarflowlm"],
        # the hub's index of results names a model; nothing else does
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    written = read_card(origin)
    if written.startswith("---\n"):
        if licence is not None:
            raise UserError(f"licence {licence!r}: {origin / CARD} has a head: state it there")
        return written
    if written:
        return f"---\n{head}\n---\n\n{written}"
    request = Writing(num=2, length=min(256, checkpoint.run.model.context))
    card = ModelCard.from_template(
        head,
        template_path=str(TEMPLATE),
        name=name,
        what=FLOW if is_flow else BASELINE,
        facts=_facts(checkpoint, origin, licence),
        request=request,
        samples=write_texts(request, checkpoint),
    )
    return f"{card}\n"


def text_of(source: str) -> TrainingText:
    """What is known of the text that `source` names."""
    path, _ = split_field(source)
    if path.startswith(HUB):
        repository = "/".join(path.removeprefix(HUB).split("/")[:2])
        where = f"https://huggingface.co/datasets/{repository}"
        licence = f"that of [the set]({where})"
        return TrainingText(f"the set `{repository}` of the hub", licence, None, repository)
    return TEXTS.get(source, OWN)


def _results(checkpoint: Checkpoint, origin: Path) -> Iterator[EvalResult]:
    """The test figure for the hub's index of models; its name says whether it is a bound."""
    test = (read_summary(origin) or {}).get("test")
    # none under a tokenizer that loses characters
    if test and test["bpc"] is not None:
        source = checkpoint.run.data.source
        text = source.removeprefix("./")
        yield EvalResult(
            task_type="text-generation",
            dataset_type=text_of(source).repository or text,
            dataset_name=f"{text}, test split",
            metric_type="bits_per_character",
            metric_name=f"bits per character ({sign_of(test['bound'])})",
            metric_value=round(test["bpc"], 4),
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
    text = text_of(run.data.source)
    yield "training text", f"{text.what}; licence: {text.licence}"
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
        result = f"{in_bits(test['bound'], test)}, {sign} {nats}, over {windows}"
    yield "test", result
    yield "licence of the weights", licence or "not stated by its owner"
