"""A block above a tied Mix-d block: how much it can know, and how much of that its map can use."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from reproduction import measures
from reproduction.ablations import HALF_STEPS
from reproduction.boosting import (
    Below,
    Loss,
    M,
    Maps,
    Reader,
    Reads,
    Upper,
    evaluate,
    fit,
    map_loss,
    reader_loss,
    write,
)
from reproduction.lengths import lengthened
from reproduction.recipe import Finished, Recipe, Row, Training, trainings, variant, without
from reproduction.settings import Settings, as_flow_config
from tarflowlm.config import OptimConfig, RunConfig
from tarflowlm.data import Tokenizer, eval_windows, prepare_corpus
from tarflowlm.errors import Progress
from tarflowlm.presets import with_blocks
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm_apps.report.style import COLOURS, SMALL, Figure

SHALLOW = "Mix-d, 1 layer"
DEEP = "Mix-d, 6 layers"
ONE_CHANNEL = "Mix-d, 1 layer, d = 1"
SHALLOW_AR = "AR, 1 layer"
DEEP_AR = "AR, 6 layers"
STEPS = HALF_STEPS  # of the reader, and of each map
LAYERS = 5  # of block 2; with the layer of block 1, as many as in the deep models
VALID_WINDOWS = 256
VALIDATIONS = 5
TEXTS = 32  # drawn from one noise by block 1 alone and by both blocks
LENGTH = 96  # tokens of each
ALONE, BOTH = "block 1 alone", "both blocks"
RECOVERED, BY_HEAD = "recovered", "recovered by its head"

NAMES: dict[Maps, str] = {
    "mix1": "Mix-1",
    "key": "Mix-1, given the key",
    "cells": "Gaussians in the cells",
    "redo": "redone with new weights",
}
RATES: dict[Maps, float] = {"mix1": 1.5e-3, "key": 1.5e-3, "cells": 1.5e-3, "redo": 3e-3}
"""Peak rates, chosen by validation with the preset's eight channels, seed 0 (docs/log.md). "cells",
for one channel, has the rate of the other mixtures.
"""
UPPERS: dict[str, dict[Reads, tuple[Maps, ...]]] = {
    SHALLOW: {"noise": ("mix1",), "text": ("mix1", "key", "redo")},
    ONE_CHANNEL: {"text": ("key", "cells", "redo")},
    SHALLOW_AR: {"text": ("redo",)},
}
"""For every model, the inputs of its second blocks, and the maps that learn on each."""
DEEP_ONES = {SHALLOW: DEEP, ONE_CHANNEL: DEEP, SHALLOW_AR: DEEP_AR}
"""The control of each: one block with the layers of block 1 and block 2 together."""


def plan_cipher(settings: Settings) -> list[Training]:
    """Block 1 of one layer, with the channels of the preset and with one; and, as controls, models
    with as many layers as both blocks.
    """
    one = shallow(settings, 1)
    baseline = lengthened(settings.preset("ar", "text8"), "1/2")
    runs = {
        SHALLOW: one,
        DEEP: shallow(settings, 6),
        ONE_CHANNEL: variant(one, "d1", latent_dim=1),
        SHALLOW_AR: variant(baseline, "l1", layers=1),
        DEEP_AR: baseline,
    }
    return trainings(settings, runs)


def shallow(settings: Settings, layers: int) -> RunConfig:
    """A tied Mix-d block alone, with this many layers."""
    run = settings.preset("mixd", "text8")
    block = replace(as_flow_config(run.model).blocks[0], layers=layers)
    one = with_blocks(run, [0])
    model = replace(as_flow_config(one.model), blocks=(block,), channel_mix=None)
    one = replace(one, name=f"{run.name}-one-l{layers}", model=model)
    if settings.scale == "paper":
        return one
    one = measures.shortened(settings, one, HALF_STEPS)
    return replace(one, train=replace(one.train, evaluate_every=HALF_STEPS // 3))


def measure_cipher(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """For every second block the gains of its reader's head and of its map over block 1, also as
    shares of the control's gain.
    """
    rows = []
    bits = {_key(done): done.record.summary["test"]["bpc"] for done in finished}
    for done in finished:
        label, seed = _key(done)
        own = {"block 2": None, "bpc of the model": bits[label, seed]}
        rows.append(measures.first_columns(done) | own)
        for reads in UPPERS.get(label, {}):
            what = f"second blocks that read {reads}"
            found = done.measured(what, partial(boosted, done, reads, settings.steps))
            missing = bits[label, seed] - bits[DEEP_ONES[label], seed]
            for row in without(found, ("delivered",)):  # in earlier records
                gains = {RECOVERED: row["gain"]}
                if reads == "text":
                    gains[BY_HEAD] = row["bpc of the model"] - row["bpc of its head"]
                shares = {name: x / missing if missing > 0 else None for name, x in gains.items()}
                rows.append(measures.first_columns(done) | row | shares)
    return rows


def _key(done: Finished) -> tuple[str, int]:
    """Label and seed."""
    return done.training.label, done.training.run.seed


def second_blocks(
    checkpoint: Checkpoint,
    below: Below,
    reads: Reads,
    maps: Sequence[Maps],
    *,
    layers: int,
    steps: int,
    valid_windows: int,
    stage: Callable[[str, int], Progress],
) -> Iterator[tuple[Maps, Upper]]:
    """Train a reader on the model `below`, and each of the maps on it.

    `stage` begins one of these trainings, given its name and number of steps.
    """
    run = checkpoint.run
    corpus = prepare_corpus(run.data, checkpoint.tokenizer)
    valid = eval_windows(corpus.split("valid"), run.model.context, valid_windows)

    def fitted(make: Callable[[], M], loss: Loss[M], optim: OptimConfig, what: str) -> M:
        return fit(
            make,
            loss,
            below.channels,
            corpus.split("train"),
            valid,
            optim=optim,
            steps=steps,
            batch=run.train.batch_size,
            seed=run.seed,
            every=max(1, steps // VALIDATIONS),
            progress=stage(f"{what} of the {reads}, steps", steps),
        )

    make = partial(Reader, below, run.model.trunk, layers=layers, reads=reads)
    reader = fitted(make, reader_loss(below), run.optim, "reader")
    for one in maps:
        optim = replace(run.optim, lr=RATES[one])
        yield one, fitted(partial(Upper, below, reader, one), map_loss(below), optim, NAMES[one])


def boosted(done: Finished, reads: Reads, steps: int | None) -> list[Row]:
    """Train a reader on the run's model, and every map on it; their bits on test windows."""
    checkpoint = done.load()
    run = checkpoint.run
    below = Below(checkpoint.model)
    corpus = prepare_corpus(run.data, checkpoint.tokenizer)
    windows = eval_windows(corpus.split("test"), run.model.context, measures.SHORT_WINDOWS)
    of_reads = UPPERS[done.training.label][reads]
    blocks = second_blocks(
        checkpoint,
        below,
        reads,
        of_reads,
        layers=LAYERS,
        steps=steps or STEPS,
        valid_windows=VALID_WINDOWS,
        stage=done.stage,
    )
    rows = []
    for maps, upper in blocks:
        found = evaluate(below, upper, windows)
        gain, error = found.gain
        row: Row = {
            "block 2": NAMES[maps],
            "reads": reads,
            "bpc of the model": found.below.mean().item(),
            "bpc of its head": found.by_head.mean().item(),
            "bpc of both": found.both.mean().item(),
            "gain": gain,
            "gain ±": error,
        }
        rows.append(row | _texts(below, upper, checkpoint.tokenizer) if maps == "redo" else row)
    return rows


