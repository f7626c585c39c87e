"""Why blocks above a tied Mix-d block gain nothing, and a block that does."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from reproduction import measures
from reproduction.ablations import HALF_STEPS, joint
from reproduction.boosting import Below, Maps, Reads, Upper, boost, evaluate, write
from reproduction.lengths import lengthened
from reproduction.measures import first_columns
from reproduction.recipe import Finished, Recipe, Row, Training, trainings, variant, without
from reproduction.settings import Settings, as_flow_config
from tarflowlm.config import RunConfig
from tarflowlm.data import Tokenizer, cached_corpus, eval_windows
from tarflowlm.model_config import stack
from tarflowlm.presets import with_blocks
from tarflowlm.views.style import COLOURS, SMALL, Figure

SHALLOW = "Mix-d, 1 layer"
DEEP = "Mix-d, 6 layers"
ONE_CHANNEL = "Mix-d, 1 layer, d = 1"
TWO_CHANNELS = "Mix-d, 1 layer, d = 2"
SHALLOW_AR = "AR, 1 layer"
DEEP_AR = "AR, 6 layers"
STACK = "Mix-d, 1, 1 and 4 layers, jointly"
STEPS = HALF_STEPS  # of block 2
LAYERS = 5  # of block 2: with one below it as many as the deep models have
VALID_WINDOWS = 256
VALIDATIONS = 5
TEXTS = 32  # that block 1 alone and both blocks make of one noise
LENGTH = 96  # tokens of each
ALONE, BOTH = "block 1 alone", "both blocks"


class Kind(NamedTuple):
    """A second block."""

    maps: Maps
    reads: Reads


NAMES = {
    "mix1": "Mix-1",
    "cells": "Mix-1 in the cells",
    "redo": "redone with new weights",
}
UPPERS = {
    SHALLOW: (
        Kind("mix1", "noise"),
        Kind("mix1", "text"),
        Kind("mix1", "key"),
        Kind("redo", "noise"),
        Kind("redo", "text"),
    ),
    TWO_CHANNELS: (Kind("mix1", "key"), Kind("redo", "text")),
    ONE_CHANNEL: (Kind("mix1", "key"), Kind("cells", "text"), Kind("redo", "text")),
    SHALLOW_AR: (Kind("redo", "text"),),
}
"""The second blocks on every model."""
MISSING = {SHALLOW: DEEP, ONE_CHANNEL: DEEP, TWO_CHANNELS: DEEP, SHALLOW_AR: DEEP_AR}
"""The model with as many layers as both blocks, trained at once: what a block 2 could reach."""


def plan_cipher(settings: Settings) -> list[Training]:
    """Block 1 of one layer, with the channels of the preset, one and two; and controls with as many
    layers as both blocks: in block 1, or in a stack that is trained jointly.
    """
    one = shallow(settings, 1)
    baseline = lengthened(settings.preset("ar", "text8"), "1/2")
    runs = {
        SHALLOW: one,
        DEEP: shallow(settings, 6),
        ONE_CHANNEL: variant(one, "d1", latent_dim=1),
        TWO_CHANNELS: variant(one, "d2", latent_dim=2),
        SHALLOW_AR: variant(baseline, "l1", layers=1),
        DEEP_AR: baseline,
        STACK: joint(deep_last(settings)),
    }
    return trainings(settings, runs)


def deep_last(settings: Settings) -> RunConfig:
    """Mix-d with the shares of layers that the paper gives Mix-1: most are in the last block."""
    run = settings.preset("mixd", "text8")
    layers, K = ((1, 1, 4), 27) if settings.scale == "mini" else ((2, 2, 8), 64)
    blocks = stack(("mixd", "mix1", "mix1"), layers, (0, K, K))
    first = run.train.stage_steps[0]
    deep = variant(run, "deep-last", blocks=blocks, channel_mix=None)
    deep = replace(deep, train=replace(run.train, stage_steps=(first, first // 2, first // 2)))
    return measures.shortened(settings, deep, 2 * HALF_STEPS)


def shallow(settings: Settings, layers: int) -> RunConfig:
    """Block 1 of `deep_last` alone, with this many layers, for as many steps."""
    deep = deep_last(settings)
    block = as_flow_config(deep.model).blocks[0]
    one = replace(with_blocks(deep, 1), name=settings.preset("mixd", "text8").name)
    return variant(one, f"one-l{layers}", blocks=(replace(block, layers=layers),))


def measure_cipher(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Every second block: what it gains on the test windows, and the share of what is missing."""
    rows = []
    reached = {_key(done, done.training.label): _bits(done) for done in finished}
    for done in finished:
        label = done.training.label
        if label not in MISSING:
            rows.append(first_columns(done) | {"block 2": None, "bpc of the model": _bits(done)})
            continue
        missing = _bits(done) - reached[_key(done, MISSING[label])]
        for kind in UPPERS[label]:
            what = f"block 2: {kind.maps}, reads {kind.reads}"
            found = done.measured(what, partial(_boosted, done, kind, settings.steps))
            share = found["gain"] / missing if missing else None
            rows.append(
                first_columns(done)
                | {"block 2": NAMES[kind.maps], "reads": kind.reads}
                | found
                | {"missing": missing, "share": share}
            )
    return rows


