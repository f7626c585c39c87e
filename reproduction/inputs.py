"""What the input of a Transformer costs: the baseline with other inputs, and block 1 alone."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log
from statistics import mean
from typing import Any, Literal

from reproduction.coded import CodedConfig
from reproduction.lengths import RATIO
from reproduction.measures import summary_row
from reproduction.recipe import Finished, Recipe, Row, Training, trainings
from reproduction.settings import Settings, as_flow_config
from reproduction.tables import PAPER_LIKELIHOOD
from tarflowlm.config import OptimConfig, RunConfig
from tarflowlm.model_config import BaselineConfig, TransformerConfig
from tarflowlm.presets import MINI_TRUNK, preset, with_blocks, with_steps

Text = Literal["letters", "pieces"]
BASELINES: dict[Text, str] = {"letters": "mini-ar", "pieces": "english-small-ar"}
"""The preset of the baseline on each kind of tokens."""
SHORT, LONG = {"letters": 650, "pieces": 260}, {"letters": 2600, "pieces": 1300}
"""Steps."""
CHOSEN_ON = 512
"""Windows of the validation split after a short training, on which inputs are compared."""
TESTED_ON = 1024
"""Windows of the test split after a short training in letters."""
VALID = "valid bpc"
OVER_TABLE = "over the table"
SHOWN = {OVER_TABLE: "over AR with a table", RATIO: "over the best AR"}
"""Ratios in the CSV -> in the table of `explained`."""
SHAPE = ("tokens", "layers", "convolution", "reads")
"""Columns that name a model and a place."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A kind of tokens and a Transformer: models of one place are compared."""

    text: Text
    layers: int
    convolves: bool = False

    @property
    def name(self) -> str:
        """As in the names of runs."""
        return f"{self.text}-l{self.layers}{'-taps' * self.convolves}"

    def columns(self) -> Row:
        """As in tables."""
        convolution = "yes" if self.convolves else "no"
        return {"tokens": self.text, "layers": self.layers, "convolution": convolution}

    def trunk(self, shape: TransformerConfig) -> TransformerConfig:
        return replace(shape, input_taps=MINI_TRUNK.input_taps if self.convolves else 0)


