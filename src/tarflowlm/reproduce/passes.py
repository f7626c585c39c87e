"""Figure 6 of the paper, and the question behind it: can passes refine a text, and the bound stay
good? fig6 decodes a sample after every block, marks its edits, and has a judge read it. In frontier
each stack is a point: its bits per character, and those that a judge gives its text before the last
pass.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from tarflowlm.config import RunConfig
from tarflowlm.model_config import as_flow_config
from tarflowlm.presets import PAPER_CORPORA, preset
from tarflowlm.reproduce import states
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings
from tarflowlm.views.grid import CSS, Token, symbols, to_html
from tarflowlm.views.grid import Row as TextRow
from tarflowlm.views.style import COLOURS, SMALL, Figure, Section, log_scale, page_html

LENGTH, SAMPLES = 128, 48  # tokens per sample, and samples of each model; the first is shown
JUDGED = "judge's bits"
FILLING = "Mix-d that fills in what it is sure of"  # label of `mini-passes`
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
    """Flows without a start from the codebook, and Mix-d; at paper scale every flow of both
    corpora. The judge.
    """
    if settings.scale == "paper":
        every = [(corpus, kind) for corpus in PAPER_CORPORA for kind in LABELS]
        runs = {
            f"{LABELS[kind]}, {PAPER_CORPORA[corpus]}": preset(f"{corpus}-{kind}")
            for corpus, kind in every
        }
        return trainings(settings, runs)
    kinds = {
        "Mix-1, plain start": "mix1-plain",
        states.DEEPEST_LAST: "mix1-deep-last",
        "affine": "affine",
    }
    kinds |= {"Mix-d": "mixd", FILLING: "passes"}
    runs = {label: preset(f"mini-{kind}") for label, kind in kinds.items()}
    return trainings(settings, runs) + states.judge_training(settings)


def measure_fig6(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Over all samples, after every pass: the judge's bits per character and shares of tokens; and
    the first sample with its edited characters.
    """
    judge, models = states.judge_of(settings, finished)
    rows: list[Row] = []
    for done in models:
        checkpoint = done.load()
        passes = states.sample(
            done, checkpoint, SAMPLES, min(LENGTH, checkpoint.run.model.context)
        ).passes
        judged = [states.judged_bits(judge, checkpoint, tokens) for tokens in passes]
        for number, tokens in enumerate(passes):
            mean, block = states.mean_of(judged[number]), len(passes) - number
            text = symbols(tokens[0], checkpoint.tokenizer)
            row: Row = {"model": done.training.label, "seed": done.training.run.seed}
            row["state"] = f"block {block} inverted" if number else "noise"
            row |= {JUDGED: mean.mean, "±": mean.std, "judge": judge.name}
            final = states.share(tokens == passes[-1])
            row |= {"tokens as in the end": final, "tokens edited": None, "text": "".join(text)}
            if number:
                fall = states.mean_of(judged[number - 1] - judged[number])  # of the same samples
                row |= {"fall": fall.mean, "fall ±": fall.std}
                edits = tokens != passes[number - 1]
                is_edited = edits[0].tolist()
                row |= {"tokens edited": states.share(edits), "block": block}
                row["direction"] = "left to right" if block % 2 else "right to left"
                row |= {
                    "edits": sum(is_edited),
                    "tokens": len(is_edited),
                    "edited": edited_spans(text, is_edited),
                }
            rows.append(row)
    return rows


def page_fig6(rows: Sequence[Row]) -> str:
    """Figure 6 as a self-contained page, with one grid for every model and seed."""
    notes = (
        "One row per block, in the order of generation: the last block turns noise into the first state, block 1 "
        "gives the final text. Every state is decoded with the codebook.",
        f"The first of {SAMPLES} samples; a token counts as edited where its decoded token differs. The bits per "
        "character are those of all samples by another language model, which reads the text after every pass.",
    )
    sections = [Section("How to read it", notes)]
    for (model, seed), group in groupby(rows, lambda row: (row["model"], row["seed"])):
        states = list(group)
        grid = to_html([_text_row(row, states[-1]["text"]) for row in states])
        sections.append(Section(f"{model}, seed {seed}", parts=[grid]))
    return page_html(FIG6.title, sections, CSS, "tarflowlm reproduce")


def _text_row(row: Row, final: str) -> TextRow:
    """The label and the characters of a row, which are compared with the final text if both have
    the same length.
    """
    label, text = "noise", row["text"]
    if row.get("block") is not None:
        label = (
            f"block {row['block']}, {row['direction']}: {row['edits']} of {row['tokens']} edited"
        )
    edited = {i for start, stop in row.get("edited") or [] for i in range(start, stop)}
    final, is_noise = final if len(text) == len(final) else text, row["state"] == "noise"
    tokens = [
        Token(here, "changed" if i in edited else "noise" if is_noise or here != there else "final")
        for i, (here, there) in enumerate(zip(text, final, strict=True))
    ]
    judged = f"{row['tokens as in the end']:.0%} final, {row[JUDGED]:.2f} bits in all samples"
    return TextRow(f"{label}; {judged}", tokens)


