"""Figure 6 of the paper: a sample decoded after every block, with what the block edited."""

from collections.abc import Sequence

from tarflowlm.presets import PAPER_CORPORA, preset
from tarflowlm.report.grid import symbols
from tarflowlm.reproduce.measures import DEEPEST_LAST, sampled, share
from tarflowlm.reproduce.panels import edited_spans, panels_page
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings

NUM, LENGTH = 8, 128
"""Samples, and their tokens. The first one is shown."""
LABELS = {"affine": "affine", "mix1": "Mix-1", "mixd": "Mix-d"}


def plan_fig6(settings: Settings) -> list[Training]:
    """Flows without a start from the codebook, and Mix-d; at paper scale every flow of both corpora."""
    if settings.scale == "paper":
        every = [(corpus, kind) for corpus in PAPER_CORPORA for kind in LABELS]
        runs = {f"{LABELS[kind]}, {PAPER_CORPORA[corpus]}": preset(f"{corpus}-{kind}") for corpus, kind in every}
        return trainings(settings, runs)
    return trainings(
        settings,
        {
            "Mix-1, plain start": preset("mini-mix1-plain"),
            # the paper's shares of layers; in the presets the first block is the deepest
            DEEPEST_LAST: preset("mini-passes"),
            "affine": preset("mini-affine"),
            "Mix-d": preset("mini-mixd"),
        },
    )


def measure_fig6(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Shares of tokens over all samples, and the first sample with its edited characters, after every pass."""
    rows: list[Row] = []
    for done in finished:
        checkpoint = done.load()
        passes = sampled(done, checkpoint, NUM, min(LENGTH, checkpoint.run.model.context)).passes
        for number, tokens in enumerate(passes):
            row: Row = {"model": done.training.label, "seed": done.training.run.seed}
            block = len(passes) - number
            row["state"] = f"block {block} inverted" if number else "noise"
            row["tokens as in the end"] = share(tokens == passes[-1])
            text = symbols(tokens[0], checkpoint.tokenizer)
            row |= {"tokens edited": None, "text": "".join(text)}
            if number:
                edits = tokens != passes[number - 1]
                is_edited = edits[0].tolist()
                row |= {
                    "tokens edited": share(edits),
                    "block": block,
                    "direction": "left to right" if block % 2 else "right to left",
                    "edits": sum(is_edited),
                    "tokens": len(is_edited),
                    "edited": edited_spans(text, is_edited),
                }
            rows.append(row)
    return rows


def sample_texts(settings: Settings, finished: Sequence[Finished], rows: Sequence[Row]) -> str:
    """Markdown with the first sample of each model after every pass."""
    parts = [f"## Samples\n\nThe first of {NUM} samples of each model, seed 0, after every pass, noise first.\n"]
    for done in finished:
        label, seed = done.training.label, done.training.run.seed
        lines = "\n".join(row["text"] for row in rows if (row["model"], row["seed"]) == (label, seed))
        parts.append(f"{label}, {done.training.name}:\n\n```\n{lines}\n```\n")
    return "\n".join(parts)


TITLE = "Text after each pass"


def page_fig6(rows: Sequence[Row]) -> str:
    """Figure 6 as a page."""
    notes = (
        "One row per block, in the order of generation: the last block turns noise into the first state, block 1 "
        "gives the final text. Every state is decoded with the codebook.",
        f"The first of {NUM} samples; a token counts as edited where its decoded token differs.",
    )
    return panels_page(TITLE, notes, rows)


FIG6 = Recipe(
    name="fig6",
    title=TITLE,
    claim="The paper: every intermediate state decodes to text, which each pass refines from coarse to fine. Its "
    "panels show the decoded text before and after every block, with the edits highlighted.",
    plan=plan_fig6,
    measure=measure_fig6,
    page=page_fig6,
    csv_only=("text", "block", "direction", "edits", "tokens", "edited"),
    text=sample_texts,
)
