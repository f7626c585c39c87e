"""How far importance weights tighten the bound of each family: iw-S over S."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from reproduction import tables
from reproduction.lengths import RATIO
from reproduction.measures import first_columns
from reproduction.recipe import Finished, Recipe, Row, Training, trainings
from reproduction.settings import Settings
from tarflowlm.data import eval_windows
from tarflowlm.evaluation.likelihood import bits, log_weights
from tarflowlm.objective import importance_weighted
from tarflowlm_apps.report.style import Figure

SEED = 2
"""The first seed. Other recipes have those below: what is measured here needs the weights."""
SAMPLES_OF = {"affine": 4096, "Mix-1": 1024, "Mix-d": 64}
"""Most posterior samples. Those of Mix-d have nearly equal weights."""
FACTOR = 4  # from one number of samples to the next
WINDOWS, PART = 64, 8
"""Windows, and how many of them are put on record at once: 4,096 samples take hours."""
NORMAL = "bpc if log w is normal"
TERMS = ("var(log w) / 2, nats", "k3 / 6, nats", "k4 / 24, nats")
"""The first terms by which log E[w] exceeds E[log w], with the cumulants k of log w."""
SMALL = 0.1
"""NORMAL is left out where the two terms after the first exceed this share of it."""


def plan_bounds(settings: Settings) -> list[Training]:
    """The baseline and a flow of each family, with the seeds from SEED on."""
    runs = {
        label: settings.preset(tables.FAMILIES[label], "text8") for label in ("AR", *SAMPLES_OF)
    }
    found = trainings(replace(settings, seeds=SEED + settings.seeds), runs)
    return [training for training in found if training.run.seed >= SEED]


def measure_bounds(_settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """What iw-S takes off the bound over `WINDOWS` windows, subtracted from the bound of the test;
    the first terms of what it takes off in the limit; and the limit if log w is normal, half of
    the variance, where the other terms are small.
    """
    rows = []
    for done in finished:
        row = first_columns(done) | {"test bpc": done.record.summary["test"]["bpc"]}
        if done.training.label in SAMPLES_OF:
            found = _of_parts(
                done.measured(f"log w from window {start}", partial(_part, done, start))
                for start in range(0, WINDOWS, PART)
            )
            row |= {name: found[name] for name in ("skewness", "kurtosis")}
            row |= {tables.SPREAD: found["sd"]}
            row |= dict(zip(TERMS, terms(row), strict=True))
            row |= {f"iw-{size} bpc": row["test bpc"] - off for size, off in found["off"]}
            row["±"] = found["±"]
            half, *others = terms(row)
            if sum(map(abs, others)) < SMALL * half:
                row[NORMAL] = row["test bpc"] - found["half of the variance"]
        rows.append(row)
    baselines = {row["seed"]: row["test bpc"] for row in rows if row["model"] == "AR"}
    for row in rows:
        baseline = baselines[row["seed"]]
        best = [value for name, value in row.items() if name.startswith("iw-")][-1:]
        row[RATIO] = (best or [row["test bpc"]])[0] / baseline
        limit = row.get(NORMAL, None if best else row["test bpc"])
        row[f"{RATIO} if normal"] = limit and limit / baseline
    return rows


def terms(row: Row) -> tuple[float, float, float]:
    """`TERMS` from the standard deviation, skewness and kurtosis of a row."""
    sd, skewness, kurtosis = (row[name] for name in (tables.SPREAD, "skewness", "kurtosis"))
    return sd**2 / 2, sd**3 * skewness / 6, sd**4 * (kurtosis - 3) / 24


def _part(done: Finished, start: int) -> Row:
    """Nats that iw-S takes off each of some windows, by S, and the shape of their log w."""
    checkpoint = done.load()
    context = checkpoint.run.model.context
    windows = eval_windows(done.tokens(checkpoint), context, WINDOWS)[start : start + PART]
    samples = SAMPLES_OF[done.training.label]
    progress = done.stage(f"{samples:,} samples from window {start}, windows", len(windows))
    log_w = log_weights(checkpoint.model, windows, samples=samples, seed=start, progress=progress)
    sizes = [FACTOR**power for power in range(32) if FACTOR**power <= samples]
    bound = -log_w.mean(0)
    variance = log_w.var(0)
    shape = (log_w - log_w.mean(0)) / variance.sqrt()
    return {
        "characters": int(checkpoint.tokenizer.characters_per_token[windows.numpy()].sum()),
        "off": [(size, (bound - _tightened(log_w, size)).tolist()) for size in sizes],
        "variance": variance.tolist(),
        "skewness": shape.pow(3).mean(0).tolist(),
        "kurtosis": shape.pow(4).mean(0).tolist(),
    }


def _of_parts(each: Iterable[Row]) -> Row:
    """Bits per character that iw-S takes off, by S, and for the largest S their standard error over
    the windows; the spread and the shape of log w.
    """
    parts = [*each]
    characters = sum(part["characters"] for part in parts)

    def together(name: str) -> Tensor:
        return torch.tensor([value for part in parts for value in part[name]]).double()

    def per_character(nats: Tensor) -> float:
        return bits(nats.sum().item()) / characters

    off = [
        (size, torch.tensor([nats for part in parts for nats in part["off"][place][1]]).double())
        for place, (size, _) in enumerate(parts[0]["off"])
    ]
    last, variance = off[-1][1], together("variance")
    return {
        "off": [(size, per_character(nats)) for size, nats in off],
        "±": per_character(last.std() * math.sqrt(len(last))),
        "sd": variance.mean().sqrt().item(),
        "half of the variance": per_character(variance / 2),
        "skewness": together("skewness").mean().item(),
        "kurtosis": together("kurtosis").mean().item(),
    }


def _tightened(log_w: Tensor, size: int) -> Tensor:
    """The mean iw-`size` bound [W] over the groups of that many samples, in nats."""
    groups = log_w.unflatten(0, (-1, size)).unbind(0)
    return sum((importance_weighted(group) for group in groups), start=0 * log_w[0]) / len(groups)


def curve(row: Row) -> list[tuple[int, float]]:
    """The numbers of samples in a row, and the bits per character with each."""
    sizes = {name: name.removeprefix("iw-").removesuffix(" bpc") for name in row if "iw-" in name}
    return [(int(size), row[name]) for name, size in sizes.items() if row[name] is not None]


def draw_bounds(figure: Figure, rows: Sequence[Row]) -> None:
    """The ratio to the baseline over the number of samples, and the limit where a row has one."""
    axes = figure.subplots()
    flows = [row for row in rows if row["model"] != "AR"]
    for index, row in enumerate(flows):
        sizes, values = zip(*curve(row), strict=True)
        baseline = values[-1] / row[RATIO]
        ratios = [value / baseline for value in values]
        axes.plot(
            sizes,
            ratios,
            "o-",
            markersize=4,
            color=f"C{index}",
            label=f"{row['model']}, seed {row['seed']}",
        )
        if (limit := row[f"{RATIO} if normal"]) is not None:
            axes.axhline(limit, linestyle=":", color=f"C{index}", linewidth=0.8)
    axes.set_xscale("log", base=FACTOR)
    axes.plot([], [], ":", color="gray", label="limit if log w is normal")
    axes.set(xlabel="samples S", ylabel="iw-S over the baseline's bits")
    axes.legend()


BOUNDS = Recipe(
    name="bounds",
    title="Bounds and their gaps",
    claim=(
        "A flow's bits are a bound. How much of its distance to the baseline is the gap of the "
        "bound? The paper gives the ELBO. (Importance weights, docs/math.md, eq. 13, over "
        f"{WINDOWS} windows; what they take off is subtracted from the bound of the whole test; ± "
        "is the standard error of what the most samples take off. The gap is the sum over n >= 2 "
        "of the cumulants k_n / n! of log w. Where the terms of skewness and kurtosis are small "
        "beside half of the variance, that half is the gap, as for a normal log w. For affine they "
        "are as large, and these samples do not tell the limit.)"
    ),
    plan=plan_bounds,
    measure=measure_bounds,
    draw=draw_bounds,
)
