"""Plots that recipes share."""

from collections.abc import Sequence
from textwrap import fill

from reproduction.recipe import Row
from tarflowlm.views.style import COLOURS, SMALL, Axes, Figure

BOUND = "bits per character, <="


def plot_curves(figure: Figure, rows: Sequence[Row]) -> None:
    """Curves of seed 0 over the steps: training as a line, validation as dots."""
    axes = figure.subplots()
    for row, colour in zip((row for row in rows if row["seed"] == 0), COLOURS, strict=False):
        for split, style in (("train", "-"), ("valid", "o")):
            points = {name: bpc for name, bpc in row.items() if name.startswith(f"{split} bpc at ")}
            steps = [int(name.rpartition(" ")[2].replace(",", "")) for name in points]
            label = row["model"] if split == "train" else None
            axes.plot(steps, list(points.values()), style, color=colour, markersize=4, label=label)
    axes.set(xlabel="optimiser steps", ylabel=f"{BOUND} (line: training, dots: validation)")
    axes.legend(fontsize=SMALL)


def plot_over(figure: Figure, rows: Sequence[Row], *, column: str, label: str) -> None:
    """Test bits per character over a column of whole numbers, on a logarithmic axis."""
    axes = figure.subplots()
    places = sorted({row[column] for row in rows})
    for place in places:
        _plot_seeds(axes, place, [row["test bpc"] for row in rows if row[column] == place])
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.margins(x=0.12, y=0.1)
    axes.set(xlabel=label, ylabel=BOUND)


def plot_models(
    figure: Figure, rows: Sequence[Row], *, column: str = "test bpc", label: str = BOUND
) -> None:
    """A column for every model, in the order of the rows: one dot per seed."""
    axes = figure.subplots()
    models = list(dict.fromkeys(row["model"] for row in rows))
    for place, model in enumerate(models):
        _plot_seeds(axes, place, [row[column] for row in rows if row["model"] == model])
    axes.set_xticks(range(len(models)), [fill(str(model), 14) for model in models])
    axes.margins(x=0.2, y=0.1)
    axes.set_ylabel(label)


def _plot_seeds(axes: Axes, x: int, values: Sequence[float]) -> None:
    """One dot per seed, and their mean."""
    axes.plot([x] * len(values), values, "o", color=COLOURS[0])
    mean = sum(values) / len(values)
    axes.annotate(
        f"{mean:.3f}" if len(values) == 1 else f"mean {mean:.3f}",
        (x, mean),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=SMALL,
    )