def _key(done: Finished, label: str) -> tuple[str, int]:
    return label, done.training.run.seed


def _bits(done: Finished) -> float:
    bits: float = done.record.summary["test"]["bpc"]
    return bits


def _boosted(done: Finished, kind: Kind, steps: int | None) -> Row:
    """Train a second block on the run's model; its bits on the run's test windows."""
    checkpoint = done.load()
    run = checkpoint.run
    below = Below(checkpoint.model)
    corpus = cached_corpus(run.data.source, checkpoint.tokenizer)
    steps = steps or STEPS
    upper = boost(
        below,
        lambda: Upper(below, run.model.trunk, layers=LAYERS, reads=kind.reads, maps=kind.maps),
        corpus.split("train"),
        eval_windows(corpus.split("valid"), run.model.context, VALID_WINDOWS),
        optim=run.optim,
        steps=steps,
        batch=run.train.batch_size,
        seed=run.seed,
        every=max(1, steps // VALIDATIONS),
        progress=done.progress,
    )
    windows = eval_windows(corpus.split("test"), run.model.context, measures.SHORT_WINDOWS)
    found = evaluate(below, upper, windows)
    gain, error = found.gain
    row: Row = {
        "bpc of the model": found.below.mean().item(),
        "bpc of both": found.both.mean().item(),
        "bpc of its head": found.by_head.mean().item(),
        "gain": gain,
        "gain ±": error,
    }
    return row | _texts(below, upper, checkpoint.tokenizer) if kind.maps == "redo" else row


def _texts(below: Below, upper: Upper, tokenizer: Tokenizer) -> Row:
    """What block 1 alone and both blocks make of the same noise: the first text, and how much of
    all texts is the same.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(TEXTS, LENGTH, below.channels, generator=generator)
    texts = [below.codebook.decode(write(below, block, noise)) for block in (None, upper)]
    alone, both = (tokenizer.decode(tokens[0].tolist()) for tokens in texts)
    same = measures.share(texts[0] == texts[1])
    return {"tokens as by block 1 alone": same, ALONE: alone, BOTH: both}


def draw_cipher(figure: Figure, rows: Sequence[Row]) -> None:
    """The share of the missing bits that every second block recovers, one dot per seed."""
    axes = figure.subplots()
    rows = [row for row in rows if row["block 2"] and row["share"] is not None]
    names = list(dict.fromkeys((row["model"], row["block 2"], row["reads"]) for row in rows))
    for place, name in enumerate(reversed(names)):
        own = [row for row in rows if (row["model"], row["block 2"], row["reads"]) == name]
        errors = [2 * row["gain ±"] / abs(row["missing"]) for row in own]
        places = [place + 0.15 * number for number in range(len(own))]
        shares = [row["share"] for row in own]
        axes.errorbar(shares, places, xerr=errors, fmt="o", color=COLOURS[0], capsize=2)
    labels = [f"{model}: {block}, reads {reads}" for model, block, reads in reversed(names)]
    axes.set_yticks(range(len(names)), labels, fontsize=SMALL)
    axes.axvline(0.0, color="gray", linewidth=0.8)
    axes.set(xlabel="share of the missing bits that block 2 recovers")


def show_texts(rows: Sequence[Row], _folder: Path) -> str:
    """What passes look like: the text that block 1 makes of a noise, and that of both blocks."""
    shown = [row for row in rows if row.get(BOTH) and row["reads"] == "text" and not row["seed"]]
    parts = ["The same noise through block 1 alone, and through both blocks (seed 0):\n"]
    for row in shown:
        parts.append(f"- {row['model']}\n    - {ALONE}: {row[ALONE]}\n    - {BOTH}: {row[BOTH]}")
    return "\n".join(parts) + "\n"


CIPHER = Recipe(
    name="cipher",
    title="Why blocks above Mix-d gain nothing, and one that does",
    claim=(
        "Progressive training adds blocks that refine. Above a tied Mix-d block of one layer, a "
        "block 2 of five could recover what six layers have more than one. It does not where it "
        "reads noise: u_t is uniform in a cell that depends on w(z_<t), which noise alone does not "
        "tell. What must it read, and how must it map? (Block 1 is frozen, block 2 runs left to "
        "right; *missing* is what the model of six layers has less, bits per character. redone: "
        "u' = R_w'(R_w^-1(u)), w' = softmax(log w + delta). In training block 2 also predicts the "
        "next token by a head of its own: its bits say what block 2 knows.)"
    ),
    plan=plan_cipher,
    measure=measure_cipher,
    table=partial(without, columns=(ALONE, BOTH)),
    below=show_texts,
    draw=draw_cipher,
    size=(8.0, 5.0),
    seeds=2,
    clear=(ONE_CHANNEL, TWO_CHANNELS, STACK),
)
