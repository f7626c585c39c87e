"""Figure 7 of the paper: the geometry of the states, and the operations of a flow.

The paper leaves open which end is "layer 0", so the states are read in both directions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

from reproduction import measures
from reproduction.recipe import Finished, Recipe, Row, Training, no_table, trainings
from reproduction.results import markdown_table
from reproduction.running import GPT2_SIZE
from reproduction.settings import Settings, as_flow_config
from reproduction.tables import FAMILIES
from tarflowlm.evaluation.blocks import Spread, state_metrics
from tarflowlm.model import as_flow
from tarflowlm.model_config import FlowConfig, Mix1, TransformerConfig
from tarflowlm.presets import preset
from tarflowlm_apps.report.style import SMALL, Figure, log_scale

SAMPLES = 64  # samples of each model, whose states are measured
UP = "latents of a text"
"""Layer 0 of the states that go up from the latents to the noise."""
DOWN = "noise of a sample"
"""Layer 0 of the states that go down from the noise to the latents."""
METRICS = {
    "norm": "norm",
    "cosine": "cosine",
    "participation_ratio": "participation ratio",
    "centroid_shift": "movement of centroid",
}
SHARES = ("log_det", "kl", "kl_gain", "nelbo")
SURE = 2.0  # a change counts above this many standard errors of the mean over sequences
FLOW_PATCHES = (1, 2, 4)
GPT2_SIZES = {
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}
"""Layers, width and heads."""

_DIRECTIONS = f"""## The paper's four directions