SHIPPED, NO_TAPS = Place(text="letters", layers=6, convolves=True), Place(text="letters", layers=4)
SHALLOW, PIECES = replace(SHIPPED, layers=4), Place(text="pieces", layers=7)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A model at a place, with a length; its trainings differ by the seed."""

    place: Place
    model: Literal["AR", "block 1"]
    reads: str
    run: RunConfig
    steps: int
    seeds: int
    """Seeds at least."""

    @property
    def label(self) -> str:
        where = ", ".join(map(str, self.place.columns().values()))
        return f"{self.model} ({where}) {self.reads}, {self.steps:,} steps"


def inputs(place: Place) -> dict[str, tuple[str, dict[str, Any]]]:
    """The inputs of a baseline: the name in runs -> that in tables, and fields of `CodedConfig`."""
    d = 8 if place.text == "letters" else 16
    return {
        "table": ("embedding table", {}),
        "fixed": (f"fixed codes, d = {d}", {"table": 0.0, "code_dim": d}),
        "third": ("table / 3", {"table": 1 / 3}),
        "both": (f"table and fixed codes, d = {d}", {"code_dim": d}),
    }


def baseline(place: Place, kind: str, steps: int, seeds: int = 1) -> Cell:
    """The baseline with an input."""
    run = preset(BASELINES[place.text])
    if place.text == "pieces":
        # the settings of its records: without what pays in many passes
        train = replace(run.train, batch_size=16)
        model = replace(run.model, context=256)
        run = replace(
            run, model=model, train=train, optim=OptimConfig(), temperature=0.8, top_p=1.0
        )
    assert isinstance(run.model, BaselineConfig)
    reads, fields = inputs(place)[kind]
    model = replace(run.model, layers=place.layers, trunk=place.trunk(run.model.trunk))
    if model != run.model or fields or steps != run.train.num_steps:
        # otherwise the preset, which table2 trains
        run = replace(run, name=f"ar-{place.name}-{kind}-x{steps}")
    if fields:
        model = CodedConfig(context=model.context, trunk=model.trunk, layers=model.layers, **fields)
    run = in_steps(place, replace(run, model=model), steps)
    return Cell(place=place, model="AR", reads=reads, run=run, steps=steps, seeds=seeds)


def block_1(
    place: Place, d: int, steps: int, *, linear: bool = False, tokens: bool = False, seeds: int = 1
) -> Cell:
    """The Mix-d block of a flow alone: a model of its own."""
    run = with_blocks(preset("mini-mixd"), (0,))
    config = as_flow_config(run.model)
    model = replace(
        config,
        latent_dim=d,
        blocks=(replace(config.blocks[0], layers=place.layers),),
        trunk=place.trunk(config.trunk),
        input_map="linear" if linear else "two-paths",
        reads_tokens=tokens,
    )
    suffix = "-linear" * linear + "-tokens" * tokens
    run = replace(run, name=f"mixd-{place.name}-d{d}{suffix}-x{steps}", model=model)
    reads = f"latents{' and tokens' * tokens}, d = {d}, {'linear' if linear else 'non-linear'} map"
    run = in_steps(place, run, steps)
    return Cell(place=place, model="block 1", reads=reads, run=run, steps=steps, seeds=seeds)


def in_steps(place: Place, run: RunConfig, steps: int) -> RunConfig:
    """The run with these steps; a short one is compared on more windows of the validation split."""
    run = with_steps(run, steps)
    if steps == LONG[place.text]:
        return run
    train = replace(run.train, evaluate_every=steps // 2, evaluate_windows=CHOSEN_ON)
    if place.text == "letters":
        train = replace(train, test_windows=TESTED_ON)
    return replace(run, train=train)


def yardsticks() -> list[Cell]:
    """The baseline with other inputs."""
    short, long = SHORT["letters"], LONG["letters"]
    return [
        baseline(SHIPPED, "table", short, seeds=2),
        baseline(SHIPPED, "fixed", short, seeds=2),
        baseline(SHIPPED, "third", short),
        baseline(SHIPPED, "both", short),
        baseline(SHIPPED, "table", long, seeds=2),
        baseline(SHIPPED, "fixed", long),
        baseline(PIECES, "table", SHORT["pieces"]),
        baseline(PIECES, "both", SHORT["pieces"]),
        *plain_baselines(),
    ]


def plain_baselines() -> list[Cell]:
    """Without convolution, with the two inputs that block 1 is compared with."""
    lengths = ((SHORT["letters"], 2), (LONG["letters"], 1))
    return [
        baseline(NO_TAPS, kind, steps, seeds)
        for steps, seeds in lengths
        for kind in ("table", "fixed")
    ]


def first_blocks() -> list[Cell]:
    """Block 1 with each input, and the baselines of its places and of more layers."""
    short, long = SHORT["letters"], LONG["letters"]
    return [
        *plain_baselines(),
        block_1(NO_TAPS, 5, short, linear=True, seeds=2),
        block_1(NO_TAPS, 8, short, seeds=2),
        block_1(NO_TAPS, 8, short, tokens=True, seeds=2),
        block_1(NO_TAPS, 16, short, linear=True, seeds=2),
        block_1(NO_TAPS, 5, long, linear=True),
        block_1(NO_TAPS, 8, long),
        block_1(NO_TAPS, 8, long, tokens=True),
        baseline(SHALLOW, "table", short),
        block_1(SHALLOW, 5, short, linear=True),
        block_1(SHALLOW, 8, short, tokens=True),
        baseline(SHALLOW, "table", long),
        baseline(SHIPPED, "table", short, seeds=2),
        baseline(SHIPPED, "table", long, seeds=2),
    ]


def plan(settings: Settings, cells: Callable[[], list[Cell]]) -> list[Training]:
    """The trainings of the cells."""
    found = []
    for cell in cells():
        seeds = max(settings.seeds, cell.seeds)
        found += trainings(replace(settings, seeds=seeds), {cell.label: cell.run})
    return found


def measure(
    _settings: Settings, finished: Sequence[Finished], cells: Callable[[], list[Cell]]
) -> list[Row]:
    """Bits of validation and test, and their ratios to those of baselines of the same place.

    The best baseline of a place is the one with the fewest bits on the validation split.
    """
    known = {cell.label: cell for cell in cells()}
    rows, bits = [], defaultdict[tuple[str, Place, int, str], list[Row]](list)
    for done in finished:
        cell = known[done.training.label]
        found = summary_row(done)
        where = cell.place.columns() | {"steps": cell.steps, "reads": cell.reads}
        row = {"model": cell.label, "is": cell.model} | where | found
        row[VALID] = done.record.summary["stage_valid_bpc"][-1]
        bits[cell.model, cell.place, cell.steps, cell.reads].append(row)
        rows.append(row)
    for done, row in zip(finished, rows, strict=True):
        cell = known[done.training.label]
        others = {
            reads: own
            for (model, place, steps, reads), own in bits.items()
            if model == "AR" and (place, steps) == (cell.place, cell.steps)
        }
        best = min(others, key=lambda reads: mean(row[VALID] for row in others[reads]))
        row["best AR"] = best
        for column in (VALID, "test bpc"):
            tables = others[inputs(cell.place)["table"][0]]
            row[f"{column} {OVER_TABLE}"] = row[column] / of_seed(tables, row)[column]
            row[f"{column} {RATIO}"] = row[column] / of_seed(others[best], row)[column]
    return rows


def of_seed(rows: Sequence[Row], like: Row) -> Row:
    """The row of the same seed, or else of seed 0."""
    return next((row for row in rows if row["seed"] == like["seed"]), rows[0])


def averaged(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of every cell."""
    cells = defaultdict[str, list[Row]](list)
    for row in rows:
        cells[row["model"]].append(row)
    return [*cells.values()]


