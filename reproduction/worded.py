"""Table 2 with models without our architectural additions, at mini scale."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from reproduction import tables
from reproduction.coded import CodedConfig
from reproduction.lengths import RATIO
from reproduction.measures import SHORT_WINDOWS, gains, summary_row
from reproduction.recipe import RUN_DETAILS, Finished, Recipe, Row, Training, trainings, without
from reproduction.settings import Settings, as_flow_config
from reproduction.text8_start import PAPER
from tarflowlm.config import RunConfig
from tarflowlm.model_config import BaselineConfig
from tarflowlm.presets import preset, with_steps

STEPS = 650
"""Steps of every stage, at most."""
SLOW = 1.5e-3
"""A quarter of the rate, at which blocks above the first have gained most (docs/log.md)."""
DEEP_ABOVE = (1, 1, 4)
"""The layers of the paper's Mix-1, in proportion, for Mix-d."""
CODED = "AR, fixed codes"


def plan_worded(settings: Settings) -> list[Training]:
    """The four families, Mix-d with another rate and other layers, and a second baseline."""
    runs = {
        label: _shortened(preset(f"paper-mini-{kind}")) for label, kind in tables.FAMILIES.items()
    }
    mixd = runs["Mix-d"]
    runs |= {
        "Mix-d, slow": _slow(mixd),
        "Mix-d, layers 1, 1, 4, slow": _slow(_with_layers(mixd, DEEP_ABOVE)),
        CODED: _coded(runs["AR"]),
    }
    return trainings(settings, runs)


def _shortened(run: RunConfig) -> RunConfig:
    run = with_steps(run, STEPS * run.num_stages)
    name = f"{run.name}-x{STEPS}"
    return replace(run, name=name, train=replace(run.train, test_windows=SHORT_WINDOWS))


def _slow(run: RunConfig) -> RunConfig:
    return replace(run, name=f"{run.name}-slow", optim=replace(run.optim, lr=SLOW))


def _with_layers(run: RunConfig, layers: Sequence[int]) -> RunConfig:
    model = as_flow_config(run.model)
    pairs = zip(model.blocks, layers, strict=True)
    blocks = tuple(replace(block, layers=count) for block, count in pairs)
    name = f"{run.name}-l{''.join(map(str, layers))}"
    return replace(run, name=name, model=replace(model, blocks=blocks))


def _coded(run: RunConfig) -> RunConfig:
    """The baseline with fixed codes in the place of its embedding table."""
    assert isinstance(run.model, BaselineConfig)
    model = run.model
    codes = CodedConfig(
        context=model.context, trunk=model.trunk, layers=model.layers, table=0.0, code_dim=8
    )
    name = f"ar-letters-l6-fixed-x{STEPS}"
    return replace(preset("mini-ar"), name=name, model=codes, train=run.train)


def measure_worded(_settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Both bounds, what every block takes off, and the ratio to the baseline, ours and theirs."""
    rows = []
    for done in finished:
        row = summary_row(done) | tables.weighted_bound(done)
        stages = done.record.summary["stage_valid_bpc"]
        if len(stages) > 1:
            row |= {f"valid bpc after block {number}": bpc for number, bpc in enumerate(stages, 1)}
        if not isinstance(done.training.run.model, BaselineConfig):
            row |= gains(done)
        rows.append(row)
    own = {row["seed"]: row["test bpc"] for row in rows if row["model"] == "AR"}
    theirs = tables.PAPER_LIKELIHOOD["text8"]
    weighted = f"iw-{tables.SAMPLES}"
    for row in rows:
        row[RATIO] = row["test bpc"] / own[row["seed"]]
        row[f"{weighted} {RATIO}"] = tables.tightened(row) / own[row["seed"]]
        label = row["model"].partition(",")[0]
        row[PAPER] = theirs[label] / theirs["AR"]
    return rows


WORDED = Recipe(
    name="paper-mini",
    mini_only=True,
    title="The families without our architectural additions",
    claim=(
        "How do the families of [table 2](table2.md) compare without our architectural additions, "
        "and do blocks above Mix-d then gain anything? (Models have d = 5, a linear input map, the "
        "paper's head and no convolution, and block 1 reads latents alone. Blocks have 1, 1 and 4 "
        "layers, and in Mix-d, for which the paper gives none, 4, 1 and 1 unless a row says "
        "otherwise. Mix-1 has 27 components, and 2 above Mix-d, where a stage ends once the bound "
        f"stalls, and after {STEPS:,} steps at the latest. Block 1 had not stalled by then. Slow "
        f"is a rate of {SLOW}. Optimiser (Muon), rotary positions, normalised queries and keys, "
        "the starts of blocks and codes, and the last block of Mix-1 as the one that starts, are "
        "ours. The second AR reads fixed codes, d = 8. What iw-16 takes off over "
        f"{tables.WINDOWS} windows is subtracted from the bound of the test.)"
    ),
    plan=plan_worded,
    measure=measure_worded,
    table=partial(without, columns=(*RUN_DETAILS, *tables.WINDOWED)),
    seeds=2,
)
