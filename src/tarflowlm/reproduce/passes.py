"""Figure 6 of the paper, and the question behind it: can passes refine a text, and the bound stay good? fig6 decodes
a sample after every block and marks its edits. In frontier each stack is a point: its bits per character, and the
share of the text that is final before the last pass."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Literal

from tarflowlm.config import DataConfig, RunConfig, TokenizerConfig, as_flow_config, stack
from tarflowlm.presets import PAPER_CORPORA, PRESETS, preset
from tarflowlm.report.grid import CSS, Token, symbols, to_html
from tarflowlm.report.grid import Row as TextRow
from tarflowlm.report.style import COLOURS, SMALL, Figure, Section, page_html
from tarflowlm.reproduce.recipe import RUN_DETAILS, Finished, Recipe, Row, Settings, Training, trainings
from tarflowlm.reproduce.states import DEEPEST_LAST, SHORT_WINDOWS, latents, sample, share, summary_row

LENGTH, SHOWN_SAMPLES, SAMPLES = 128, 8, 16  # tokens per sample; samples of fig6 (the first is shown), of frontier
BPE = TokenizerConfig(kind="bpe", vocab_size=2048)
LABELS = {"affine": "affine", "mix1": "Mix-1", "mixd": "Mix-d"}


def edited_spans(symbols: Sequence[str], is_edited: Sequence[bool]) -> list[list[int]]:
    """[start, stop) of the characters of the edited symbols of a text, ascending and apart."""
    spans: list[list[int]] = []
    at = 0
    for symbol, edited in zip(symbols, is_edited, strict=True):
        if edited and symbol:
            if spans and spans[-1][1] == at:
                spans[-1][1] += len(symbol)
            else:
                spans.append([at, at + len(symbol)])
        at += len(symbol)
    return spans


def plan_fig6(settings: Settings) -> list[Training]:
    """Flows without a start from the codebook, and Mix-d; at paper scale every flow of both corpora."""
    if settings.scale == "paper":
        every = [(corpus, kind) for corpus in PAPER_CORPORA for kind in LABELS]
        runs = {f"{LABELS[kind]}, {PAPER_CORPORA[corpus]}": preset(f"{corpus}-{kind}") for corpus, kind in every}
        return trainings(settings, runs)
    kinds = {"Mix-1, plain start": "mix1-plain", DEEPEST_LAST: "passes", "affine": "affine", "Mix-d": "mixd"}
    return trainings(settings, {label: preset(f"mini-{kind}") for label, kind in kinds.items()})


def measure_fig6(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Shares of tokens over all samples, and the first sample with its edited characters, after every pass."""
    rows: list[Row] = []
    for done in finished:
        checkpoint = done.load()
        passes = sample(done, checkpoint, SHOWN_SAMPLES, min(LENGTH, checkpoint.run.model.context)).passes
        for number, tokens in enumerate(passes):
            block, text = len(passes) - number, symbols(tokens[0], checkpoint.tokenizer)
            row: Row = {"model": done.training.label, "seed": done.training.run.seed}
            row["state"] = f"block {block} inverted" if number else "noise"
            row |= {"tokens as in the end": share(tokens == passes[-1]), "tokens edited": None, "text": "".join(text)}
            if number:
                edits = tokens != passes[number - 1]
                is_edited = edits[0].tolist()
                row |= {"tokens edited": share(edits), "block": block}
                row["direction"] = "left to right" if block % 2 else "right to left"
                row |= {"edits": sum(is_edited), "tokens": len(is_edited), "edited": edited_spans(text, is_edited)}
            rows.append(row)
    return rows


def page_fig6(rows: Sequence[Row]) -> str:
    """Figure 6 as a self-contained page, with one grid for every model and seed."""
    notes = (
        "One row per block, in the order of generation: the last block turns noise into the first state, block 1 "
        "gives the final text. Every state is decoded with the codebook.",
        f"The first of {SHOWN_SAMPLES} samples; a token counts as edited where its decoded token differs.",
    )
    sections = [Section("How to read it", notes)]
    for (model, seed), group in groupby(rows, lambda row: (row["model"], row["seed"])):
        states = list(group)
        grid = to_html([_text_row(row, states[-1]["text"]) for row in states])
        sections.append(Section(f"{model}, seed {seed}", parts=[grid]))
    return page_html(FIG6.title, sections, CSS, "tarflowlm reproduce")


def _text_row(row: Row, final: str) -> TextRow:
    """The label and the characters of a row, which are compared with the final text if both have the same length."""
    label, text = "noise", row["text"]
    if row.get("block") is not None:
        label = f"block {row['block']}, {row['direction']}: {row['edits']} of {row['tokens']} edited"
    edited = {i for start, stop in row.get("edited") or [] for i in range(start, stop)}
    final, is_noise = final if len(text) == len(final) else text, row["state"] == "noise"
    tokens = [
        Token(here, "changed" if i in edited else "noise" if is_noise or here != there else "final")
        for i, (here, there) in enumerate(zip(text, final, strict=True))
    ]
    return TextRow(f"{label}; {row['tokens as in the end']:.0%} final in all samples", tokens)


