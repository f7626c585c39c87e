"""Results on disk: a CSV, a plot, and Markdown with everything needed to repeat them."""

import csv
import io
import shlex
from collections.abc import Sequence
from pathlib import Path

from reproduction.recipe import Finished, Recipe, Row
from reproduction.records import Records
from reproduction.settings import Settings
from tarflowlm.data import SOURCE_NAMES, DataConfig
from tarflowlm.data.sources import resolve_source
from tarflowlm.files import replacing, sha256_of
from tarflowlm_apps.report.style import Figure, render

RUNS = "runs.csv"
"""All runs on record."""


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The names of all columns, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; empty without rows."""
    if not rows:
        return ""
    columns = columns_of(rows)
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(name)) for name in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def write(path: Path, text: str) -> None:
    """Write a text, or nothing if it fails."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_results(
    recipe: Recipe,
    settings: Settings,
    rows: Sequence[Row],
    finished: Sequence[Finished],
    *,
    command: Sequence[str],
) -> list[Path]:
    """Write NAME.csv, NAME.md and, if the recipe has them, a plot NAME.png and other files.

    Returns the paths of all files of that name. The page names `command` as its origin.
    Writes RUNS, too.
    """
    out = settings.out
    write(out / f"{recipe.name}.csv", _csv(rows))
    parts = [f"# {recipe.title}\n", f"{recipe.claim}\n", markdown_table(recipe.table(rows))]
    if recipe.draw is not None:
        _plot(out, recipe, rows)
        parts.append(f"![{recipe.title}]({recipe.name}.png)\n")
    if recipe.below is not None:
        parts.append(recipe.below(rows, out))
    made = f"Made by `{shlex.join(command)}` from [runs]({RUNS}) that `--dry-run` names.\n"
    parts.append(made)
    write(out / f"{recipe.name}.md", "\n".join(part for part in parts if part))
    write(out / RUNS, _csv(_runs(finished[0].records)))
    return sorted(out.glob(f"{recipe.name}.*"))


def _csv(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns_of(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _plot(folder: Path, recipe: Recipe, rows: Sequence[Row]) -> None:
    def draw(figure: Figure) -> None:
        assert recipe.draw is not None
        recipe.draw(figure, rows)
        figure.suptitle(recipe.title, fontsize=10, x=0.01, ha="left")

    width, height = recipe.size
    render(draw, recipe.name, folder, width=width, height=height)


def _runs(records: Records) -> list[Row]:
    """Steps, time and hashes of all runs, and where they were trained."""
    texts = {source: _text(source) for source in {record.summary["source"] for record in records}}
    return [
        {
            "run": record.name,
            "steps": int(record.summary["steps"]),
            "seconds": round(record.summary["seconds"]),
            **record.hashes,
            "text": texts[record.summary["source"]],
            "machine": record.machine,
        }
        for record in records
    ]


def _text(source: str) -> str:
    """The name of a training text, and the hashes of its files."""
    if source not in SOURCE_NAMES and not Path(source).exists():
        return Path(source).name  # trained on another machine
    files = resolve_source(DataConfig(source=source)).files
    digests = ", ".join(sha256_of(file)[:12] for file in files[:3])
    more = f" and {len(files) - 3} more files" if len(files) > 3 else ""
    return f"{Path(source).name} {digests}{more}"