def _texts(below: Below, upper: Upper, tokenizer: Tokenizer) -> Row:
    """The first text that block 1 alone and both blocks make of the same noise, and how much of all
    texts is the same.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(TEXTS, LENGTH, below.channels, generator=generator)
    texts = [below.codebook.decode(write(below, block, noise)) for block in (None, upper)]
    alone, both = (tokenizer.decode(tokens[0].tolist()) for tokens in texts)
    same = measures.share(texts[0] == texts[1])
    return {"tokens as by block 1 alone": same, ALONE: alone, BOTH: both}


def draw_cipher(figure: Figure, rows: Sequence[Row]) -> None:
    """The gain of every map as one dot per seed, and the gain of its reader's head as a bar."""
    axes = figure.subplots()
    rows = [row for row in rows if row["block 2"] and row["reads"] == "text"]
    names = list(dict.fromkeys((row["model"], row["block 2"]) for row in rows))
    for place, name in enumerate(reversed(names)):
        own = [row for row in rows if (row["model"], row["block 2"]) == name]
        places = [place + 0.15 * number for number in range(len(own))]
        gains = [row["gain"] for row in own]
        by_head = [row["bpc of the model"] - row["bpc of its head"] for row in own]
        errors = [2 * row["gain ±"] for row in own]
        axes.errorbar(gains, places, xerr=errors, fmt="o", color=COLOURS[0], capsize=2)
        axes.plot(by_head, places, "|", color=COLOURS[1], markersize=12)
    labels = [", ".join(name) for name in reversed(names)]
    axes.set_yticks(range(len(names)), labels, fontsize=SMALL)
    axes.axvline(0.0, color="gray", linewidth=0.8)
    axes.set(
        xlabel="bits per character off block 1: by the map (dots), by the reader's head (bars)"
    )


def show_texts(rows: Sequence[Row], _folder: Path) -> str:
    """The text that block 1 of the first model makes of a noise, and the text of both blocks."""
    row = next(row for row in rows if row.get(BOTH))
    return f"One noise through {ALONE}, and through {BOTH}:\n\n- {row[ALONE]}\n- {row[BOTH]}\n"


CIPHER = Recipe(
    name="cipher",
    title="What a block above a tied Mix-d block knows, and what its map makes of it",
    claim=(
        "Block 1 is a frozen tied Mix-d block of one layer. Its noise u_t lies in a cell that "
        "depends on w(z_<t), which noise alone does not tell. How much of the language does a "
        "block 2 of five layers learn from the noise, and how much from the text? (The Transformer "
        "of block 2, left to right, learns to predict the next token by a head, and is frozen, "
        "too. Then each map learns on it. At mini scale block 1, reader and map have 1,300 steps "
        "each, the models of six layers 1,300 in all. The key: w(z_<t) and the cells at the own "
        "position. Redone: u' = R_w'(R_w^-1(u)), w' = softmax(log w + delta), delta zero at the "
        "start. With the reader's own head as w' no map has to learn, and both blocks have the "
        "bits of the head. *recovered*: the gain over that of six layers in block 1. There is no "
        "control of five layers without block 1.)"
    ),
    plan=plan_cipher,
    measure=measure_cipher,
    table=partial(without, columns=(ALONE, BOTH, "bpc of both", "gain ±")),
    below=show_texts,
    draw=draw_cipher,
    size=(8.0, 5.0),
    seeds=2,
    clear=(ONE_CHANNEL,),
)
