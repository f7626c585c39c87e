"""Results on disk: CSV, a plot, an HTML page, and Markdown with everything needed to repeat them."""

import csv
import io
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tarflowlm.data import cached_corpus, load_tokenizer
from tarflowlm.data.text import sha256_of
from tarflowlm.files import replacing
from tarflowlm.report.style import Figure, render
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings
from tarflowlm.runs.checkpoint import CONFIG, WEIGHTS


def write_results(
    recipe: Recipe, settings: Settings, rows: Sequence[Row], finished: Sequence[Finished], *, command: Sequence[str]
) -> list[Path]:
    """Write NAME.csv, NAME.md and, if the recipe has them, a plot NAME.png and a page NAME.html; returns their paths.

    `command` is printed as what made them.
    """
    csv_file, plot, page, markdown = (settings.out / f"{recipe.name}.{kind}" for kind in ("csv", "png", "html", "md"))
    written = [_write(csv_file, _csv(rows))]
    if recipe.draw is not None:
        _plot(plot, recipe, rows)
        written.append(plot)
    if recipe.page is not None:
        written.append(_write(page, recipe.page(rows)))
    parts = [
        f"# {recipe.title}\n",
        f"{recipe.claim}\n",
        markdown_table(recipe.table(rows)),
        f"![{recipe.title}]({plot.name})\n" if recipe.draw is not None else "",
        f"As a page: [{page.name}]({page.name}).\n" if recipe.page is not None else "",
        recipe.text(settings, finished, rows) if recipe.text is not None else "",
        _provenance(settings, finished, command),
    ]
    return [*written, _write(markdown, "\n".join(part for part in parts if part))]


def _write(path: Path, text: str) -> Path:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _csv(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; empty without rows."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)

    if not rows:
        return ""
    columns = _columns(rows)
    lines = [columns, ["---"] * len(columns), *([cell(row.get(name)) for name in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _plot(path: Path, recipe: Recipe, rows: Sequence[Row]) -> None:
    def draw(figure: Figure) -> None:
        assert recipe.draw is not None
        recipe.draw(figure, rows)
        figure.suptitle(recipe.title, fontsize=10, x=0.01, ha="left")

    render(draw, path, width=recipe.size[0], height=recipe.size[1])


def _provenance(settings: Settings, finished: Sequence[Finished], command: Sequence[str]) -> str:
    lines = ["## How it was made\n", f"```\n{shlex.join(command)}\n```\n"]
    lines += ["| run, -s: seed | steps | seconds | config.json | model.safetensors |", f"|{' --- |' * 5}"]
    for done in finished:
        hashes = [sha256_of(done.directory / name)[:12] for name in (CONFIG, WEIGHTS)]
        counts = [f"{done.summary[name]:,.0f}" for name in ("steps", "seconds")]
        lines.append(f"| {' | '.join([done.training.name, *counts, *hashes])} |")
    versions = f"tarflowlm {version('tarflowlm')}, PyTorch {torch.__version__}, Python {platform.python_version()}"
    texts = set()
    for done in finished:
        source = done.summary["source"]
        files = cached_corpus(source, load_tokenizer(done.directory)).meta["files"]
        digests = ", ".join(record["sha256"][:12] for record in files[:3])
        more = f" and {len(files) - 3} more files" if len(files) > 3 else ""
        texts.add(f"{Path(source).name} {digests}{more}")
    lines.append(f"\nHashes are the first 12 digits of sha256. Texts: {'; '.join(sorted(texts))}.")
    lines.append(f"Machine: {_hardware(settings.device)}; {versions}.\n")
    return "\n".join(lines)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        name = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} {'thread' if threads == 1 else 'threads'}, {device.type}"