def compared(rows: Sequence[Row]) -> list[Row]:
    """The table of the baseline's inputs: means over seeds, and every seed's test bits."""
    columns = (*SHAPE, "steps")
    ratios = (f"{VALID} {OVER_TABLE}", f"test bpc {OVER_TABLE}")
    return [
        {name: own[0][name] for name in columns}
        | {VALID: mean(row[VALID] for row in own)}
        | {"test bpc, by seed": ", ".join(f"{row['test bpc']:.4f}" for row in own)}
        | {name: mean(row[name] for row in own) for name in ratios}
        for own in averaged(rows)
    ]


def explained(rows: Sequence[Row]) -> list[Row]:
    """What each input of block 1 adds to the baseline with a table, as the paper's, and to the best
    one of its place.

    Below them what fewer layers add to a baseline, and the paper's two gaps.
    """
    found: dict[tuple[object, ...], Row] = {}
    tests: dict[tuple[int, str], float] = {}
    for own in averaged(rows):
        first = own[0]
        shape = {name: first[name] for name in SHAPE}
        length = "long" if first["steps"] == LONG[first["tokens"]] else "short"
        if first["is"] == "block 1":
            line = found.setdefault(tuple(shape.values()), shape)
            for over in (OVER_TABLE, RATIO):
                line[f"{SHOWN[over]}, {length}"] = mean(row[f"test bpc {over}"] for row in own)
        elif first["convolution"] == "yes":
            tests[first["layers"], f"{SHOWN[OVER_TABLE]}, {length}"] = mean(
                row["test bpc"] for row in own
            )
    order = f"{SHOWN[RATIO]}, short"
    lines = sorted(found.values(), key=lambda row: (row["convolution"], row[order]))
    depth = SHALLOW.columns() | {"reads": "a baseline of four layers over one of six"}
    for (layers, length), value in tests.items():
        if layers == SHALLOW.layers:
            depth[length] = value / tests[SHIPPED.layers, length]
    text8, owt = PAPER_LIKELIHOOD["text8"], PAPER_LIKELIHOOD["owt"]
    gap, wide_gap = text8["Mix-d"] / text8["AR"], log(owt["Mix-d"]) / log(owt["AR"])
    published = [
        {"tokens": tokens, "layers": 12, "reads": reads, f"{SHOWN[OVER_TABLE]}, long": ratio}
        for tokens, reads, ratio in (
            ("letters", "latents, d = 5, the paper on TEXT8", gap),
            ("pieces", "latents, d = 16, the paper on OpenWebText", wide_gap),
        )
    ]
    return [*lines, depth, *published]


YARDSTICK = Recipe(
    name="yardstick",
    mini_only=True,
    title="The baseline's input",
    claim=(
        "Is an embedding table the baseline's best input? Codes are means of a flow's codebook and "
        "enter through the input map of a flow ([math](../math.md#2-the-prior), eq. 5). (An input "
        "is chosen by its bits on the validation split. Letters are those of `mini-ar`, 2,048 "
        "pieces those of `english-small-ar` in windows of 256, with a decay of 0.1. Ratios are of "
        "the same seed.)"
    ),
    plan=partial(plan, cells=yardsticks),
    measure=partial(measure, cells=yardsticks),
    table=compared,
)

INPUTS = Recipe(
    name="inputs",
    mini_only=True,
    title="What the input of block 1 costs",
    claim=(
        "The paper: Mix-d has 5.7 % more bits than the baseline on TEXT8, with d = 5, and 8.9 % "
        "more nats on OpenWebText, with d = 16. Its block 1 reads latents alone; how they enter is "
        "not said; in TarFlow, by a linear map. What does each way cost? (Block 1 is a model by "
        "itself here, over a baseline of as many layers. The paper's kind of baseline has an "
        "embedding table. The best that we found is, without convolution, one with fixed codes, "
        "chosen on the validation split ([yardstick](yardstick.md)). 650 steps are short and 2,600 "
        "long. Means over seeds 0 and 1 after 650 steps without convolution; the other flows and "
        "baselines of four layers have seed 0 alone. After 2,600 steps the ratio of the two "
        "baselines is 0.992 on the test and 0.997 on the validation split.)"
    ),
    plan=partial(plan, cells=first_blocks),
    measure=partial(measure, cells=first_blocks),
    table=explained,
)
