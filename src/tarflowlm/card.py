"""The model card: what a saved model is, how it was trained, and what it writes."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import indent

from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import sign_of
from tarflowlm.presets import PRESETS, preset
from tarflowlm.runs.checkpoint import Checkpoint, Summary, corpus_digest, read_summary
from tarflowlm.runs.hub import CARD, read_card
from tarflowlm.schema import flatten
from tarflowlm.texts.requests import Writing
from tarflowlm.texts.writing import write

NUM_SAMPLES = 2
LONGEST = 256
"""The length of the samples in tokens, unless the context is shorter."""
FLOW = """A TarFlowLM ([arXiv 2507.00425](https://arxiv.org/abs/2507.00425)): every token is a
Gaussian in a learned codebook, and a stack of autoregressive Transformer flows models the latent
vectors. Its bits and nats are upper bounds (<=)."""
BASELINE = """A discrete autoregressive Transformer, the baseline of a TarFlowLM. Its likelihood is
exact."""
TEMPLATE = Path(__file__).with_name("card.md").read_text(encoding="utf-8")


def model_card(checkpoint: Checkpoint, origin: Path, name: str, licence: str | None) -> str:
    """README.md of the saved model `checkpoint`: a head of metadata for the hub, then Markdown.

    `origin` is the folder that it was made from; a README.md there is kept. `name` is its
    OWNER/NAME or the name of its folder.
    """
    # metadata in YAML, of which JSON values are a part
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
    length = min(LONGEST, checkpoint.run.model.context)
    facts = _facts(checkpoint, origin, licence)
    return TEMPLATE.format(
        head=head,
        title=name.rpartition("/")[2],
        what=BASELINE if checkpoint.model.is_exact else FLOW,
        name=name,
        reference=f"hf:{name}" if "/" in name else name,
        facts="".join(f"| {fact} | {value} |\n" for fact, value in facts),
        num=NUM_SAMPLES,
        length=length,
        samples=_samples(checkpoint, length),
    )


def _facts(checkpoint: Checkpoint, origin: Path, licence: str | None) -> Iterator[tuple[str, str]]:
    run = checkpoint.run
    tokenizer = checkpoint.tokenizer
    model = checkpoint.model
    blocks = ", ".join(run.model.describe(block) for block in range(model.num_blocks))
    size = f"{model.num_parameters:,} parameters, context {run.model.context}"
    yield "model", f"preset `{run.name}`: {blocks}; {size}"
    symbols = f"{tokenizer.vocab_size:,} ({tokenizer.kind})"
    yield "symbols", f"{symbols}, normalisation {tokenizer.normalization}"
    units = {"step": "steps", "tokens": "tokens"}
    counts = [f"{int(n):,} {units[key]}" for key, n in checkpoint.info.items() if key in units]
    yield "trained on", ", ".join([f"`{run.data.source}`", *counts, f"seed {run.seed}"])
    if run.parent:
        parent, _, weights = run.parent.partition("@")
        yield "tuned from", f"`{parent}`, sha256 of its weights `{weights}`"
    digest = corpus_digest(origin)
    if digest is not None:
        yield "tokens", f"sha256 of the hashes of their shards `{digest}`"
    if run.name in PRESETS:
        theirs = flatten(preset(run.name)) | {"data.source": run.data.source}
        ours = flatten(replace(run, model=replace(run.model, vocab_size=0)))
        changes = [f"`{name}` {ours[name]}" for name in ours if ours[name] != theirs.get(name)]
        yield "other than the preset", ", ".join(changes) or "nothing"
    test = (read_summary(origin) or {}).get("test")
    yield "test", _result(test) if test else "not recorded"
    yield "licence", licence or "not stated by its owner"


def _result(test: Summary) -> str:
    sign = sign_of(test["bound"])
    bits = f"{sign} {test['bpc']:.4f} bits per character"
    nats = f"{sign} {test['nats_per_token']:.4f} nats per token"
    if math.isfinite(test["stderr"]):  # one window alone has none
        nats += f" (standard error {test['stderr']:.4f})"
    return f"{bits}, {nats}, over {test['windows']:,} windows of the test split ({test['bound']})"


def _samples(checkpoint: Checkpoint, length: int) -> str:
    texts = write(Writing(num_tokens=length, num=NUM_SAMPLES), checkpoint)
    # indented, so that nothing in a sample is taken for Markdown
    shown = (f"{n}.\n\n{indent(text, ' ' * 8)}\n\n" for n, text in enumerate(texts, 1))
    return "".join(shown)
