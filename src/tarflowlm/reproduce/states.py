"""Measurements and plots that recipes share; figure 7: states in both readings of "layer 0", and
operations.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from textwrap import fill
from typing import Any

import torch
from torch import Tensor

from tarflowlm.config import RunConfig
from tarflowlm.data import eval_windows
from tarflowlm.evaluation.blocks import Spread, StateReport, latent_report, state_metrics
from tarflowlm.evaluation.flops import forward_flops
from tarflowlm.evaluation.judges import PAPER_JUDGES, Judge, load_judge
from tarflowlm.evaluation.likelihood import bits, sign_of
from tarflowlm.generation import Generation, Watch, generate
from tarflowlm.generation.writing import num_positions
from tarflowlm.model import as_flow
from tarflowlm.model_config import BaselineConfig, FlowConfig, TransformerConfig, as_flow_config
from tarflowlm.presets import mini_ar, preset, with_steps
from tarflowlm.reproduce.recipe import (
    GPT2_SIZE,
    Finished,
    Recipe,
    Row,
    Settings,
    Training,
    markdown_table,
    trainings,
)
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.views.records import RunRecord, read_record
from tarflowlm.views.style import COLOURS, SMALL, Axes, Figure

JUDGE_STEPS, BOUND = 1300, "bits per character, <="
AVERAGED, POINTS = (
    5,
    12,
)  # lines of metrics.jsonl averaged in a point of a curve; evenly spaced points of it
SHORT_STEPS, SHORT_WINDOWS = (
    300,
    1024,
)  # steps and test windows of mini trainings whose ranking shows early
DEEPEST_LAST = "Mix-1, plain start, last block deepest"  # label of `mini-mix1-deep-last`


def summary_row(done: Finished) -> Row:
    """The run's own measurement on its test split."""
    summary, test = done.summary, done.summary["test"]
    row: Row = {"model": done.training.label, "seed": summary["seed"], "": sign_of(test["bound"])}
    row |= {"test bpc": test["bpc"], "ppl": test["ppl"], "stderr, nats": test["stderr"]}
    return row | {"tokens seen": summary["tokens"], "seconds": summary["seconds"]}


def summaries_by(
    settings: Settings,
    finished: Sequence[Finished],
    *,
    column: str,
    value: Callable[[FlowConfig], int],
) -> list[Row]:
    """`summary_row` of flows with a number of their configuration as the first column."""
    return [
        {column: value(as_flow_config(done.training.run.model)), **summary_row(done)}
        for done in finished
    ]


def sample(
    done: Finished,
    checkpoint: Checkpoint,
    num: int,
    length: int,
    *,
    prompt: Tensor | None = None,
    what: str = "",
) -> Generation:
    """`num` samples of `length` tokens, some given by `prompt` [num, T], by the decoder auto; the
    noise of seed 0.
    """
    progress = done.stage(f"sampling{what}, positions", num_positions(checkpoint.model, length))
    generator, watch = torch.Generator().manual_seed(0), Watch(progress)
    options: dict[str, Any] = {"generator": generator, "decoder": "auto", "watch": watch}
    return generate(checkpoint.model, num_tokens=length, num=num, prompt=prompt, **options)


def share(is_so: Tensor) -> float:
    """The share of a tensor's entries that are true."""
    return is_so.cpu().double().mean().item()


def gains(done: Finished) -> Row:
    """The nats per token that every block takes off the KL divergence, on the windows of
    `latents`.
    """
    found = [state.kl_gain.mean for state in latents(done) if state.kl_gain is not None]
    return {f"KL taken off by block {number}": gain for number, gain in enumerate(found, 1)}


