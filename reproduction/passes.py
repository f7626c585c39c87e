"""Figure 6 of the paper, and the question it raises: can one model refine a text and fit it well?

fig6 decodes a sample after every block, marks its edits, and has a judge read it. In frontier each
stack is a line: the judge's bits after every pass, beside the bits per character of the stack.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

from reproduction import figures, measures
from reproduction.judges import Judge
from reproduction.measures import JUDGED
from reproduction.recipe import Finished, Recipe, Row, Training, no_table, trainings, without
from reproduction.results import write
from reproduction.settings import Settings
from reproduction.tables import FAMILIES, PAPER_LIKELIHOOD
from tarflowlm.model import as_flow
from tarflowlm.model_config import FlowConfig
from tarflowlm.presets import preset
from tarflowlm.terminal.tokens import Row as TextRow
from tarflowlm.terminal.tokens import Token, symbols
from tarflowlm_apps.grid import to_html
from tarflowlm_apps.report.page import page_html, section_html
from tarflowlm_apps.report.style import Figure, log_scale

LENGTH = 128  # tokens per sample
SAMPLES = 48  # samples of each model; the first is shown
FILLING = "Mix-d that fills in what it is sure of"
"""Label of `mini-passes`."""


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
    """Flows with a plain start, Mix-d, and the judge; at paper scale the flows of both corpora."""
    labels = "Mix-1", "affine", "Mix-d"
    if settings.scale == "paper":
        runs = {
            f"{label}, {corpus}": settings.preset(FAMILIES[label], corpus)
            for corpus in PAPER_LIKELIHOOD
            for label in labels
        }
        return trainings(settings, runs)
    runs = {label: settings.preset(FAMILIES[label], "text8") for label in labels}
    runs[FILLING] = preset("mini-passes")
    return trainings(settings, runs) + measures.judge_training(settings)


def judged_passes(done: Finished, judge: Callable[[], Judge]) -> list[Row]:
    """The judge's bits and shares of tokens after every pass, and the edits of the first sample."""

    def measure() -> list[Row]:
        checkpoint = done.load()
        length = min(LENGTH, checkpoint.run.model.context)
        # decoded states [SAMPLES, T]: of the noise, and after every inverted block
        generation = measures.sample(done, checkpoint, SAMPLES, length)
        passes = generation.passes(as_flow(checkpoint.model))
        judged = [measures.judged_bits(judge(), checkpoint, tokens) for tokens in passes]
        rows: list[Row] = []
        for number, tokens in enumerate(passes):
            block = len(passes) - number
            mean = measures.mean_of(judged[number])
            text = symbols(tokens[0], checkpoint.tokenizer)
            row: Row = {
                "state": f"block {block} inverted" if number else "noise",
                JUDGED: mean.mean,
                "±": mean.std,
                "tokens as in the end": measures.share(tokens == passes[-1]),
                "tokens edited": None,
                "text": "".join(text),
            }
            if number:
                # a difference on the same samples
                fall = measures.mean_of(judged[number - 1] - judged[number])
                edits = tokens != passes[number - 1]
                is_edited = edits[0].tolist()
                row |= {
                    "fall": fall.mean,
                    "fall ±": fall.std,
                    "tokens edited": measures.share(edits),
                    "block": block,
                    "direction": "left to right" if block % 2 else "right to left",
                    "edits": sum(is_edited),
                    "tokens": len(is_edited),
                    "edited": edited_spans(text, is_edited),
                }
            rows.append(row)
        return rows

    return done.measured("judged passes", measure)