Metrics of the L outputs of the layers (the paper's appendix G). The paper leaves open
which end is layer 0 ("sampled noise or an encoder's output"), so every cell has two readings: from
the latents of a text to the noise, and from the noise to the latents of a sample. "yes": the metric
goes the paper's way as a whole, and at no layer the other way, by more than
{SURE:g} standard errors of the mean over sequences. KL divergences of posterior and prior are in
nats per token, of texts.
"""
_OPERATIONS = """## Operations

Those of a flow over those of a Transformer LM of the same size, over a text of 1,024 tokens: with
one input map and head, as the paper counts (the last panel), and with the heads of three blocks.
"""


def plan_fig7(settings: Settings) -> list[Training]:
    """Affine, Mix-1 and Mix-d."""
    runs = {label: settings.preset(kind, "owt") for label, kind in FAMILIES.items()}
    del runs["AR"]
    return trainings(settings, runs)


def measure_fig7(_settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Geometry of the states of texts, with each block's share of the bound, and of samples."""
    rows: list[Row] = []
    for done in finished:
        model = measures.first_columns(done)
        rows += [model | row for row in done.measured("geometry", partial(_states, done))]
    return rows + flops_by_size()


def _states(done: Finished) -> list[Row]:
    return [*_states_of_text(done), *_states_of_samples(done)]


def _states_of_text(done: Finished) -> Iterator[Row]:
    for state in measures.latents(done):
        row: Row = {
            "layer 0": UP,
            "layer": state.block,
            "block": state.block or None,
            "sequences": measures.LATENT_WINDOWS,
        }
        for name in (*METRICS, *SHARES):
            spread: Spread | None = getattr(state, name)
            row[name] = spread and spread.mean
            row[f"{name} ±"] = spread and spread.std
        yield row


def _states_of_samples(done: Finished) -> Iterator[Row]:
    checkpoint = done.load()
    generation = measures.sample(done, checkpoint, SAMPLES, checkpoint.run.model.context)
    states = generation.states(as_flow(checkpoint.model))
    for layer, metrics in enumerate(state_metrics(states)):
        row: Row = {
            "layer 0": DOWN,
            "layer": layer,
            "block": len(states) - layer if layer else None,
            "sequences": SAMPLES,
        }
        for name, values in metrics.items():
            spread = Spread.of(values.cpu())
            row[name] = spread.mean
            row[f"{name} ±"] = spread.std
        yield row


def flops_by_size() -> list[Row]:
    """Operations of a Mix-1 flow and of a Transformer LM, by size and patch."""
    rows: list[Row] = []
    paper = as_flow_config(preset("owt-mix1").model)
    for name, (layers, width, heads) in GPT2_SIZES.items():
        trunk = TransformerConfig(width=width, num_heads=heads)
        flow = replace(paper, vocab_size=GPT2_SIZE, trunk=trunk)
        for patch in FLOW_PATCHES:
            row: Row = {"model": f"Mix-1, {name}", "size": name, "patch": patch}
            patched = replace(flow, patch=patch)
            row["operations"] = flow_flops(patched, layers)
            row["with three heads"] = flow_flops(patched, layers, heads=3)
            row["of the LM"] = baseline_flops(width, layers, flow.context)
            rows.append(row)
    return rows


def baseline_flops(D: int, L: int, T: int) -> int:
    """Operations of a Transformer LM over T tokens, as the paper's appendix H counts them.

    It leaves out the product of attention weights and values.
    """
    return 4 * D * T + _transformer_flops(D, L, T) + 2 * D * GPT2_SIZE * T


def flow_flops(config: FlowConfig, L: int, *, heads: int = 1) -> int:
    """Operations of a Mix-1 flow, as the paper's appendix H counts them.

    The flow is one body, the L layers of all its blocks, over N = T / P positions, with one input
    map and the paper's one head, or that of every block. The masked autoregressive head costs, for
    each position of c = P d channels with K components, E features and D_m = 2 `head_hidden`,

        6 E (c - 1)^2 + D_m c (D + E (c - 1)) + D_m c^2 3 K
    """
    N = config.context // config.patch
    D = config.trunk.width
    c = config.patch * config.latent_dim
    E = config.head_features
    D_m = 2 * config.head_hidden
    first = config.blocks[0]
    assert isinstance(first, Mix1)
    outputs = 3 * first.components
    head = 6 * E * (c - 1) ** 2 + D_m * c * (D + E * (c - 1)) + D_m * c * c * outputs
    return 4 * D * N + _transformer_flops(D, L, N) + heads * N * head


def _transformer_flops(D: int, L: int, N: int) -> int:
    """L layers of width D over N positions, with an MLP of 4 D channels."""
    return L * (6 * D * D * N + 2 * D * N * N + 2 * D * D * N + 16 * D * D * N)


def falls(values: Sequence[float], least: float = 0.0) -> bool:
    """True if the values fall by more than `least` in all, and no step goes up by more."""
    steps = [after - before for before, after in pairwise(values)]
    return values[0] - values[-1] > least and max(steps, default=0.0) <= least


def drops_and_rises(values: Sequence[float], directions: Sequence[str], least: float = 0.0) -> bool:
    """True if values drop by more than `least` at every right-to-left layer and rise at the next.

    A last layer has no next one and does not count. `directions` has the direction of each layer
    between two values.
    """
    steps = [after - before for before, after in pairwise(values)]
    found = [
        drop < -least and rise > least
        for (drop, rise), direction in zip(pairwise(steps), directions, strict=False)
        if direction == "right to left"
    ]
    return bool(found) and all(found)


def directions(states: Sequence[Row]) -> Row:
    """The four directions of the paper's figure 7, each yes or no, of one model in one reading."""
    outputs = [row for row in states if row["layer"]]
    values = {name: [row[name] for row in outputs] for name in METRICS}
    sure = SURE / outputs[0]["sequences"] ** 0.5
    least = {name: sure * max(row[f"{name} ±"] for row in outputs) for name in METRICS}
    layers = ["left to right" if row["block"] % 2 else "right to left" for row in outputs[1:]]
    ratios = values["participation_ratio"]
    found = {
        "norm decreases": falls(values["norm"], least["norm"]),
        "cosine increases": falls([-cosine for cosine in values["cosine"]], least["cosine"]),
        "centroid movement diminishes": falls(values["centroid_shift"], least["centroid_shift"]),
        "participation ratio drops right to left, then rises": drops_and_rises(
            ratios, layers, least["participation_ratio"]
        ),
    }
    return {name: "yes" if holds else "no" for name, holds in found.items()}


def directions_table(rows: Sequence[Row], _folder: Path) -> str:
    """Markdown: the paper's directions in both readings, and how far each block lowers the KL."""
    table: list[Row] = []
    of_states = [row for row in rows if "layer 0" in row]
    for (model, seed), group in groupby(of_states, lambda row: (row["model"], row["seed"])):
        by_reading = groupby(group, lambda row: row["layer 0"])
        readings = {start: list(states) for start, states in by_reading}
        up = directions(readings[UP])
        down = directions(readings[DOWN])
        row: Row = {"model": model, "seed": seed}
        row |= {name: f"{up[name]}, {down[name]}" for name in up}
        gains = [f"{state['kl_gain']:.4f}" for state in readings[UP][1:]]
        row["KL lowered by blocks 1, 2, ..."] = ", ".join(gains)
        table.append(row)
    return f"{_DIRECTIONS}\n{markdown_table(table)}"


def operations_table(rows: Sequence[Row]) -> str:
    """Markdown: the operations of a flow over those of a Transformer LM, by size and patch."""
    table: dict[str, Row] = {}
    for row in rows:
        if "size" in row:
            line = table.setdefault(row["size"], {"size": row["size"]})
            for column, heads in (("operations", "one head"), ("with three heads", "three heads")):
                line[f"P = {row['patch']}, {heads}"] = row[column] / row["of the LM"]
    return f"{_OPERATIONS}\n{markdown_table([*table.values()])}"


def _tables(rows: Sequence[Row], folder: Path) -> str:
    return f"{directions_table(rows, folder)}\n{operations_table(rows)}"


def draw_fig7(figure: Figure, rows: Sequence[Row]) -> None:
    """The four geometric metrics over the layers, and the operations of a flow at four sizes.

    The metrics are from seed 0, in both readings, with standard deviations.
    """
    from matplotlib.ticker import MaxNLocator

    of_states = [row for row in rows if "layer 0" in row and row["seed"] == 0]
    models = list(dict.fromkeys(row["model"] for row in of_states))
    grid = figure.add_gridspec(2, len(METRICS) + 1)
    for down, start in enumerate((UP, DOWN)):
        for across, (name, title) in enumerate(METRICS.items()):
            axes = figure.add_subplot(grid[down, across])
            of_reading = [row for row in of_states if row["layer 0"] == start]
            for index, model in enumerate(models):
                of_model = [
                    row for row in of_reading if row["model"] == model and row.get(name) is not None
                ]
                axes.errorbar(
                    # side by side, so that no model hides another
                    [row["layer"] + 0.06 * index for row in of_model],
                    [row[name] for row in of_model],
                    [row[f"{name} ±"] for row in of_model],
                    marker="o",
                    markersize=3.5,
                    capsize=2,
                    label=model,
                )
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_title(title, fontsize=9)
            if across == 0:
                axes.set_ylabel(f"layer 0: {start}")
            if down:
                axes.set_xlabel("layer")
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(models), fontsize=SMALL)
    sizes = list(GPT2_SIZES)
    axes = figure.add_subplot(grid[:, len(METRICS)])
    for patch in FLOW_PATCHES:
        own = [row for row in rows if row.get("patch") == patch]
        if patch == 1:
            of_lm = [row["of the LM"] / 1e12 for row in own]
            axes.plot(range(len(sizes)), of_lm, "s:", color="gray", label="LM")
        counts = [row["operations"] / 1e12 for row in own]
        axes.plot(range(len(sizes)), counts, "o-", label=f"flow, P = {patch}")
    log_scale(axes)
    axes.set_xticks(range(len(sizes)), [size.removeprefix("gpt2-") for size in sizes], rotation=45)
    axes.set_title("operations, 10^12", fontsize=9)
    axes.legend(fontsize=SMALL)


FIG7 = Recipe(
    name="fig7",
    title="Latents after every block",
    claim=(
        "The paper: across the layers the mean norm decreases, the cosine increases, the movement"
        " of the centroid diminishes, and the participation ratio drops at the right-to-left "
        "block and then rises."
    ),
    plan=plan_fig7,
    measure=measure_fig7,
    table=no_table,
    below=_tables,
    draw=draw_fig7,
    size=(11.5, 5.0),
)
