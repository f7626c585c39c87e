"""Plots that recipes share."""

import math
from collections.abc import Sequence
from textwrap import fill

from reproduction.recipe import Row
from tarflowlm_apps.report.style import COLOURS, SMALL, Axes, Figure

BOUND = "bits per character, <="


def plot_curves(figure: Figure, rows: Sequence[Row]) -> None:
    """Curves of seed 0 over the steps: training as a line, validation as dots."""
    axes = figure.subplots()
    late = []  # values after the first tenth of the steps, in which all curves fall far
    for row, colour in zip((row for row in rows if row["seed"] == 0), COLOURS, strict=False):
        for split, style in (("train", "-"), ("valid", "o")):
            points = _points(row, split)
            label = row["model"] if split == "train" else None
            axes.plot(*zip(*points, strict=True), style, color=colour, markersize=4, label=label)
            last, _ = points[-1]
            late += [bpc for step, bpc in points if step >= last / 10]
    axes.set_ylim(top=1.02 * max(late))
    axes.set(xlabel="optimiser steps", ylabel=f"{BOUND} (line: training, dots: validation)")
    axes.legend(fontsize=SMALL)


def _points(row: Row, split: str) -> list[tuple[int, float]]:
    """(Step, bits per character) of a curve of `measures.curves`."""
    points = []
    for name, bpc in row.items():
        if name.startswith(f"{split} bpc at "):
            step = name.rpartition(" ")[2]
            points.append((int(step.replace(",", "")), bpc))
    return points


def plot_over(figure: Figure, rows: Sequence[Row], *, column: str, label: str) -> None:
    """Test bits per character over a column of whole numbers, on a logarithmic axis."""
    axes = figure.subplots()
    places = sorted({row[column] for row in rows})
    for place in places:
        own = [row for row in rows if row[column] == place]
        _plot_seeds(axes, place, [row["test bpc"] for row in own], [bits_error(row) for row in own])
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.margins(x=0.12, y=0.1)
    axes.set(xlabel=label, ylabel=BOUND)


def plot_models(
    figure: Figure,
    rows: Sequence[Row],
    *,
    column: str = "test bpc",
    error: str | None = None,
    label: str = BOUND,
) -> None:
    """A column for every model, in the order of the rows: one dot per seed.

    The bars are two standard errors, of the column `error` or of the bits per character.
    """
    axes = figure.subplots()
    models = list(dict.fromkeys(row["model"] for row in rows))
    for place, model in enumerate(models):
        own = [row for row in rows if row["model"] == model]
        errors = [bits_error(row) if error is None else row[error] for row in own]
        _plot_seeds(axes, place, [row[column] for row in own], errors)
    axes.set_xticks(range(len(models)), [fill(str(model), 14) for model in models])
    axes.margins(x=0.2, y=0.1)
    axes.set_ylabel(label)


def bits_error(row: Row) -> float:
    """The standard error of a row of `measures.summary_row` over windows, in bits per character."""
    return row["stderr, nats"] * row["test bpc"] / math.log(row["ppl"])


def _plot_seeds(axes: Axes, x: int, values: Sequence[float], errors: Sequence[float]) -> None:
    """One dot per seed with two standard errors, and the mean of the dots."""
    places = [x + 0.06 * index for index in range(len(values))]  # no bar hides another
    twice = [2 * error for error in errors]
    axes.errorbar(places, values, twice, fmt="o", color=COLOURS[0], capsize=2, markersize=4)
    mean = sum(values) / len(values)
    axes.annotate(
        f"{mean:.3f}" if len(values) == 1 else f"mean {mean:.3f}",
        (places[-1], mean),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=SMALL,
    )