FIG6 = Recipe(
    name="fig6",
    title="Text after each pass",
    claim="The paper: every intermediate state decodes to text, which each pass refines from coarse to fine. Its "
    "panels show the decoded text before and after every block, with the edits highlighted. (Refining is more than "
    "becoming final: a judge, the baseline trained on another text, reads the text after every pass.)",
    plan=plan_fig6,
    measure=measure_fig6,
    page=page_fig6,
    hidden=("text", "block", "direction", "edits", "tokens", "edited", "judge"),
)


def plan_frontier(settings: Settings) -> list[Training]:
    """From one block that is the whole language model to blocks that share the work; at paper
    scale, the families.
    """
    if settings.scale == "paper":
        kinds = {"AR": "ar", "Mix-d": "mixd", "Mix-1": "mix1", "affine": "affine"}
        return trainings(
            settings, {label: settings.preset(kind, "text8") for label, kind in kinds.items()}
        )
    runs = {"AR": preset("mini-ar"), "Mix-d": preset("mini-mixd"), "affine": preset("mini-affine")}
    runs |= {"Mix-1, start from the codebook": preset("mini-mix1")}
    runs |= {"Mix-1, plain start, layers 4, 1, 1": preset("mini-mix1-plain")}
    runs |= {
        "Mix-1, plain start, layers 1, 1, 4": preset("mini-mix1-deep-last"),
        FILLING: preset("mini-passes"),
    }
    runs |= {"Mix-1, last block Mix-d of 12 classes": _top_mixd("k12", components=12)}
    runs |= {"Mix-1, last block Mix-d of the codebook": _top_mixd("tied", components=0)}
    return trainings(settings, runs) + states.judge_training(settings)


def _top_mixd(suffix: str, *, components: int) -> RunConfig:
    """Mix-1 under a deep Mix-d block that is tied to the codebook, or has components of its own; a
    smaller test.
    """
    run = preset("mini-mix1-deep-last")
    *lower, top = as_flow_config(run.model).blocks
    blocks = (*lower, replace(top, coupling="mixd", components=components))
    model = replace(as_flow_config(run.model), blocks=blocks, channel_mix=None)
    train = replace(run.train, test_windows=states.SHORT_WINDOWS)
    return replace(run, name=f"mini-top-mixd-{suffix}", model=model, train=train)


def measure_frontier(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Bits per character, also over those of the baseline; for flows the judge's bits and the share
    of final tokens after every pass, and the KL lowered by each block.
    """
    judge, models = states.judge_of(settings, finished)
    rows, baseline = [], None
    for done in models:
        row, checkpoint = states.summary_row(done), done.load()
        baseline = baseline or row["test bpc"]  # the first model
        row["over the baseline"] = row["test bpc"] / baseline
        if not checkpoint.model.is_exact:
            passes = states.sample(
                done, checkpoint, SAMPLES, min(LENGTH, checkpoint.run.model.context)
            ).passes
            for number, tokens in enumerate(passes):
                judged = states.mean_of(states.judged_bits(judge, checkpoint, tokens))
                after = f"block {len(passes) - number}" if number else "noise"
                row |= {f"{JUDGED} after {after}": judged.mean, f"± after {after}": judged.std}
                row[f"final after {after}"] = states.share(tokens == passes[-1])
            row |= states.gains(done)
        rows.append(row)
    return rows


def draw_frontier(figure: Figure, rows: Sequence[Row]) -> None:
    """Every flow as a numbered point: bits over the baseline, and a judge's before the last
    pass.
    """
    axes, number, before = figure.subplots(), 0, f"{JUDGED} after block 2"
    for row in rows:
        if row.get(before) is None or row["seed"]:
            continue
        number += 1
        x, y, label = row[before], row["over the baseline"], f"{number}  {row['model']}"
        axes.plot(x, y, "o", color=COLOURS[0], markersize=5, label=label)
        axes.annotate(
            str(number), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=SMALL
        )
    axes.set(
        xlabel="judge's bits per character before the last pass",
        ylabel="test bits over the baseline's",
    )
    log_scale(axes)
    figure.legend(loc="outside right upper", fontsize=SMALL)


def _table_frontier(rows: Sequence[Row]) -> list[Row]:
    """The rows without standard errors and shares of final tokens, which are in the CSV."""
    return [
        {n: value for n, value in row.items() if not n.startswith(("±", "final after"))}
        for row in rows
    ]


FRONTIER = Recipe(
    name="frontier",
    title="Passes and the bound",
    claim="The paper shows passes that refine a text, and a good bound. Can one model have both? A judge, the "
    "baseline trained on another text, reads the samples after every pass: passes refine where its bits fall.",
    plan=plan_frontier,
    measure=measure_frontier,
    table=_table_frontier,
    draw=draw_frontier,
    size=(9.5, 4.5),
)