def measure_fig6(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The rows of `judged_passes` for every model."""
    judge, models = measures.judge_of(settings, finished)
    return [
        measures.first_columns(done) | row for done in models for row in judged_passes(done, judge)
    ]


def page_fig6(rows: Sequence[Row]) -> str:
    """Figure 6 as a self-contained page, with one grid for every model and seed."""
    notes = (
        "One row per block, in the order of generation: the last block turns noise into the first "
        "state, block 1 gives the final text. Every state is decoded with the codebook.",
        f"The first of {SAMPLES} samples; a token counts as edited where its decoded token "
        "differs. The bits per character are those of all samples by another language model, "
        "which reads the text after every pass.",
    )
    sections = [section_html("How to read it", notes)]
    for (model, seed), group in groupby(rows, lambda row: (row["model"], row["seed"])):
        states = list(group)
        grid = to_html([_text_row(row, states[-1]["text"]) for row in states])
        sections.append(section_html(f"{model}, seed {seed}", parts=[grid]))
    return page_html(FIG6.title, sections)


def _text_row(row: Row, final: str) -> TextRow:
    """The label and the characters of a row.

    They are compared with the final text if both have the same length.
    """
    label = row["state"]
    if row.get("block") is not None:
        edits = f"{row['edits']} of {row['tokens']} edited"
        label = f"block {row['block']}, {row['direction']}: {edits}"
    judged = f"{row['tokens as in the end']:.0%} final, {row[JUDGED]:.2f} bits in all samples"
    return TextRow(f"{label}; {judged}", list(_tokens(row, final)))


def _tokens(row: Row, final: str) -> Iterator[Token]:
    text = row["text"]
    edited = {i for start, stop in row.get("edited") or [] for i in range(start, stop)}
    if len(text) != len(final):
        final = text
    for i, (here, there) in enumerate(zip(text, final, strict=True)):
        if i in edited:
            yield Token(here, "changed")
        elif row["state"] == "noise" or here != there:
            yield Token(here, "noise")
        else:
            yield Token(here, "final")


CONTROL = "fig6-control"
"""The table of the control among the figures."""
_CONTROL = """## A control

Pass 2 of the model that fills in writes the letters that eq. 9a made noise, so it improves the text
by construction. `git checkout 0aee0b8e; python -m reproduction.written_back` takes samples of a
baseline, puts noise where block 1 of that model is sure of a letter, and writes the letters back.
Bits and edits fall as they do in the model. So these curves do not tell refining from filling gaps.
"""


def _link_page(rows: Sequence[Row], folder: Path) -> str:
    write(folder / "fig6.html", page_fig6(rows))
    link = "As a page: [fig6.html](fig6.html).\n"
    if FILLING not in {row["model"] for row in rows}:
        return link
    return f"{link}\n{_CONTROL}\n{figures.markdown(CONTROL)}"


CSV_ALONE = ("text", "block", "direction", "edits", "tokens", "edited", "fall", "fall ±")
"""Columns of figure 6 that only the CSV shows."""

FIG6 = Recipe(
    name="fig6",
    title="Text after each pass",
    claim=(
        "The paper: every intermediate state decodes to text, which each pass refines from coarse"
        " to fine. Its panels show the decoded text before and after every block, with the edits "
        "highlighted. (Refining is more than becoming final: a judge, a baseline of another "
        "seed, reads the text after every pass.)"
    ),
    plan=plan_fig6,
    measure=measure_fig6,
    table=partial(without, columns=CSV_ALONE),
    below=_link_page,
)


def plan_frontier(settings: Settings) -> list[Training]:
    """From one block that is the whole language model to blocks that share the work.

    At paper scale, the families.
    """
    labels = "AR", "Mix-d", "affine", "Mix-1"
    runs = {label: settings.preset(FAMILIES[label], "text8") for label in labels}
    if settings.scale == "mini":
        runs[FILLING] = preset("mini-passes")
    return trainings(settings, runs) + measures.judge_training(settings)


def measure_frontier(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Bits per character and their ratio to the baseline's; for flows also the work of every pass.

    That is the judge's bits, the share of final tokens, and how far each block lowers the KL.
    """
    judge, models = measures.judge_of(settings, finished)
    baselines = {
        row["seed"]: row["test bpc"]
        for row in map(measures.summary_row, models)
        if row["model"] == "AR"
    }
    rows = []
    for done in models:
        row = measures.summary_row(done)
        row["over the baseline"] = row["test bpc"] / baselines[row["seed"]]
        if isinstance(done.training.run.model, FlowConfig):
            for state in judged_passes(done, judge):
                after = state["state"].removesuffix(" inverted")
                row[f"{JUDGED} after {after}"] = state[JUDGED]
                row[f"± after {after}"] = state["±"]
                row[f"final after {after}"] = state["tokens as in the end"]
            row |= measures.gains(done)
        rows.append(row)
    return rows


def draw_frontier(figure: Figure, rows: Sequence[Row]) -> None:
    """The judge's bits after every pass, from the noise on; labelled with the bits of the model."""
    axes = figure.subplots()
    most = 0
    for row in rows:
        bits = [value for name, value in row.items() if name.startswith(JUDGED) and value]
        if bits and not row["seed"]:
            label = f"{row['model']}: {row['over the baseline']:.3f}"
            axes.plot(range(len(bits)), bits, "o-", markersize=4, label=label)
            most = max(most, len(bits))
    axes.set(xlabel="passes", ylabel="judge's bits per character", xticks=range(most))
    axes.legend(
        title="test bits over the baseline's",
        loc="upper center",
        bbox_to_anchor=(0.5, -0.15),
        ncols=2,
    )
    log_scale(axes)


FRONTIER = Recipe(
    name="frontier",
    title="Passes and the bound",
    claim=(
        "The paper shows passes that refine a text, and a good bound. Can one model have both? A "
        "judge, a baseline of another seed, reads the samples after every pass: where its bits "
        "fall, a pass refines the text or fills gaps, which [figure 6](fig6.md) cannot tell apart. "
        "(frontier.csv has the numbers.)"
    ),
    plan=plan_frontier,
    measure=measure_frontier,
    table=no_table,
    draw=draw_frontier,
)