def judged_bits(judge: Judge, checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Bits per character of every sample by the judge."""
    texts = [checkpoint.tokenizer.decode(row) for row in tokens.tolist()]
    return bits(judge.read(texts).by_text) / torch.tensor([len(text) for text in texts])


def mean_of(values: Tensor) -> Spread:
    """The mean over samples, and its standard error."""
    return Spread(values.mean().item(), values.std().item() / len(values) ** 0.5)


def curves(done: Finished) -> Row:
    """Bits per character over the steps: of the training text at `POINTS` evenly spaced steps,
    averaged over the last `AVERAGED` lines of metrics.jsonl, and of every validation.
    """
    record, row = read_record(done.directory), Row()
    curve = training_curve(record)
    for place in range(1, POINTS + 1):
        goal = place * done.training.run.train.num_steps / POINTS
        _, step = min((abs(step - goal), step) for step in curve)
        row[f"train bpc at {step:,}"] = curve[step]
    valid = zip(record.valid["step"], record.valid["bpc"], strict=True)
    return row | {f"valid bpc at {int(step):,}": float(bpc) for step, bpc in valid}


def training_curve(record: RunRecord) -> dict[int, float]:
    """Step -> training bound in bits per character, averaged over the last `AVERAGED` lines up to
    that step.
    """
    steps, values = record.train["step"], record.train["bpc"]
    ends = range(min(AVERAGED, len(values)), len(values) + 1)
    return {int(steps[end - 1]): float(values[max(0, end - AVERAGED) : end].mean()) for end in ends}


def with_curves(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """`summary_row`, with the curves of each run."""
    return [summary_row(done) | curves(done) for done in finished]


def without_curves(rows: Sequence[Row]) -> list[Row]:
    """The rows as a table shows them."""
    return [{name: value for name, value in row.items() if " bpc at " not in name} for row in rows]


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


def latents(done: Finished) -> list[StateReport]:
    """The states of a flow on `LATENT_WINDOWS` evenly spaced windows of its test split."""
    checkpoint = done.load()
    windows = eval_windows(done.tokens(checkpoint), checkpoint.run.model.context, LATENT_WINDOWS)
    return latent_report(
        as_flow(checkpoint.model), windows, progress=done.stage("latents of windows", len(windows))
    )


def shortened(settings: Settings, run: RunConfig, steps: int = SHORT_STEPS) -> RunConfig:
    """At mini scale the run with fewer steps, more validations and a smaller test."""
    if settings.scale == "paper":
        return run
    run = with_steps(run, steps)
    return replace(
        run, train=replace(run.train, test_windows=SHORT_WINDOWS, evaluate_every=steps // 6)
    )


def judge_training(settings: Settings) -> list[Training]:
    """The judge of the mini scale: the baseline on another text. The paper's judge needs no
    training.
    """
    if settings.scale == "paper":
        return []
    run = settings.adapt(with_steps(mini_ar(), JUDGE_STEPS))
    run = replace(run, name="judge", data=replace(run.data, source=settings.judge_data))
    return [Training("judge", run, "judge")]


def judge_of(settings: Settings, finished: Sequence[Finished]) -> tuple[Judge, list[Finished]]:
    """The judge, and the trainings that it judges."""
    if settings.scale == "paper":
        return load_judge(PAPER_JUDGES[0], settings.device), list(finished)
    [judge] = [done for done in finished if done.training.label == "judge"]
    return load_judge(str(judge.directory), settings.device), [
        d for d in finished if d is not judge
    ]


def plot_over(figure: Figure, rows: Sequence[Row], *, column: str, label: str) -> None:
    """Test bits per character over a column of whole numbers, on a logarithmic axis."""
    axes, places = figure.subplots(), sorted({row[column] for row in rows})
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
    axes, models = figure.subplots(), list(dict.fromkeys(row["model"] for row in rows))
    for place, model in enumerate(models):
        _plot_seeds(axes, place, [row[column] for row in rows if row["model"] == model])
    axes.set_xticks(range(len(models)), [fill(str(model), 14) for model in models])
    axes.margins(x=0.2, y=0.1)
    axes.set_ylabel(label)


def _plot_seeds(axes: Axes, x: int, values: Sequence[float]) -> None:
    """One dot per seed, and their mean."""
    axes.plot([x] * len(values), values, "o", color=COLOURS[0])
    mean = sum(values) / len(values)
    text = f"{mean:.3f}" if len(values) == 1 else f"mean {mean:.3f}"
    axes.annotate(
        text, (x, mean), xytext=(6, 0), textcoords="offset points", va="center", fontsize=SMALL
    )


LATENT_WINDOWS, SAMPLES = (
    256,
    64,
)  # windows of text, and samples of each model, whose states are measured
UP, DOWN = "latents of a text", "noise of a sample"
"""Two readings of layer 0: the states go up from the latents to the noise, or down from the noise
to the latents.
"""
METRICS = ("norm", "cosine", "participation_ratio", "centroid_shift")
SHARES = ("log_det", "kl", "kl_gain", "nelbo")
SURE = 2.0  # standard errors of a mean over sequences that a change must exceed to count
FLOW_PATCHES = (1, 2, 4)
GPT2_SIZES = {"gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20)}
GPT2_SIZES["gpt2-xl"] = (48, 1600, 25)
"""Layers, width and heads."""

_DIRECTIONS = f"""## The paper's four directions

The metrics are those of the L outputs of the layers, as in the paper's appendix G. It leaves open which end is
layer 0 ("sampled noise or an encoder's output"), so every cell has two readings: from the latents of a text to the
noise, and from the noise to the latents of a sample. "yes": the metric goes the paper's way as a whole, and at no
layer the other way. A change counts if it exceeds {SURE:g} standard errors of the mean over sequences. The KL
divergence of posterior and prior is in nats per token, of texts. The CSV has all values with standard deviations.
"""
_OPERATIONS = "The last panel: operations of a flow with one input map and head over those of a Transformer LM.\n"


def plan_fig7(settings: Settings) -> list[Training]:
    """Affine, Mix-1 and Mix-d; at mini scale also Mix-1 without its start from the codebook, as in
    the paper.
    """
    kinds = {"affine": "affine", "Mix-1": "mix1", "Mix-d": "mixd"}
    runs = {label: settings.preset(kind, "owt") for label, kind in kinds.items()}
    if settings.scale == "mini":
        runs |= {
            "Mix-1, plain start": preset("mini-mix1-plain"),
            DEEPEST_LAST: preset("mini-mix1-deep-last"),
        }
    return trainings(settings, runs)


def measure_fig7(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Geometry of the states of texts, with each block's share of the likelihood, and of those of
    samples.
    """
    rows: list[Row] = []
    for done in finished:
        of_model: Row = {"model": done.training.label, "seed": done.training.run.seed}
        for state in latents(done):
            row = of_model | {"layer 0": UP, "layer": state.block, "block": state.block or None}
            row["sequences"] = LATENT_WINDOWS
            for name in METRICS + SHARES:
                spread = getattr(state, name)
                row |= {name: spread and spread.mean, f"{name} ±": spread and spread.std}
            rows.append(row)
        checkpoint = done.load()
        states = sample(done, checkpoint, SAMPLES, checkpoint.run.model.context).states
        for layer, metrics in enumerate(state_metrics(states)):
            row = of_model | {
                "layer 0": DOWN,
                "layer": layer,
                "block": len(states) - layer if layer else None,
            }
            row["sequences"] = SAMPLES
            for name, values in metrics.items():
                spread = Spread.of(values.cpu())
                row |= {name: spread.mean, f"{name} ±": spread.std}
            rows.append(row)
    return rows + flops_by_size()


def flops_by_size() -> list[Row]:
    """Operations of a Mix-1 flow over those of a Transformer LM, by the paper's count, for each
    size and patch.
    """
    rows: list[Row] = []
    for name, (layers, width, heads) in GPT2_SIZES.items():
        trunk = TransformerConfig(width=width, num_heads=heads)
        model = BaselineConfig(vocab_size=GPT2_SIZE, context=1024, trunk=trunk, layers=layers)
        flow = replace(as_flow_config(preset("owt-mix1").model), vocab_size=GPT2_SIZE, trunk=trunk)
        shares = (layers // 6, layers // 6, layers - 2 * (layers // 6))
        blocks = tuple(
            replace(block, layers=n) for block, n in zip(flow.blocks, shares, strict=True)
        )
        for patch in FLOW_PATCHES:
            counts = [
                forward_flops(m, "figure7")
                for m in (replace(flow, blocks=blocks, patch=patch), model)
            ]
            row = {"model": f"Mix-1, {name}", "size": name, "patch": patch}
            rows.append(row | {"over the LM": counts[0] / counts[1]})
    return rows


def falls(values: Sequence[float], least: float = 0.0) -> bool:
    """True if the last value is below the first by more than `least`, and no step goes up by
    more.
    """
    steps = [after - before for before, after in pairwise(values)]
    return values[0] - values[-1] > least and max(steps, default=0.0) <= least


def drops_and_rises(values: Sequence[float], directions: Sequence[str], least: float = 0.0) -> bool:
    """True if values drop by more than `least` at every right-to-left layer that has a next one,
    and rise at that next layer. `directions` are those of the layers between the values.
    """
    steps = [after - before for before, after in pairwise(values)]
    pairs = zip(pairwise(steps), directions, strict=False)
    found = [
        drop < -least and rise > least
        for (drop, rise), direction in pairs
        if direction == "right to left"
    ]
    return bool(found) and all(found)


def directions(states: Sequence[Row]) -> Row:
    """The four directions of the paper's figure 7, each yes or no, of the states of one model in
    one reading.
    """
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


def directions_table(rows: Sequence[Row]) -> str:
    """Markdown: the paper's directions in both readings, and the KL divergence lowered by each
    block.
    """
    table: list[Row] = []
    of_states = [row for row in rows if "layer 0" in row]
    for (model, seed), group in groupby(of_states, lambda row: (row["model"], row["seed"])):
        readings = {
            start: list(states) for start, states in groupby(group, lambda row: row["layer 0"])
        }
        up, down = directions(readings[UP]), directions(readings[DOWN])
        row: Row = {"model": model, "seed": seed} | {
            name: f"{up[name]}, {down[name]}" for name in up
        }
        row["KL lowered by blocks 1, 2, ..."] = ", ".join(
            f"{state['kl_gain']:.4f}" for state in readings[UP][1:]
        )
        table.append(row)
    return f"{_DIRECTIONS}\n{markdown_table(table)}"


def draw_fig7(figure: Figure, rows: Sequence[Row]) -> None:
    """The four geometric metrics over the layers in both readings, with standard deviations, of
    seed 0; and the operations of a flow over those of a Transformer LM at four sizes.
    """
    metrics = dict(
        zip(METRICS, ("norm", "cosine", "participation ratio", "movement of centroid"), strict=True)
    )
    of_states = [row for row in rows if "layer 0" in row and row["seed"] == 0]
    models = list(dict.fromkeys(row["model"] for row in of_states))
    grid = figure.add_gridspec(2, len(metrics) + 1)
    for down, start in enumerate((UP, DOWN)):
        for across, (name, title) in enumerate(metrics.items()):
            axes = figure.add_subplot(grid[down, across])
            for index, model in enumerate(models):
                found = [
                    row for row in of_states if (row["model"], row["layer 0"]) == (model, start)
                ]
                of_model = [row for row in found if row.get(name) is not None]
                values, spreads = (
                    [row[column] for row in of_model] for column in (name, f"{name} ±")
                )
                # side by side, so that no model hides another
                places = [row["layer"] + 0.06 * index for row in of_model]
                axes.errorbar(
                    places, values, spreads, marker="o", markersize=3.5, capsize=2, label=model
                )
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_title(title, fontsize=9)
            if across == 0:
                axes.set_ylabel(f"layer 0: {start}")
            if down:
                axes.set_xlabel("layer")
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(models), fontsize=SMALL)
    sizes, axes = list(GPT2_SIZES), figure.add_subplot(grid[:, len(metrics)])
    for patch in FLOW_PATCHES:
        ratios = [row["over the LM"] for row in rows if row.get("patch") == patch]
        axes.plot(range(len(sizes)), ratios, "o-", label=f"P = {patch}")
    axes.axhline(1.0, color="gray", linestyle=":")
    axes.set_xticks(range(len(sizes)), [size.removeprefix("gpt2-") for size in sizes], rotation=45)
    axes.set_title("operations, flow / LM", fontsize=9)
    axes.legend(fontsize=SMALL)


FIG7 = Recipe(
    name="fig7",
    title="Latents after every block",
    claim="The paper: across the layers the mean norm decreases, the cosine increases, the movement of the centroid "
    "diminishes, and the participation ratio drops at the right-to-left block and then rises.",
    plan=plan_fig7,
    measure=measure_fig7,
    table=lambda rows: [],
    draw=draw_fig7,
    size=(11.5, 5.0),
    text=lambda _settings, _finished, rows: f"{directions_table(rows)}\n{_OPERATIONS}",
)
