"""A block above a tied Mix-d block: what it adds, compared with one new model."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from reproduction import measures
from reproduction.ablations import HALF_STEPS
from reproduction.boosting import (
    Below,
    Block,
    Further,
    Mixed,
    Reader,
    Reads,
    Weights,
    evaluate,
    fit,
)
from reproduction.lengths import lengthened
from reproduction.recipe import Finished, Recipe, Row, Training, trainings, variant
from reproduction.results import markdown_table
from reproduction.settings import Settings, as_flow_config
from tarflowlm.config import RunConfig
from tarflowlm.data import eval_windows, prepare_corpus
from tarflowlm.model_config import BaselineConfig
from tarflowlm.presets import with_blocks
from tarflowlm_apps.report.style import COLOURS, SMALL, Figure

STEPS = HALF_STEPS  # of every block 2
LAYERS = 5  # of every block 2
VALID_WINDOWS = 256
VALIDATIONS = 5
BPC = "bits per character"
SURE = 0.01
"""Differences in bits per character below this are none."""


class Arm(NamedTuple):
    """A way to train block 2."""

    label: str
    reads: Reads
    kind: Literal["head", "sum", "further", "mix1"]
    lr: float | None = None
    """Peak rate; None: that of block 1."""


HEAD = Arm("w' = its head", "text, features", "head")
SUM = Arm("w' = w times its head", "text, features", "sum")
ALONE = Arm("w' = its head", "text", "head")
FURTHER = Arm("that head, trained on", "text, features", "further", 3e-3)
"""The block of HEAD, its Transformer frozen."""
NOISE = Arm("Mix-1, rate 1.5e-3", "noise", "mix1", 1.5e-3)
FAST_NOISE = Arm("Mix-1, rate 6e-3", "noise", "mix1", 6e-3)
TEXT = Arm("Mix-1, rate 1.5e-3", "text", "mix1", 1.5e-3)
"""Shows that this training finds what its input tells."""

ON_MIXD, ON_AR = "Mix-d, 1 layer", "AR, 1 layer"
FIVE_MIXD, FIVE_AR = "Mix-d, 5 layers", "AR, 5 layers"
LONGER = "AR, 6 layers, longer"
ARMS: dict[str, tuple[tuple[Arm, ...], ...]] = {
    ON_MIXD: ((HEAD, FURTHER), (SUM,), (ALONE,), (NOISE,), (FAST_NOISE,), (TEXT,)),
    ON_AR: ((HEAD,),),
}
"""For every block 1, the blocks 2 that are trained on it, some one after the other."""


def plan_cipher(settings: Settings) -> list[Training]:
    """Blocks 1 of one layer; new models with the layers of block 2, and of both blocks."""
    baseline = settings.preset("ar", "text8")
    short = lengthened(baseline, "1/2")
    runs = {
        ON_MIXD: shallow(settings, 1),
        FIVE_MIXD: shallow(settings, LAYERS),
        "Mix-d, 6 layers": shallow(settings, 6),
        ON_AR: variant(short, "l1", layers=1),
        FIVE_AR: variant(short, "l5", layers=LAYERS),
        "AR, 6 layers": short,
        LONGER: baseline,
    }
    return trainings(settings, runs)


def shallow(settings: Settings, layers: int) -> RunConfig:
    """A tied Mix-d block alone, with this many layers."""
    run = settings.preset("mixd", "text8")
    block = replace(as_flow_config(run.model).blocks[0], layers=layers)
    one = with_blocks(run, [0])
    model = replace(as_flow_config(one.model), blocks=(block,), channel_mix=None)
    one = replace(one, name=f"{run.name}-one-l{layers}", model=model)
    one = measures.shortened(settings, one, HALF_STEPS)
    return replace(one, train=replace(one.train, evaluate_every=HALF_STEPS // 3))


def measure_cipher(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The bits of every model, and of every block 2 on it with what it takes off block 1."""
    rows = []
    for done in finished:
        first = measures.first_columns(done)
        run = done.training.run
        of_model: Row = {
            "block 2": None,
            "reads": None,
            "layers": _layers(run),
            "steps": run.train.num_steps,
            BPC: done.record.summary["test"]["bpc"],
        }
        rows.append(first | of_model)
        for arms in ARMS.get(done.training.label, ()):
            what = f"block 2: {arms[0].label}, reads {arms[0].reads}"
            measure = partial(boosted, done, arms, settings.steps or STEPS)
            rows += [first | row for row in done.measured(what, measure)]
    return rows


