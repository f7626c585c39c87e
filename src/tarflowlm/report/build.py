"""Building a report: read the runs and their models, draw figures, and write one page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tarflowlm.data import Corpus, cached_corpus, eval_windows
from tarflowlm.errors import UserError
from tarflowlm.evaluation.blocks import BoundParts, bound_parts
from tarflowlm.files import replacing
from tarflowlm.model import as_flow
from tarflowlm.report.blocks import draw_blocks, terms_table
from tarflowlm.report.codes import (
    FEW,
    NAMED,
    PLANE,
    Codes,
    codes_of,
    codes_table,
    draw_codes,
    neighbours_height,
)
from tarflowlm.report.curves import draw_bits, draw_optimisation, draw_throughput
from tarflowlm.report.page import GENERATOR, Page, Picture, Section, config_table, summary_table
from tarflowlm.report.records import RunRecord, read_records
from tarflowlm.report.samples import CSS, SEED, Samples, draw_samples, passes_markup, texts_markup
from tarflowlm.report.style import Figure, check_matplotlib, render, render_narrow
from tarflowlm.runs.checkpoint import Checkpoint, load_checkpoint
from tarflowlm.runs.hub import is_reference
from tarflowlm.runs.released import locate, read_only_reason

PAGE = "index.html"
WIDTH = 9.6
"""Of a figure, inches."""
COUNTED = 1 << 22
"""Tokens of the validation split whose frequencies are counted."""

Progress = Callable[[str, int, int | None], None]
"""Called with the name of a step, how much of it is done, and the total, if that is known."""


@dataclass
class Insight:
    """What the weights of a run show; the notes say what is missing and why."""

    samples: Samples | None = None
    codes: Codes | None = None
    parts: BoundParts | None = None
    step: str = ""
    """Training step of the weights."""
    notes: list[str] = field(default_factory=list)


def write_report(
    directories: Sequence[Path],
    out: Path | None = None,
    *,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write PNG figures and index.html about the runs in `directories` into `out`, and return what was written.

    A run is a run directory, a model exported from one, the name of a released model or hf:OWNER/NAME; all but the
    first have no curves. `out` defaults to DIR/report for a single run directory. An earlier report there is replaced
    file by file. `device` draws the samples and computes the terms of the bound.

    Raises UserError, before anything is written, if a directory is not a run or has no metrics yet, if two runs have
    the same name, if `out` is missing where it is needed or holds something other than a report, or if matplotlib is
    missing.
    """
    check_matplotlib()
    if not directories:
        raise UserError("report needs a run directory: name one or more")
    if out is None and len(directories) > 1:
        raise UserError(f"a report of {len(directories)} runs needs a place: name it with --out")
    if out is None and (whose := read_only_reason(directories[0])) is not None:
        raise UserError(f"{whose}, which is no place for a report: add --out {Path(directories[0]).name}-report")
    progress = progress or (lambda _what, _done, _total: None)
    places = [locate(d) for d in directories]
    out = places[0] / "report" if out is None else out
    # folders in the hub's cache are named after commits
    records = [
        replace(record, name=given.as_posix()) if is_reference(given) else record
        for record, given in zip(read_records(places), directories, strict=True)
    ]
    _check_out(out)
    insights = [_inspect(record, device or torch.device("cpu"), progress) for record in records]
    out.mkdir(parents=True, exist_ok=True)
    curves = 3 * any(record.has_log for record in records)
    writer = _Writer(out, progress, curves + sum((i.codes is not None) + (i.parts is not None) for i in insights))
    page = _page(records, insights, writer)
    with replacing(out / PAGE) as temporary:
        temporary.write_text(page.to_html(), encoding="utf-8")
    return {
        "page": str(out / PAGE),
        "figures": [str(path) for path in writer.paths],
        "runs": [
            {"name": r.name, "status": r.status, "notes": [*r.notes, *i.notes]}
            for r, i in zip(records, insights, strict=True)
        ],
    }


