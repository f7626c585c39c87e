"""The open question behind figure 6: can passes refine a text, and the bound stay good?

Each stack is a point: its bits per character, and how much of the text the pass before the last already has.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from tarflowlm.config import RunConfig
from tarflowlm.data import DataConfig, TokenizerConfig
from tarflowlm.model import as_flow_config, stack
from tarflowlm.presets import PRESETS, preset
from tarflowlm.report.style import COLOURS, SMALL, Figure
from tarflowlm.reproduce.measures import SHORT_WINDOWS, latents, sampled, share, summary_row
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings

SAMPLES, LENGTH = 16, 128
BPE = TokenizerConfig(kind="bpe", vocab_size=2048)


def plan_frontier(settings: Settings) -> list[Training]:
    """From one block that is the whole language model to blocks that share the work; at paper scale, the families."""
    if settings.scale == "paper":
        kinds = {"AR": "ar", "Mix-d": "mixd", "Mix-1": "mix1", "affine": "affine"}
        return trainings(settings, {label: settings.preset(kind, "text8") for label, kind in kinds.items()})
    plain = "Mix-1, plain start"
    runs = {
        "AR": preset("mini-ar"),
        "Mix-d": preset("mini-mixd"),
        "Mix-1, start from the codebook": preset("mini-mix1"),
        f"{plain}, layers 4, 1, 1": preset("mini-mix1-plain"),
        f"{plain}, layers 1, 1, 4": preset("mini-passes"),
        f"{plain}, K = 8, layers 1, 1, 4": _mix1(components=8),
        f"{plain}, layers 1, 1, 4, separation 3": _mix1(separation=3.0),
        "Mix-1, flattened start, layers 1, 1, 4": _mix1(start="flattened"),
        "affine": preset("mini-affine"),
        "affine, then Mix-d": _affine_mixd(),
        "BPE, AR": _bpe(preset("mini-ar")),
        "BPE, Mix-d": _bpe(preset("mini-mixd")),
        f"BPE, {plain}, K = 16, layers 1, 1, 4": _bpe(_mix1(components=16)),
    }
    return trainings(settings, {label: _tested(run) for label, run in runs.items()})


def _mix1(
    *, start: Literal["flattened", "plain"] = "plain", components: int = 27, separation: float = 12.0
) -> RunConfig:
    """`mini-passes` with another start of block 1, K in every block, or distance between codes."""
    run = preset("mini-passes")
    model = as_flow_config(run.model).each_block(components=components)
    first, *upper = model.blocks
    model = replace(model, blocks=(replace(first, start=start), *upper), separation=separation)
    return replace(run, name=f"mini-mix1-{start}-k{components}-l114-s{separation:g}", model=model)


def _affine_mixd() -> RunConfig:
    """An affine block 1 under a Mix-d block that is the language model: its text is there before the last pass."""
    run = preset("mini-mixd")
    blocks = stack(("affine", "mixd"), (1, 5), (1, 0))
    model = replace(as_flow_config(run.model), blocks=blocks, channel_mix=None)
    joint = preset("mini-mix1").train
    return replace(run, name="mini-affine-mixd", model=model, train=joint)


def _bpe(run: RunConfig) -> RunConfig:
    """The same on tokens of a BPE, with latents of 16 channels: no block can be the whole language model at once."""
    is_flow = run.model.family == "flow"
    model = replace(as_flow_config(run.model), latent_dim=16) if is_flow else run.model
    return replace(run, name=f"{run.name}-bpe", model=model, data=DataConfig(tokenizer=BPE))


def _tested(run: RunConfig) -> RunConfig:
    """Presets as they are, since recipes share their runs; others on fewer windows, whose error is small here."""
    if run.name in PRESETS:
        return run
    return replace(run, train=replace(run.train, test_windows=SHORT_WINDOWS))


def measure_frontier(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Bits per character; for flows also the share of final tokens by pass, and what blocks take off the KL."""
    rows = []
    for done in finished:
        row, checkpoint = summary_row(done), done.load()
        if not checkpoint.model.is_exact:
            passes = sampled(done, checkpoint, SAMPLES, min(LENGTH, checkpoint.run.model.context)).passes
            row |= {
                "after noise": share(passes[0] == passes[-1]),
                "before the last pass": share(passes[-2] == passes[-1]),
            }
            gains = [state.kl_gain.mean for state in latents(done) if state.kl_gain is not None]
            row |= {f"KL taken off by block {index + 1}": gain for index, gain in enumerate(gains)}
        rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{column: row.get(column) for column in columns} for row in rows]


def draw_frontier(figure: Figure, rows: Sequence[Row]) -> None:
    """Every flow as a numbered point; the baselines as lines."""
    axes, number = figure.subplots(), 0
    for row in rows:
        bpc, share, model = row["test bpc"], row["before the last pass"], str(row["model"])
        bpe = model.startswith("BPE")
        colour = COLOURS[1 if bpe else 0]
        if share is None:
            axes.axhline(bpc, color=colour, linestyle=":", label=model)
            continue
        number += 1
        axes.plot(share, bpc, "s" if bpe else "o", color=colour, markersize=5, label=f"{number}  {model}")
        axes.annotate(str(number), (share, bpc), xytext=(4, 4), textcoords="offset points", fontsize=SMALL)
    axes.set_xlim(-0.05, 1.1)
    axes.set_xlabel("share of tokens that the pass before the last already has")
    axes.set_ylabel("test bits per character, <=")
    figure.legend(loc="outside right upper", fontsize=SMALL)


FRONTIER = Recipe(
    name="frontier",
    title="Passes and the bound",
    claim="The paper shows passes that refine a text, and a good bound. Here the models with the best bound show no "
    "passes. How much of the text can the pass before the last have, and what does it cost?",
    plan=plan_frontier,
    measure=measure_frontier,
    draw=draw_frontier,
    size=(9.5, 4.5),
)
