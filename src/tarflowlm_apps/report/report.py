"""The report: reads runs and their models, draws figures, and writes one page."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from tarflowlm.data import eval_windows, prepare_corpus
from tarflowlm.errors import SILENT, Progress, UserError, check_package
from tarflowlm.evaluation.blocks import latent_report
from tarflowlm.evaluation.likelihood import bits
from tarflowlm.files import replacing
from tarflowlm.generation.texts import Samples
from tarflowlm.model import as_flow
from tarflowlm.requests import Writing
from tarflowlm.runs.checkpoint import Checkpoint, corpus_digest, load_checkpoint, locate
from tarflowlm.runs.hub import shown_name
from tarflowlm.runs.records import RunRecord, read_record
from tarflowlm.terminal.tokens import pass_rows
from tarflowlm_apps.grid import div, noise_of, to_html
from tarflowlm_apps.report.figures import AXES, CURVES, draw_bits, draw_codebook, draw_gains
from tarflowlm_apps.report.page import GENERATOR, page_html, picture_html, section_html
from tarflowlm_apps.report.style import Figure, render
from tarflowlm_apps.report.tables import config_table, summary_table, terms_table, untrained

NUM = 3  # samples
LENGTH = 256  # the most tokens of each
WIDTH = 4.6  # inches; on a phone, such a figure shows its text in full size
NAMED = 64  # codes that are named

SIGNS = "Flows have upper bounds, marked <=. The figures of a discrete baseline are exact."
PASSES = (
    "The first sample after every block, the last block first. Where only the last row is text, "
    "block 1 does the writing."
)
SAVED = "How much each block saves, in nats per token and in bits per character."
BLOCKS = (
    "How much each block lowers the bound of the blocks under it with the standard normal on top, "
    "on {windows:,} validation windows ({tokens:,} tokens). Where blocks are trained jointly, only "
    "the whole stack is trained to be a good model."
)
EXACT = "A discrete model: its likelihood is exact, and it has no blocks and no codebook."


class RunNotes(TypedDict):
    name: str
    status: str
    notes: list[str]


class Report(TypedDict):
    """The files of a report, and its runs with notes on missing parts."""

    page: str
    figures: list[str]
    runs: list[RunNotes]


def slug(record: RunRecord) -> str:
    """The name of a run as a file name and an id."""
    return re.sub(r"[^\w.-]+", "_", record.name)


def write_report(
    directories: Sequence[Path],
    out: Path | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = SILENT,
) -> Report:
    """Write PNG figures and index.html about the runs in `directories` into `out`.

    A run is a run directory, or a model as `locate` finds it, without curves. `out` defaults to
    DIR/report for a single run directory; an earlier report there is replaced file by file. Raises
    UserError, before anything is written, for a directory without a run, for runs of the same name,
    and for an `out` that holds something else.
    """
    check_package("matplotlib", "plots", "report")
    records: dict[str, RunRecord] = {}
    for directory in directories:
        folder = locate(directory)
        record = read_record(folder, shown_name(directory, folder))
        if slug(record) in records:
            what = f"two runs have the same name {record.name!r}"
            raise UserError(f"{what}: give each run once, or rename one of the directories")
        if np.isnan(record.train["bpc"]).any():
            what = f"{record.name} has no bits per character, as its tokenizer loses some of a text"
            raise UserError(f"{what}: `tarflowlm eval {directory}` has its bits per token")
        records[slug(record)] = record
    if out is None:
        # a model of the package or the hub lies elsewhere than its name says
        if len(directories) != 1 or record.directory != directories[0]:
            raise UserError("only a single run of yours has a place for its report: add --out DIR")
        out = directories[0] / "report"
    page = out / "index.html"
    is_new = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not is_new and not (page.is_file() and GENERATOR in page.read_text("utf-8", "replace")):
        raise UserError(f"{out} exists and holds no report: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    if is_new:
        # so that an interrupted report can be written again
        page.write_text(f"{GENERATOR}unfinished", encoding="utf-8")
    writer = _Writer(out, device, progress)
    with replacing(page) as temporary:
        temporary.write_text(writer.page(list(records.values())), encoding="utf-8")
    runs = [RunNotes(name=r.name, status=r.status, notes=r.notes) for r in records.values()]
    return Report(page=str(page), figures=writer.figures, runs=runs)


@dataclass(frozen=True)
class _Writer:
    """Writes the page of a report, and draws its figures."""

    out: Path
    device: torch.device | str
    progress: Progress
    figures: list[str] = field(default_factory=list)

    def page(self, records: Sequence[RunRecord]) -> str:
        sections = [section_html("Summary", [SIGNS], [summary_table(records)])]
        logged = [record for record in records if record.has_log]
        if logged:
            self.progress.stage("training curves")
            # of a single run, tokens and seconds would give the same picture twice
            over = AXES if len(logged) > 1 else AXES[:1]
            draw = partial(draw_bits, records=logged, over=over)
            curves = self._draw("bits", CURVES, draw, 3.0 * len(over) + 0.18 * len(logged))
            sections.append(section_html("Training", parts=[curves]))
        sections += [self._section(record) for record in records]
        table = config_table(records)
        sections.append(section_html("Configuration", parts=[table], is_folded=True))
        return page_html(f"Report on {', '.join(record.name for record in records)}", sections)

    def _draw(self, name: str, caption: str, draw: Callable[[Figure], None], height: float) -> str:
        """A figure of this height in inches as PNG; returns it as HTML."""
        svg = render(draw, name, self.out, width=WIDTH, height=height)
        self.figures.append(str(self.out / f"{name}.png"))
        return picture_html(name, svg, caption)

    def _section(self, record: RunRecord) -> str:
        """Samples, terms of the bound and codebook of a run."""
        try:
            checkpoint = load_checkpoint(record.directory, self.device)
        except UserError as error:
            record.notes.append(f"Neither samples nor blocks nor codebook are shown: {error}.")
            return section_html(record.name, record.notes)
        length = min(LENGTH, checkpoint.model.config.context)
        parts = self._samples(record, checkpoint, length)
        step = checkpoint.info.get("step", "?")
        run = checkpoint.run
        how = f"seed 0, temperature {run.temperature:g}, top-p {run.top_p:g}, not selected"
        notes = [f"Step {step}. {NUM} samples of at most {length} tokens: {how}."]
        idle = untrained(record)
        if idle:
            names = ", ".join(f"block {block}" for block in idle)
            notes.append(f"Not trained, as the run had no time left: {names}.")
        if checkpoint.model.is_exact:
            notes.append(EXACT)
        else:
            parts += self._flow(record, checkpoint)
        return section_html(record.name, [*record.notes, *notes], parts)

    def _samples(self, record: RunRecord, checkpoint: Checkpoint, length: int) -> list[str]:
        request = Writing(num=NUM, length=length)
        samples = Samples(request, checkpoint, past_end=True)
        self.progress.stage(f"samples of {record.name}, tokens", samples.num_tokens)
        # a large model may need several batches
        written, *others = samples.batches(self.progress)
        every = [text for batch in (written, *others) for text in batch.texts]
        texts = "".join(f'<p class="sample">{escape(text)}</p>\n' for text in every)
        parts = [div("samples", texts)]
        if checkpoint.model.num_blocks > 1:
            flow = as_flow(checkpoint.model)
            length = written.lengths[0]
            passes = [text[0, :length].cpu() for text in written.generation.passes(flow)]
            states = [state[0, :length] for state in written.generation.states(flow)]
            rows = to_html(pass_rows(passes, checkpoint.tokenizer, noise=noise_of(flow, states)))
            parts.append(f"<figure>{rows}<figcaption>{PASSES}</figcaption></figure>\n")
        return parts

    def _flow(self, record: RunRecord, checkpoint: Checkpoint) -> list[str]:
        """Pictures of the blocks and of the codebook, and a table of the terms of the bound."""
        flow = as_flow(checkpoint.model)
        tokenizer = checkpoint.tokenizer
        named = list(range(tokenizer.vocab_size))
        chosen = "first"
        parts = []
        table = ""
        windows = _windows(record, checkpoint)
        if windows is not None:
            counts = windows.flatten().bincount(minlength=tokenizer.vocab_size)
            named = counts.argsort(descending=True, stable=True).tolist()
            chosen = "most frequent"
            self.progress.stage(f"validation windows of {record.name}", len(windows))
            states = latent_report(flow, windows, progress=self.progress)
            characters = tokenizer.characters_per_token[windows.numpy()].sum()
            to_bpc = bits(windows.numel() / characters)
            how = BLOCKS.format(windows=len(windows), tokens=windows.numel())
            terms = terms_table(states, to_bpc)
            table = section_html(
                "For experts: the terms of the bound", [how], [terms], is_folded=True
            )
            draw = partial(draw_gains, states=states, to_bpc=to_bpc)
            height = 1.0 + 0.7 * flow.num_blocks
            parts.append(self._draw(f"blocks-{slug(record)}", SAVED, draw, height))
        caption = "The codebook on its first two principal components."
        if len(named) > NAMED:
            caption += f" The {NAMED} {chosen} tokens are named."
        draw = partial(
            draw_codebook,
            codebook=flow.codebook,
            symbols=tokenizer.symbols,
            named=named[:NAMED],
        )
        return [*parts, self._draw(f"codebook-{slug(record)}", caption, draw, 4.6), table]


def _windows(record: RunRecord, checkpoint: Checkpoint) -> Tensor | None:
    """The validation windows of the run's text; None, with a note, if it cannot be used."""
    source, length = record.run.data.source, checkpoint.model.config.context
    try:
        corpus = prepare_corpus(record.run.data, checkpoint.tokenizer)
        windows = eval_windows(corpus.split("valid"), length, record.run.train.evaluate_windows)
    except (UserError, OSError) as error:
        missing = "The gain of each block is not shown, because the run's corpus cannot be used"
        record.notes.append(f"{missing}: {error}.")
        return None
    if corpus_digest(checkpoint.directory) not in (None, corpus.fingerprint):
        record.notes.append(
            f"{source} has changed since training: its validation split may hold some of that."
        )
    return windows