def _check_out(out: Path) -> None:
    """Raises UserError unless `out` is new or empty, or holds an earlier report."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file: name a directory with --out")
    page = out / PAGE
    ours = page.is_file() and f'content="{GENERATOR}"' in page.read_text(encoding="utf-8", errors="replace")[:1000]
    if any(out.iterdir()) and not ours:
        raise UserError(f"{out} exists and holds no report: choose another --out")


class _Writer:
    """Draws figures into a directory and reports progress."""

    def __init__(self, out: Path, progress: Progress, total: int) -> None:
        self.out, self.progress, self.total = out, progress, total
        self.paths: list[Path] = []

    def draw(self, name: str, caption: str, draw: Callable[[Figure], None], height: float, narrow: float) -> Picture:
        """Save a figure of `height` inches as NAME.png, and return it for the page.

        `narrow` is its height where it is NARROW inches wide.
        """
        path = self.out / f"{name}.png"
        svg = render(draw, path, width=WIDTH, height=height)
        self.paths.append(path)
        self.progress("figures", len(self.paths), self.total)
        return Picture(name, svg, caption, render_narrow(draw, f"narrow-{name}", height=narrow))


def _inspect(record: RunRecord, device: torch.device, progress: Progress) -> Insight:
    """Samples and codebook; if the corpus is available, the terms of the bound on its validation windows, too."""
    insight = Insight()
    try:
        checkpoint = load_checkpoint(record.directory, device)
    except UserError as error:
        insight.notes.append(f"Neither samples nor blocks nor codebook are shown: {error}.")
        return insight
    insight.step = checkpoint.info.get("step", "?")
    insight.samples = draw_samples(
        checkpoint.model,
        checkpoint.tokenizer,
        lambda done, total: progress(f"samples of {record.name}, positions", done, total),
    )
    corpus = _corpus(record, checkpoint, insight)
    counts = None
    if corpus is not None:
        valid = corpus.split("valid")
        counts = np.bincount(np.asarray(valid[:COUNTED]), minlength=checkpoint.tokenizer.vocab_size)
    insight.codes = codes_of(checkpoint.model, checkpoint.tokenizer, counts)
    if corpus is not None and not checkpoint.model.is_exact:
        config = record.run
        insight.parts = bound_parts(
            as_flow(checkpoint.model),
            eval_windows(corpus.split("valid"), config.model.context, config.train.evaluate_windows),
            torch.from_numpy(checkpoint.tokenizer.characters_per_token),
            progress=lambda done, total: progress(f"validation windows of {record.name}", done, total),
        )
    return insight


def _corpus(record: RunRecord, checkpoint: Checkpoint, insight: Insight) -> Corpus | None:
    """The run's corpus in the run's tokens, or None with a note."""
    problem = None
    try:
        corpus = cached_corpus(record.run.data.source, record.run.data.tokenizer)
    except (UserError, OSError) as error:
        problem = str(error)
    else:
        if corpus.tokenizer.fingerprint == checkpoint.tokenizer.fingerprint:
            return corpus
        problem = f"{record.run.data.source} is not the text that the run's tokenizer was trained on"
    insight.notes.append(f"The gain of each block is not shown, because the run's corpus cannot be used: {problem}.")
    return None


def _page(records: Sequence[RunRecord], insights: Sequence[Insight], writer: _Writer) -> Page:
    names = ", ".join(r.name for r in records)
    page = Page(f"{'Run' if len(records) == 1 else 'Runs'} {names}", css=CSS)
    page.sections.append(Section("Summary", notes=_SIGNS, parts=[summary_table(records)]))
    logged = [record for record in records if record.has_log]
    if logged:
        legend = 0.18 * len(logged)
        curves = [
            writer.draw("bits", _BITS, lambda f: draw_bits(f, logged), 4.4, 6.0 + legend),
            writer.draw("optimisation", _OPTIMISATION, lambda f: draw_optimisation(f, logged), 3.7, 5.6 + legend),
            writer.draw("throughput", _THROUGHPUT, lambda f: draw_throughput(f, logged), 3.5, 3.4 + legend),
        ]
        page.sections.append(Section("Training", parts=curves))
    for record, insight in zip(records, insights, strict=True):
        page.sections.append(_run_section(record, insight, writer))
    page.sections.append(Section("Configuration", parts=[config_table(records)], is_folded=True))
    return page


def _run_section(record: RunRecord, insight: Insight, writer: _Writer) -> Section:
    parts: list[Any] = []
    notes = [*record.notes, *insight.notes]
    if record.is_exact:
        notes.append("A discrete model: its likelihood is exact, and it has no blocks and no codebook.")
    if (samples := insight.samples) is not None:
        notes.append(_SAMPLES.format(number=len(samples.texts), s=samples, seed=SEED, step=insight.step))
        parts.append(texts_markup(samples))
        if samples.passes:
            parts.append(passes_markup(samples, _PASSES))
    if (found := insight.parts) is not None:
        caption = _BLOCKS.format(windows=found.windows, tokens=found.tokens, step=insight.step)
        blocks, name = len(found.log_dets), f"blocks-{record.slug}"
        height, narrow = 1.8 + 0.34 * (blocks + 4), 3.1 + 0.3 * (blocks + 4) + 0.4 * blocks
        parts.append(writer.draw(name, caption, lambda f: draw_blocks(f, found), height, narrow))
        parts.append(terms_table(found))
    if (codes := insight.codes) is not None:
        caption, name = _codes_caption(codes, insight.step), f"codebook-{record.slug}"
        narrow = PLANE + neighbours_height(codes) + 0.8
        parts.append(writer.draw(name, caption, lambda f: draw_codes(f, codes), 6.4, narrow))
        parts.append(codes_table(codes))
    return Section(record.name, notes=notes, parts=parts)


_SIGNS = ("Figures of flows are upper bounds, marked <=; those of a discrete baseline are exact.",)
_SAMPLES = (
    "{number} samples of {s.tokens} tokens with the weights of step {step}: seed {seed}, temperature "
    "{s.temperature}, not selected."
)
_PASSES = (
    "The first of them after every pass. The flow turns noise into latents block by block, the last block first; "
    "each row shows the symbols nearest to the latents at that point. Where only the last row reads as text, block 1 "
    "does the writing."
)
_BITS = (
    "Bits per character against tokens and against training time. Faint lines: training batches; with markers: "
    "validation windows. Flows show upper bounds. The first steps may lie above the frame."
)
_OPTIMISATION = (
    "Learning rate, and gradient norm with its running median. Every stage restarts the schedule; runs with the "
    "same rates cover each other."
)
_THROUGHPUT = "Training tokens per second with their running median; the numbers are the medians of each stage."
_BLOCKS = (
    "The bound on {windows:,} validation windows ({tokens:,} tokens) with the weights of step {step}. First its "
    "terms in nats per token, added up from the top; then by how much each block lowers the bound of those below it, "
    "each time with the standard normal on top; block 1 is measured against the bare standard normal. Of jointly "
    "trained blocks, only the whole stack is trained to be a good model."
)


def _codes_caption(codes: Codes, step: str) -> str:
    what = "Every" if len(codes.symbols) <= FEW else f"The {NAMED}"
    order = "most frequent of the validation text" if codes.is_counted else "first of the vocabulary"
    named = "Every symbol is named." if what == "Every" else f"Named where there is room: the {NAMED} {order}."
    text = f"The {codes.noun} at step {step} on its first two principal components. {named}"
    if codes.std is None:
        return f"{text} Distances are Euclidean, in units of the root mean square norm of the embeddings."
    return (
        f"{text} Distances are measured in all dimensions and in units of the symbol's own σ: a sample is nearer to "
        f"a neighbour D σ away than to its own code with probability Φ(−D/2), 2 % at D = 4."
    )