FIG6 = Recipe(
    name="fig6", title="Text after each pass",
    claim="The paper: every intermediate state decodes to text, which each pass refines from coarse to fine. Its "
    "panels show the decoded text before and after every block, with the edits highlighted.",
    plan=plan_fig6, measure=measure_fig6, page=page_fig6,
    hidden=("text", "block", "direction", "edits", "tokens", "edited"),
)  # fmt: skip


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
        f"{plain}, K = 8, layers 1, 1, 4": _mix1(K=8),
        f"{plain}, layers 1, 1, 4, separation 3": _mix1(separation=3.0),
        "Mix-1, flattened start, layers 1, 1, 4": _mix1(start="flattened"),
        "affine": preset("mini-affine"),
        "affine, then Mix-d": _affine_mixd(),
        "BPE, AR": _bpe(preset("mini-ar")),
        "BPE, Mix-d": _bpe(preset("mini-mixd")),
        f"BPE, {plain}, K = 16, layers 1, 1, 4": _bpe(_mix1(K=16)),
    }
    # presets stay as they are, since recipes share their runs; the others have a smaller test
    for label, run in runs.items():
        if run.name not in PRESETS:
            runs[label] = replace(run, train=replace(run.train, test_windows=SHORT_WINDOWS))
    return trainings(settings, runs)


def _mix1(*, start: Literal["flattened", "plain"] = "plain", K: int = 27, separation: float = 12.0) -> RunConfig:
    """`mini-passes` with another start of block 1, K in every block, or distance between codes."""
    run = preset("mini-passes")
    model = as_flow_config(run.model).each_block(components=K)
    first, *upper = model.blocks
    model = replace(model, blocks=(replace(first, start=start), *upper), separation=separation)
    return replace(run, name=f"mini-mix1-{start}-k{K}-l114-s{separation:g}", model=model)


def _affine_mixd() -> RunConfig:
    """An affine block 1 under a Mix-d block that is the language model: the text is final before the last pass."""
    run = preset("mini-mixd")
    model = replace(as_flow_config(run.model), blocks=stack(("affine", "mixd"), (1, 5), (1, 0)), channel_mix=None)
    return replace(run, name="mini-affine-mixd", model=model, train=preset("mini-mix1").train)


def _bpe(run: RunConfig) -> RunConfig:
    """The same on BPE tokens, with latents of 16 channels: no block can be the whole language model at once."""
    model = replace(as_flow_config(run.model), latent_dim=16) if run.model.family == "flow" else run.model
    return replace(run, name=f"{run.name}-bpe", model=model, data=DataConfig(tokenizer=BPE))


def measure_frontier(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Bits per character; for flows also the share of final tokens by pass, and the KL lowered by each block."""
    rows = []
    for done in finished:
        row, checkpoint = summary_row(done), done.load()
        if not checkpoint.model.is_exact:
            passes = sample(done, checkpoint, SAMPLES, min(LENGTH, checkpoint.run.model.context)).passes
            row["after noise"] = share(passes[0] == passes[-1])
            row["before the last pass"] = share(passes[-2] == passes[-1])
            gains = [state.kl_gain.mean for state in latents(done) if state.kl_gain is not None]
            row |= {f"KL taken off by block {index + 1}": gain for index, gain in enumerate(gains)}
        rows.append(row)
    return rows


def draw_frontier(figure: Figure, rows: Sequence[Row]) -> None:
    """Every flow as a numbered point; the baselines as lines."""
    axes, number = figure.subplots(), 0
    for row in rows:
        bpc, share, model = row["test bpc"], row.get("before the last pass"), str(row["model"])
        colour, marker = (COLOURS[1], "s") if model.startswith("BPE") else (COLOURS[0], "o")
        if share is None:
            axes.axhline(bpc, color=colour, linestyle=":", label=model)
            continue
        number += 1
        axes.plot(share, bpc, marker, color=colour, markersize=5, label=f"{number}  {model}")
        axes.annotate(str(number), (share, bpc), xytext=(4, 4), textcoords="offset points", fontsize=SMALL)
    axes.set(xlim=(-0.05, 1.1), ylabel="test bits per character, <=")
    axes.set_xlabel("share of tokens that are final before the last pass")
    figure.legend(loc="outside right upper", fontsize=SMALL)


FRONTIER = Recipe(
    name="frontier", title="Passes and the bound",
    claim="The paper shows passes that refine a text, and a good bound. Here the models with the best bound show no "
    "passes. How much of the text can be final before the last pass, and at what cost?",
    plan=plan_frontier, measure=measure_frontier, hidden=(*RUN_DETAILS, "after noise"), draw=draw_frontier,
    size=(9.5, 4.5),
)  # fmt: skip
