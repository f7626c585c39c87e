"""Figures 6 and 7 of the paper: the text and the latents after every block, and floating-point operations."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from tarflowlm.evaluation.flops import forward_flops, generation_flops, training_flops
from tarflowlm.generation import Generation, generate
from tarflowlm.generation.generate import num_ticks
from tarflowlm.model import as_flow_config, stack
from tarflowlm.report.style import SMALL, Figure
from tarflowlm.reproduce.ablations import two_tokens
from tarflowlm.reproduce.measures import latents
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings
from tarflowlm.reproduce.write import markdown_table
from tarflowlm.runs.checkpoint import read_run
from tarflowlm.runs.config import RunConfig
from tarflowlm.runs.presets import preset, with_steps

NUM, LENGTH = 8, 128
"""Samples, and their tokens."""
DEEP_STEPS = 1000
METRICS = ("norm", "cosine", "participation_ratio", "centroid_shift", "log_det", "kl", "kl_gain", "nelbo")


def plan_fig6(settings: Settings) -> list[Training]:
    """Mix-d and Mix-1; at mini scale also flows with active upper blocks."""
    runs = {"Mix-d": settings.preset("mixd", "owt"), "Mix-1": settings.preset("mix1", "owt")}
    return trainings(settings, runs | _active_upper_blocks(settings))


def plan_fig7(settings: Settings) -> list[Training]:
    """Affine, Mix-1 and Mix-d; at mini scale also flows with active upper blocks."""
    kinds = {"affine": "affine", "Mix-1": "mix1", "Mix-d": "mixd"}
    runs = {label: settings.preset(kind, "owt") for label, kind in kinds.items()}
    return trainings(settings, runs | _active_upper_blocks(settings))


def _active_upper_blocks(settings: Settings) -> dict[str, RunConfig]:
    """Mini flows whose upper blocks contribute more than those of the presets; none at paper scale."""
    if settings.scale == "paper":
        return {}
    run = preset("mini-mix1")
    # the published proportions; in the presets the first block is the deepest
    model = replace(as_flow_config(run.model), blocks=stack(("mix1",) * 3, (1, 1, 4), (27,) * 3))
    deep = with_steps(replace(run, name="mini-mix1-deep-last", model=model), DEEP_STEPS)
    return {"Mix-1, last block deepest": deep, "Mix-d, P = 2": two_tokens(settings, "independent")}


def _passes(done: Finished) -> tuple[Generation, list[list[str]]]:
    """Samples, and for each sample its text after every pass, noise first."""
    checkpoint = done.load()
    length = min(LENGTH, checkpoint.run.model.context)
    result = generate(
        checkpoint.model,
        num_tokens=length,
        num=NUM,
        generator=torch.Generator().manual_seed(0),
        return_passes=True,
        decoder="auto",
        tick=done.tick_of("sampling, positions", num_ticks(checkpoint.model, length)),
    )
    decode = checkpoint.tokenizer.decode
    return result, [[decode(state[i].tolist()) for state in result.passes] for i in range(NUM)]


def measure_fig6(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Share of tokens that are already the final ones after each pass."""
    rows = []
    for done in finished:
        result, _ = _passes(done)
        for number, tokens in enumerate(result.passes):
            same = (tokens == result.tokens).cpu().double().mean().item()
            name = "noise" if number == 0 else f"block {len(result.passes) - number} inverted"
            seed = done.training.run.seed
            rows.append({"model": done.training.label, "seed": seed, "state": name, "tokens as in the end": same})
    return rows


def sample_texts(settings: Settings, finished: Sequence[Finished]) -> str:
    """Markdown with the first sample of each model after every pass."""
    parts = [f"## Samples\n\nThe first of {NUM} samples of each model, seed 0, after every pass, noise first.\n"]
    for done in finished:
        lines = "\n".join(_passes(done)[1][0])
        parts.append(f"{done.training.label}, {done.training.name}:\n\n```\n{lines}\n```\n")
    return "\n".join(parts)


def measure_fig7(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Geometry and likelihood share of every state, with standard deviations over windows."""
    rows = []
    for done in finished:
        for state in latents(done):
            row: Row = {"model": done.training.label, "seed": done.training.run.seed, "block": state.block}
            for name in METRICS:
                spread = getattr(state, name)
                row |= {name: None if spread is None else spread.mean, f"{name} ±": spread and spread.std}
            rows.append(row)
    return rows


def flops_table(settings: Settings, finished: Sequence[Finished]) -> str:
    """Markdown with the floating-point operations of the flows and the baseline."""
    flows = {done.training.label: read_run(done.directory) for done in finished}
    vocab_size = next(iter(flows.values())).model.vocab_size
    runs = {"AR": settings.preset("ar", "owt")} | flows
    rows = [_flops_row(label, run, vocab_size) for label, run in runs.items()]
    return (
        "## Floating-point operations\n\nMillions per token, a multiply-add counted as two; "
        "`tarflowlm.evaluation.flops` describes both conventions.\n\n" + markdown_table(rows)
    )


def _flops_row(label: str, run: RunConfig, vocab_size: int) -> Row:
    config = replace(run.model, vocab_size=vocab_size)
    scale = 1e-6 / config.context
    return {
        "model": label,
        "forward, the paper's": scale * forward_flops(config, "paper"),
        "forward, full": scale * forward_flops(config),
        "training step of all blocks": scale * training_flops(config),
        "generation": scale * generation_flops(config),
    }


def draw_fig7(figure: Figure, rows: Sequence[Row]) -> None:
    """The four geometric metrics over the blocks, with standard deviations over windows; seed 0."""
    metrics = {"norm": "norm", "cosine": "cosine", "participation_ratio": "participation ratio",
               "centroid_shift": "movement of the centroid"}  # fmt: skip
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (name, title) in zip(panels.flat, metrics.items(), strict=True):
        for index, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
            of_model = [r for r in rows if r["model"] == model and r["seed"] == 0 and r[name] is not None]
            values, spreads = ([r[column] for r in of_model] for column in (name, f"{name} ±"))
            # side by side, so that no model hides another
            places = [r["block"] + 0.05 * index for r in of_model]
            axes.errorbar(places, values, spreads, marker="o", markersize=4, capsize=2, label=model)
        axes.set_title(title, fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels[1]:
        axes.set_xlabel("blocks passed (0: latents of the text)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=SMALL)


FIG6 = Recipe(
    name="fig6",
    title="Text after each pass",
    claim="The paper: every intermediate state decodes to text, which each pass refines from coarse to fine.",
    plan=plan_fig6,
    measure=measure_fig6,
    text=sample_texts,
)

FIG7 = Recipe(
    name="fig7",
    title="Latents after every block",
    claim="The paper: norms, cosines, participation ratio and centroid movement of the states show what each "
    "block does.",
    plan=plan_fig7,
    measure=measure_fig7,
    draw=draw_fig7,
    text=flops_table,
)
