"""Building a report: read the runs and their models, draw figures, and write one page."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tarflowlm.data import Corpus, cached_corpus, eval_windows
from tarflowlm.errors import UserError
from tarflowlm.evaluation.blocks import bound_parts
from tarflowlm.files import replacing
from tarflowlm.generation import Watch, generate
from tarflowlm.generation.writing import num_positions
from tarflowlm.model import as_flow
from tarflowlm.progress import SILENT, Progress
from tarflowlm.runs.checkpoint import Checkpoint, load_checkpoint
from tarflowlm.runs.hub import is_reference, locate, read_only_reason
from tarflowlm.views import figures, grid
from tarflowlm.views.records import RunRecord, config_table, read_records, runs_table, summary_of
from tarflowlm.views.style import (
    GENERATOR,
    Figure,
    Section,
    check_package,
    page_html,
    picture_html,
    render,
)

NUM, LENGTH, SEED = 3, 256, 0  # samples, the most tokens of each, and how they are drawn

CSS = f"""{grid.CSS}
.samples {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }}
.sample {{ border-left: 3px solid var(--grid); margin: 0; overflow-wrap: anywhere; padding: .1rem .8rem;
          white-space: pre-wrap; }}
"""


def draw_samples(
    checkpoint: Checkpoint, progress: Progress = SILENT
) -> tuple[list[str], list[Tensor]]:
    """NUM texts of the trained context, or of LENGTH tokens where that is less; always the same for
    a model. And the first one [T] after every pass, noise first; nothing for fewer than two
    blocks.
    """
    model, decode = checkpoint.model, checkpoint.tokenizer.decode
    how: dict[str, Any] = {
        "generator": torch.Generator().manual_seed(SEED),
        "watch": Watch(progress),
    }
    how |= {
        "num_tokens": min(LENGTH, model.config.context),
        "temperature": checkpoint.run.temperature,
    }
    result = generate(model, num=NUM, **how)
    passes = [state[0] for state in result.passes] if model.num_blocks > 1 else []
    return [decode(row.tolist()) for row in result.tokens], passes


WIDTH, DPI = (
    4.6,
    240,
)  # inches, dots per inch of a PNG; on a phone, such a figure shows its text in full size
COUNTED = 1 << 22  # tokens of the validation split whose frequencies are counted

Draw = Callable[[str, str, Callable[[Figure], None], float], str]
"""Draws the figure of a name, caption, function and height in inches; returns its HTML."""


def write_report(
    directories: Sequence[Path],
    out: Path | None = None,
    *,
    device: torch.device | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write PNG figures and index.html about the runs in `directories` into `out`, and return what
    was written.

    A run is a run directory, a model exported from one, the name of a released model or
    hf:OWNER/NAME; all but the first have no curves. `out` defaults to DIR/report for a single run
    directory. An earlier report there is replaced file by file. `device` draws the samples and
    computes the terms of the bound. Raises UserError, before anything is written, for a directory
    without a run, for runs of the same name, and for an `out` that holds something else.
    """
    check_package("matplotlib", "plots")
    if out is None:
        several = len(directories) != 1
        problem = (
            f"{len(directories)} runs are given" if several else read_only_reason(directories[0])
        )
        if problem is not None:
            place = "DIR" if several else f"{Path(directories[0]).name}-report"
            raise UserError(f"{problem}, so the report needs a place: add --out {place}")
    places = [locate(directory) for directory in directories]
    out = places[0] / "report" if out is None else out
    # folders in the hub's cache are named after commits
    pairs = zip(read_records(places), directories, strict=True)
    records = [
        replace(record, name=d.as_posix()) if is_reference(d) else record for record, d in pairs
    ]
    page = out / "index.html"
    ours = (
        page.is_file()
        and f'content="{GENERATOR}"' in page.read_text(encoding="utf-8", errors="replace")[:1000]
    )
    if out.exists() and not (ours or (out.is_dir() and not any(out.iterdir()))):
        raise UserError(f"{out} exists and holds no report: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    written: list[str] = []

    def draw(name: str, caption: str, draw: Callable[[Figure], None], height: float) -> str:
        written.append(str(out / f"{name}.png"))
        return picture_html(
            name, render(draw, Path(written[-1]), width=WIDTH, height=height, dpi=DPI), caption
        )

    signs = "Flows have upper bounds, marked <=. The figures of a discrete baseline are exact."
    sections = [Section("Summary", [signs], [runs_table(records, list(map(summary_of, records)))])]
    if logged := [record for record in records if record.has_log]:
        progress.stage("training curves")
        legend = 0.18 * len(logged)
        curves = draw("bits", _BITS, lambda f: figures.draw_bits(f, logged), 6.0 + legend)
        sections.append(Section("Training", parts=[curves]))
    sections += [
        _run_section(record, device or torch.device("cpu"), draw, progress) for record in records
    ]
    sections.append(Section("Configuration", parts=[config_table(records)], is_folded=True))
    title = f"{'Run' if len(records) == 1 else 'Runs'} {', '.join(r.name for r in records)}"
    with replacing(page) as temporary:
        temporary.write_text(page_html(title, sections, css=CSS), encoding="utf-8")
    runs = [
        {"name": record.name, "status": record.status, "notes": record.notes} for record in records
    ]
    return {"page": str(page), "figures": written, "runs": runs}


def _run_section(
    record: RunRecord, device: torch.device, draw: Draw, progress: Progress
) -> Section:
    """Samples, terms of the bound and codebook of a run; its notes get a line for each that is
    missing.
    """
    try:
        checkpoint = load_checkpoint(record.directory, device)
    except UserError as error:
        record.notes.append(f"Neither samples nor blocks nor codebook are shown: {error}.")
        return Section(record.name, record.notes)
    model, tokenizer, step = (
        checkpoint.model,
        checkpoint.tokenizer,
        checkpoint.info.get("step", "?"),
    )
    length = min(LENGTH, model.config.context)
    progress.stage(f"samples of {record.name}, positions", num_positions(model, length))
    samples, passes = draw_samples(checkpoint, progress)
    texts = "".join(f'<p class="sample">{escape(text)}</p>\n' for text in samples)
    parts, tables, counts = [f'<div class="samples">\n{texts}</div>\n'], [], None
    if passes:
        rows = grid.to_html(grid.pass_rows(passes, tokenizer))
        parts.append(f"<figure>\n{rows}\n<figcaption>{escape(_PASSES)}</figcaption>\n</figure>\n")
    if (corpus := _corpus(record, checkpoint)) is not None:
        valid = corpus.split("valid")
        counts = np.bincount(np.asarray(valid[:COUNTED]), minlength=tokenizer.vocab_size)
        if not model.is_exact:
            windows = eval_windows(valid, model.config.context, record.run.train.evaluate_windows)
            progress.stage(f"validation windows of {record.name}", len(windows))
            characters = torch.from_numpy(tokenizer.characters_per_token)
            terms = bound_parts(as_flow(model), windows, characters, progress=progress)
            caption = _BLOCKS.format(windows=terms.windows, tokens=terms.tokens, step=step)
            height = 4.3 + 0.7 * len(terms.log_dets)
            parts.append(
                draw(
                    f"blocks-{record.slug}",
                    caption,
                    lambda f: figures.draw_blocks(f, terms),
                    height,
                )
            )
            tables.append(figures.terms_table(terms))
    codes = figures.codes_of(model, tokenizer, counts)
    caption = f"The {codes.noun} at step {step} on its first two principal components."
    if len(codes.named) < len(codes.symbols):
        order = (
            "first of the vocabulary" if counts is None else "most frequent of the validation text"
        )
        caption += f" Named: the {len(codes.named)} {order}."
    parts.append(
        draw(f"codebook-{record.slug}", caption, lambda f: figures.draw_codes(f, codes), 4.6)
    )
    exact = [
        "A discrete model: its likelihood is exact, and it has no blocks and no codebook."
    ] * record.is_exact
    how = f"seed {SEED}, temperature {checkpoint.run.temperature:g}, not selected"
    drawn = f"{NUM} samples of {length} tokens at step {step}: {how}."
    return Section(record.name, [*record.notes, *exact, drawn], [*parts, *tables])


def _corpus(record: RunRecord, checkpoint: Checkpoint) -> Corpus | None:
    """The run's corpus in the run's tokens, or None with a note."""
    try:
        corpus = cached_corpus(record.run.data.source, record.run.data.tokenizer)
        if corpus.tokenizer.fingerprint == checkpoint.tokenizer.fingerprint:
            return corpus
        problem = (
            f"{record.run.data.source} is not the text that the run's tokenizer was trained on"
        )
    except (UserError, OSError) as error:
        problem = str(error)
    record.notes.append(
        f"The gain of each block is not shown, because the run's corpus cannot be used: {problem}."
    )
    return None


_PASSES = "The first sample after every block, decoded with the codebook. Noise becomes latents block by block, the "
_PASSES += "last block first. Where only the last row reads as text, block 1 does the writing."
_BITS = "Bits per character against tokens and training time. Faint: training batches; with markers: validation "
_BITS += "windows. Flows show upper bounds. The first steps may lie above the frame."
_BLOCKS = "The bound on {windows:,} validation windows ({tokens:,} tokens) at step {step}. Above, its terms, added "
_BLOCKS += "up from the top: blue is positive, orange negative. Below, by how much each block lowers the bound of "
_BLOCKS += "the blocks under it with the standard normal on top; block 1 is compared with the standard normal alone. "
_BLOCKS += "Of jointly trained blocks, only the whole stack is trained to be a good model."