def _layers(run: RunConfig) -> int:
    """Transformer layers of a model of one block."""
    model = run.model
    return model.layers if isinstance(model, BaselineConfig) else model.blocks[0].layers


def boosted(done: Finished, arms: Sequence[Arm], steps: int) -> list[Row]:
    """Train a block 2 on the run's model, in the ways of the arms, and measure it after each."""
    checkpoint = replace(done, device=torch.device("cpu")).load()
    run = checkpoint.run
    corpus = prepare_corpus(run.data, checkpoint.tokenizer)
    windows = eval_windows(corpus.split("test"), run.model.context, measures.SHORT_WINDOWS)
    below = Below(checkpoint.model)
    train = replace(
        run.train,
        stage_steps=(steps,),
        minutes=0.0,
        evaluate_every=max(1, steps // VALIDATIONS),
        evaluate_windows=VALID_WINDOWS,
    )
    block: Block | None = None
    rows = []
    for number, arm in enumerate(arms, 1):
        optim = replace(run.optim, lr=arm.lr or run.optim.lr)
        block = fit(
            partial(new_block, below, run, arm, block),
            below,
            corpus,
            replace(run, optim=optim, train=train),
            done.stage(f"{arm.label}, reads {arm.reads}, steps", steps),
        )
        both = evaluate(below, block, windows)
        gain, error = both.gain
        row: Row = {
            "block 2": arm.label,
            "reads": arm.reads,
            "layers": _layers(run) + LAYERS,
            "steps": run.train.num_steps + number * steps,
            BPC: both.both.mean().item(),
            "off block 1": gain,
            "±": error,
        }
        rows.append(row)
    return rows


def new_block(below: Below, run: RunConfig, arm: Arm, trained: Block | None) -> Block:
    """A block 2 before this training, after those of the arms before it."""
    if arm.kind == "further":
        assert isinstance(trained, Weights), arm
        return Further(trained)
    reader = Reader(below, run.model.trunk, layers=LAYERS, reads=arm.reads)
    if arm.kind == "mix1":
        return Mixed(below, reader)
    return Weights(reader, below.codebook.vocab_size, adds=arm.kind == "sum")


Named = tuple[str, Arm | None]
"""A model, or a block 2 on it."""
QUESTIONS: tuple[tuple[str, Named, Named], ...] = (
    ("Does a block 2 that reads the text add to block 1?", (ON_MIXD, HEAD), (ON_MIXD, None)),
    ("Does it on a baseline?", (ON_AR, HEAD), (ON_AR, None)),
    ("Is it better than a new Mix-d block of 5 layers?", (ON_MIXD, HEAD), (FIVE_MIXD, None)),
    ("Is it better than a new baseline of 5 layers?", (ON_MIXD, HEAD), (FIVE_AR, None)),
    ("Is it on a baseline?", (ON_AR, HEAD), (FIVE_AR, None)),
    ("Is it better than a baseline of 6 layers and 2,600 steps?", (ON_MIXD, HEAD), (LONGER, None)),
    ("Does it gain by the features of block 1?", (ON_MIXD, HEAD), (ON_MIXD, ALONE)),
    ("Is it better to multiply the weights of block 1?", (ON_MIXD, SUM), (ON_MIXD, HEAD)),
    ("Does its map gain by further training?", (ON_MIXD, FURTHER), (ON_MIXD, HEAD)),
    ("Does Mix-1 that reads the noise add to block 1?", (ON_MIXD, NOISE), (ON_MIXD, None)),
    ("Does it at four times the rate?", (ON_MIXD, FAST_NOISE), (ON_MIXD, None)),
    ("Does Mix-1 that reads the text?", (ON_MIXD, TEXT), (ON_MIXD, None)),
    ("Is it better than the map that needs no training?", (ON_MIXD, TEXT), (ON_MIXD, ALONE)),
)
"""Whether the first has fewer bits than the second."""


def saved(rows: Sequence[Row], one: Named, other: Named) -> list[float]:
    """The bits per character by which the first has fewer than the second, seed by seed."""

    def bits(named: Named) -> list[float]:
        model, arm = named
        block = (arm.label, arm.reads) if arm else (None, None)
        own = [row for row in rows if row["model"] == model]
        return [float(row[BPC]) for row in own if (row["block 2"], row["reads"]) == block]

    return [more - less for less, more in zip(bits(one), bits(other), strict=True)]


def answers(rows: Sequence[Row]) -> list[Row]:
    """The answers to the questions: yes if the first saves more than SURE in every seed."""
    found = []
    for question, one, other in QUESTIONS:
        each = saved(rows, one, other)
        holds = [bits > SURE for bits in each]
        answer = "yes" if all(holds) else "in some seeds" if any(holds) else "no"
        listed = ", ".join(f"{bits:+.4f}" for bits in each)
        found.append({"question": question, "answer": answer, "bits that it saves": listed})
    return found


def show_answers(rows: Sequence[Row], _folder: Path) -> str:
    """The answers as a table."""
    rule = f"Yes where every seed saves more than {SURE} bits per character:"
    return f"{rule}\n\n{markdown_table(answers(rows))}"


def draw_cipher(figure: Figure, rows: Sequence[Row]) -> None:
    """The bits of every model and every block 2, as one dot per seed."""
    axes = figure.subplots()
    names = list(dict.fromkeys((row["model"], row["block 2"], row["reads"]) for row in rows))
    for place, name in enumerate(reversed(names)):
        own = [row for row in rows if (row["model"], row["block 2"], row["reads"]) == name]
        color = COLOURS[1 if name[1] else 0]
        axes.plot([row[BPC] for row in own], [place] * len(own), "o", color=color, markersize=4)
    labels = [", reads ".join(filter(None, name[1:])) or name[0] for name in reversed(names)]
    axes.set_yticks(range(len(names)), labels, fontsize=SMALL)
    axes.set(xlabel=f"{BPC}; every block 2 is listed below its block 1")


CIPHER = Recipe(
    name="cipher",
    mini_only=True,
    title="A block above a tied Mix-d block, against one model",
    claim=(
        "Block 1 is a frozen tied Mix-d block of one layer, or a frozen baseline of one. Its noise "
        "u_t lies in a cell that depends on w(z_<t), which noise alone does not tell. Block 2 has "
        "five layers and runs left to right. What does it add, and is that more than a new model "
        "of as many layers or steps has? (w': the map u' = R_w'(R_w^-1(u)) with the weights w' "
        "that the head of block 2 predicts, which give both blocks the bits of that head. Mix-1: a "
        "map of the noise, with as many components as tokens, that learns from the density alone. "
        "*Steps* are those of all parts, *layers* those of both blocks. Block 2 sees the windows "
        f"of the text in another order than block 1. {measures.SHORT_WINDOWS:,} test windows; "
        "baselines without a block 2 have 4,096, on which the same model has about 0.001 bits "
        "less. Bits of flows are bounds.)"
    ),
    plan=plan_cipher,
    measure=measure_cipher,
    below=show_answers,
    draw=draw_cipher,
    size=(8.0, 5.0),
    seeds=2,
)
