"""How far importance weights tighten the bound of each family: iw-S over S."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from reproduction import tables
from reproduction.lengths import RATIO, TOKENS, length_of, lengthened, tokens_of
from reproduction.measures import first_columns
from reproduction.recipe import Finished, Recipe, Row, Training, trainings
from reproduction.settings import Settings
from tarflowlm.data import eval_windows
from tarflowlm.evaluation.likelihood import bits, log_weights
from tarflowlm.objective import importance_weighted
from tarflowlm_apps.report.style import Figure

LENGTH_OF = {"affine": "2", "Mix-1": "1", "Mix-d": "2"}
"""The length of each family's training, a name of `lengths.LENGTHS`."""
SAMPLES_OF = {"affine": 4096, "Mix-1": 1024, "Mix-d": 64}
"""Most posterior samples. Those of Mix-d have nearly equal weights."""
FACTOR = 4  # from one number of samples to the next
WINDOWS = 16
NORMAL = "bpc if log w is normal"


def plan_bounds(settings: Settings) -> list[Training]:
    """A flow of each family, and the baselines of their lengths, with one seed each."""
    kinds = [("AR", name) for name in sorted(set(LENGTH_OF.values()))] + [*LENGTH_OF.items()]
    plan = []
    for label, name in kinds:
        run = lengthened(settings.preset(tables.FAMILIES[label], "text8"), name)
        plan += trainings(replace(settings, seeds=1), {label: run})
    return plan


def measure_bounds(_settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """What iw-S takes off the bound over `WINDOWS` windows, subtracted from the bound of the test;
    and what it takes off in the limit if log w is normal, half of its variance.
    """
    rows = []
    for done in finished:
        row = first_columns(done) | {TOKENS: tokens_of(done)}
        row |= {"test bpc": done.record.summary["test"]["bpc"]}
        if done.training.label in SAMPLES_OF:
            found = done.measured("iw-S", partial(_weights, done))
            row |= {name: found[name] for name in ("skewness", "kurtosis")}
            row |= {tables.SPREAD: found["sd"]}
            row |= {f"iw-{size} bpc": row["test bpc"] - off for size, off in found["off"]}
            row["±"] = found["±"]
            row[NORMAL] = row["test bpc"] - found["half of the variance"]
        rows.append(row)
    pairs = [(length_of(done.training), row) for done, row in zip(finished, rows, strict=True)]
    baselines = {length: row["test bpc"] for length, row in pairs if row["model"] == "AR"}
    for length, row in pairs:
        best = [value for name, value in row.items() if name.startswith("iw-")][-1:]
        row[RATIO] = (best or [row["test bpc"]])[0] / baselines[length]
        row[f"{RATIO} if normal"] = row.get(NORMAL, row["test bpc"]) / baselines[length]
    return rows


def _weights(done: Finished) -> Row:
    """Bits per character that iw-S takes off, by S, and for the largest S their standard error over
    the windows; the spread and the shape of log w.
    """
    checkpoint = done.load()
    windows = eval_windows(done.tokens(checkpoint), checkpoint.run.model.context, WINDOWS)
    samples = SAMPLES_OF[done.training.label]
    progress = done.stage(f"weights of {samples:,} samples, windows", len(windows))
    log_w = log_weights(checkpoint.model, windows, samples=samples, seed=0, progress=progress)
    characters = checkpoint.tokenizer.characters_per_token[windows.numpy()].sum()

    def per_character(nats: Tensor) -> float:
        return bits(nats.sum().item()) / characters

    sizes = [FACTOR**power for power in range(32) if FACTOR**power <= samples]
    bound = -log_w.mean(0)
    taken = {size: bound - _tightened(log_w, size) for size in sizes}
    error = taken[sizes[-1]].std() * math.sqrt(len(windows))
    variance = log_w.var(0)
    shape = (log_w - log_w.mean(0)) / variance.sqrt()
    return {
        "off": [(size, per_character(nats)) for size, nats in taken.items()],
        "±": per_character(error),
        "sd": variance.mean().sqrt().item(),
        "half of the variance": per_character(variance / 2),
        "skewness": shape.pow(3).mean().item(),
        "kurtosis": shape.pow(4).mean().item(),
    }


def _tightened(log_w: Tensor, size: int) -> Tensor:
    """The mean iw-`size` bound [W] over the groups of that many samples, in nats."""
    groups = log_w.unflatten(0, (-1, size)).unbind(0)
    return sum((importance_weighted(group) for group in groups), start=0 * log_w[0]) / len(groups)


def draw_bounds(figure: Figure, rows: Sequence[Row]) -> None:
    """The ratio to the baseline over the number of samples; dotted the limit if log w is normal."""
    axes = figure.subplots()
    flows = [row for row in rows if row["model"] != "AR"]
    for index, row in enumerate(flows):
        points = [
            (int(name.split()[0].removeprefix("iw-")), value)
            for name, value in row.items()
            if name.startswith("iw-")
        ]
        baseline = row[NORMAL] / row[f"{RATIO} if normal"]
        sizes, values = zip(*points, strict=True)
        ratios = [value / baseline for value in values]
        axes.plot(sizes, ratios, "o-", markersize=4, color=f"C{index}", label=row["model"])
        axes.axhline(row[f"{RATIO} if normal"], linestyle=":", color=f"C{index}", linewidth=0.8)
    axes.set_xscale("log", base=FACTOR)
    axes.set(xlabel="samples S", ylabel="iw-S over the baseline's bits")
    axes.legend()


BOUNDS = Recipe(
    name="bounds",
    title="Bounds and their gaps",
    claim=(
        "A flow's bits are a bound. How much of its distance to the baseline is the gap of the "
        "bound? The paper gives the ELBO. (Importance weights, docs/math.md, eq. 13, over "
        f"{WINDOWS} windows; what they take off is subtracted from the bound of the whole test; ± "
        "is the standard error of what the most samples take off. If log w is normal, the gap is "
        "half of its variance. Seed 0.)"
    ),
    plan=plan_bounds,
    measure=measure_bounds,
    draw=draw_bounds,
)
