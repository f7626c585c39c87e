"""The layout of the page in Gradio: one tab per view."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

import gradio as gr

from tarflowlm_apps.grid import div
from tarflowlm_apps.studio import values
from tarflowlm_apps.studio.catalogue import Catalogue
from tarflowlm_apps.studio.edit import KINDS, WORDS, change, rewrite
from tarflowlm_apps.studio.pieces import Pages, card, guarded, muted, page
from tarflowlm_apps.studio.runs import runs
from tarflowlm_apps.studio.score import MODELS, compare
from tarflowlm_apps.studio.write import infill, offer, write

# gradio's classes cannot be named in annotations that tests check
Component = Any
Event = Callable[..., Any]
View = Callable[..., Pages]

TITLE = "tarflowlm studio"
WAITING = 64  # requests that may wait for their turn; further ones are refused
REFRESH = 4.0  # seconds between two looks at the folders of runs
DRAWN = 6  # runs that are drawn at first

EXAMPLES = (
    # a text in which block 1 fills in all of eight gaps
    ("Watch the passes", "english-passes", "one day the king ", 128, 24),
    ("Begin a tale", "english-small", "Once upon a time there was", 160, 0),
    ("Fill in blanks", "english-small", "The old _ sat by the _ and told the _ a story.", 96, 0),
)
"""Label, model, text, length and seed of each."""
ONE_EACH = "Put _ where the model should choose one token: a word, a part of one, or a letter"
GAPS = "Once there was [...] who lived in the [...] forest."
BLANKS = "the old ____ lived in the ______ by the sea"
SENTENCE = "The old woman gave the boy a golden apple."
TALE = (
    "Once upon a time there was a king who had three sons, and the youngest of them was so kind "
    "that the birds sat on his hand."
)


def build(catalogue: Catalogue) -> Component:
    """The page about the models and runs of `catalogue`."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        head = f"{TITLE}<span>watch a small language model write</span>"
        gr.HTML(div("st", div("st-head", head)), apply_default_css=False)
        _write(catalogue, blocks.load)
        _infill(catalogue)
        _edit(catalogue)
        _score(catalogue)
        _runs(catalogue, blocks.load)
        lists = [block for block in blocks.blocks.values() if isinstance(block, gr.Dropdown)]

        def models() -> list[object]:
            catalogue.refresh()
            return [gr.Dropdown(catalogue.choices) for _ in lists]

        _quick(blocks.load, models, None, lists)
    # nothing may bypass the queue
    blocks.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    return blocks


def _quick(event: Event, function: Callable[..., object], inputs: object, outputs: object) -> Any:
    """Bind a function that needs no model, and so does not wait for one."""
    return event(
        function,
        inputs,
        outputs,
        concurrency_id="runs",
        concurrency_limit=2,
        show_progress="hidden",
        api_visibility="private",
    )


def _write(catalogue: Catalogue, arrival: Event) -> None:
    """The tab that writes. It begins with the request in the address, or with the first example.

    A click on a word of the result offers others in its place.
    """

    def values_of(name: str, text: str, length: int, seed: int = 0) -> list[values.Value]:
        usual = catalogue.temperature(name), catalogue.top_p(name)
        return [name, [], text, length, *usual, 1, seed]

    examples = {
        label: partial(values_of, name, text, length, seed)
        for label, name, text, length, seed in EXAMPLES
        if name in catalogue.entries
    }
    with _form("Write", "The text appears here, then its passes.") as (out, _):
        with gr.Row():
            buttons = [gr.Button(label, size="sm", min_width=90) for label in examples]
        model = _model(catalogue)
        text = gr.Textbox(
            "Once upon a time",
            label="Start, or a text with blanks",
            placeholder="empty: from the title on · the old _ lived by the sea",
            info=f"{ONE_EACH}. Enter writes, Shift+Enter begins a line. "
            "Click a word of the result to see other words for it.",
            lines=2,
            max_lines=6,
        )
        ask = _buttons("Write")
        with gr.Accordion("More: length, temperature, a second model", open=False):
            # a list of at most one can be emptied
            beside = gr.Dropdown(
                catalogue.choices,
                value=[],
                label="Compare with a second model",
                multiselect=True,
                max_choices=1,
            )
            length = gr.Slider(8, values.TOKENS, 160, step=8, label="Length in tokens")
            temperature = _temperature(catalogue, model)
            words = (
                "0.9 keeps the likeliest tokens that make up 90 %. A text with blanks keeps all."
            )
            top_p = _usual(catalogue.top_p, model, 1.0, "Top-p", words)
            with gr.Row():
                num = _number("Samples", 1)
                seed = _number("Seed", 0)
        inputs = [model, beside, text, length, temperature, top_p, num, seed]

        def asked_for(visitor: gr.Request) -> list[values.Value]:
            first = [*examples.values(), partial(values_of, catalogue.models[0], "", 96)][0]
            asked = dict(visitor.query_params)
            found = values.from_address(asked, first(), catalogue.models)
            if asked.get("model", found[0]) != found[0]:
                gr.Warning(f"This page has no model of the link's name: {found[0]} writes instead.")
            return found

        events = [text.submit, _quick(arrival, asked_for, None, inputs).then]
        for button, example in zip(buttons, examples.values(), strict=True):
            events.append(_quick(button.click, example, None, inputs).then)
        _ask(ask, partial(write, catalogue), inputs, out, events)
        # studio.js writes a model and a text with a gap for a word, clicks, and shows the answer
        # at the word
        writer = gr.Textbox(elem_id="st-writer", container=False, show_label=False)
        gap = gr.Textbox(elem_id="st-gap", container=False, show_label=False)
        click = gr.Button("offer", elem_id="st-offer")
        answer = gr.HTML(elem_id="st-answer", apply_default_css=False)
        _ask(ask._replace(go=click, last={}), partial(offer, catalogue), [writer, gap], answer, [])


def _infill(catalogue: Catalogue) -> None:
    with _form("Infill", "Candidates appear here, with their weights.") as (out, arrival):
        model = _model(catalogue, of_words=True)
        text = gr.Textbox(
            GAPS if catalogue.fills_gaps(model.value) else BLANKS,
            label="Text with blanks",
            info=f"{ONE_EACH}. [...] is a gap of one to eight tokens. "
            "The model reads the text after it, too.",
            lines=3,
            max_lines=8,
        )
        ask = _buttons("Fill in")
        with gr.Accordion("More: tries, particles, temperature", open=False):
            tries = gr.Slider(
                1, values.TRIES, 6, step=1, label="Tries", info="Texts that are drawn and compared."
            )
            particles = gr.Slider(
                1,
                values.PARTICLES,
                16,
                step=1,
                label="Particles in each try",
                info="Candidates from which a try chooses the one that suits the text after a "
                "blank. More fit better, and take longer.",
            )
            temperature = _temperature(catalogue, model)
            seed = _number("Seed", 0)
        inputs = [model, text, tries, particles, temperature, seed]
        _ask(ask, partial(infill, catalogue), inputs, out, [text.submit], arrival)


def _edit(catalogue: Catalogue) -> None:
    with _form("Edit", "The edit appears here, below the original.") as (out, arrival):
        model = _model(catalogue, of_words=True)
        text = gr.Textbox(label="Text", value=SENTENCE, lines=3, max_lines=8)
        num = gr.Slider(1, values.SAMPLES, 3, step=1, label="Edits")
        seed = _number("Seed", 2)
        # one output, whichever tab has asked for it
        stop = gr.Button("Stop", min_width=80, elem_classes="st-stop", render=False)
        last: dict[str | None, object] = {}
        with gr.Tab("Rewrite"):
            words = gr.Textbox(
                "a golden apple",
                label="Words to rewrite",
                info="Whole words, separated by commas. The rest is kept.",
            )
            inputs = [model, text, words, num, seed]
            ask = Buttons(gr.Button("Rewrite", variant="primary"), stop, last)
            _ask(ask, partial(rewrite, catalogue), inputs, out, [words.submit], arrival)
        with gr.Tab("Words"):
            share = _strength("Share of the words that are resampled.", 0.2)
            inputs = [model, text, gr.State(WORDS), share, num, seed]
            ask = Buttons(gr.Button("Resample", variant="primary"), stop, last)
            _ask(ask, partial(change, catalogue), inputs, out, [share.release])
        with gr.Tab("Level (for experts)"):
            share = _strength(
                "How far the points move: 0 keeps the text, 1 forgets it. Beyond a little the "
                "text falls apart.",
                0.05,
            )
            state = gr.Radio(
                KINDS[1:],
                value=KINDS[1],
                label="What is changed",
                info="The model reads every token as a point in space, the latents, and maps them "
                "to noise. Points that are moved a little lie between the codes of tokens, and "
                "may be read as others.",
            )
            inputs = [model, text, state, share, num, seed]
            ask = Buttons(gr.Button("Re-noise", variant="primary"), stop, last)
            _ask(ask, partial(change, catalogue), inputs, out, [share.release])
        stop.render()


def _score(catalogue: Catalogue) -> None:
    with _form("Score", "The bits of every token appear here.") as (out, arrival):
        models = gr.Dropdown(
            catalogue.choices,
            value=catalogue.pair,
            label="Models",
            multiselect=True,
            max_choices=MODELS,
        )
        text = gr.Textbox(label="Text", value=TALE, lines=4, max_lines=12)
        ask = _buttons("Score")
        _ask(ask, partial(compare, catalogue), [models, text], out, [text.submit], arrival)


def _runs(catalogue: Catalogue, arrival: Event) -> None:
    names = catalogue.runs
    with gr.Tab("Runs"):
        with gr.Row(visible=bool(names)) as row:
            chosen = gr.CheckboxGroup(names, value=names[:DRAWN], label="Runs")
        out = gr.HTML(apply_default_css=False)

    def look(names: list[str]) -> tuple[object, object, str]:
        catalogue.refresh()
        found = catalogue.runs
        left = [name for name in names if name in found]
        *_, shown = guarded(runs)(catalogue, left)
        # a run may have been removed; else the choice stays with the visitor, who may be clicking
        boxes = gr.CheckboxGroup(found) if left == names else gr.CheckboxGroup(found, value=left)
        return gr.Row(visible=bool(found)), boxes, shown

    for event in (arrival, gr.Timer(REFRESH).tick, chosen.change):
        _quick(event, look, [chosen], [row, chosen, out])


@contextmanager
def _form(tab: str, words: str) -> Iterator[tuple[Component, Event]]:
    """A tab with the fields of a view, and its output next to them, which shows `words` at first.

    Gives the output, and the event of opening the tab.
    """
    with gr.Tab(tab, elem_classes=f"st-{tab.lower()}") as opened, gr.Row():
        out = gr.HTML(page(card(muted(words))), apply_default_css=False, render=False)
        with gr.Column(scale=3):
            yield out, opened.select
        with gr.Column(scale=7):
            out.render()


def _model(catalogue: Catalogue, *, of_words: bool = False) -> Component:
    """The list of models, with a line about the chosen one: the first, or the first `of_words`."""

    def about(name: object) -> str:
        return div("st", muted(catalogue.about(name)))

    names = catalogue.models
    of_kind = [name for name in names if catalogue.entry(name).run.data.tokenizer.kind == "bpe"]
    first = of_kind[0] if of_words and of_kind else names[0]
    model = gr.Dropdown(catalogue.choices, value=first, label="Model", filterable=False)
    line = gr.HTML(about(first), apply_default_css=False, padding=False)
    _quick(model.change, about, model, line)
    return model


def _temperature(catalogue: Catalogue, model: Component) -> Component:
    words = "Lower is safer and repeats itself, higher surprises more."
    return _usual(catalogue.temperature, model, 1.5, "Temperature", words)


def _usual(
    usual: Callable[[object], float], model: Component, most: float, label: str, words: str
) -> Component:
    """A slider at the value that suits the model."""
    slider = gr.Slider(0.1, most, usual(model.value), step=0.05, label=label, info=words)
    _quick(model.input, usual, model, slider)
    return slider


def _number(label: str, value: int) -> Component:
    # without bounds: gradio's message would not name the field
    return gr.Number(value, label=label, precision=0, min_width=110)


def _strength(words: str, usual: float) -> Component:
    return gr.Slider(0.0, 1.0, usual, step=0.01, label="Strength", info=words)


class Buttons(NamedTuple):
    """Two buttons: one starts a view, one stops it."""

    go: Component
    stop: Component
    last: dict[str | None, object]
    """The last request of every visitor, for one output."""


def _buttons(words: str) -> Buttons:
    with gr.Row():
        go = gr.Button(words, variant="primary", min_width=120)
        return Buttons(go, gr.Button("Stop", min_width=80, elem_classes="st-stop"), {})


def _ask(
    ask: Buttons,
    view: View,
    inputs: list[Component],
    out: Component,
    events: list[Event],
    arrival: Event | None = None,
) -> None:
    """One button and the events call the view; the other button stops it.

    The `arrival` of a visitor who has asked for nothing yet calls it, too.
    """
    calls = [ask.go.click, *events] if arrival is None else [ask.go.click, *events, arrival]
    for event in calls:
        started = event(
            newest(guarded(view), ask.last, greets=event is arrival),
            inputs,
            out,
            trigger_mode="multiple",
            concurrency_id="model",
            concurrency_limit=WAITING,
            show_progress="hidden",
            api_visibility="private",
        )
        ask.stop.click(None, None, None, cancels=[started], api_visibility="private")


def newest(view: View, last: dict[str | None, object], *, greets: bool = False) -> View:
    """The view as a handler of events: a visitor's next request ends the `last` one.

    One that `greets` answers only those who have asked for nothing yet.
    """

    def handle(visitor: gr.Request, *given: object) -> Pages:
        if greets and visitor.session_hash in last:
            yield gr.skip()
            return
        last[visitor.session_hash] = mine = object()
        with closing(view(*given)) as pages:
            for html in pages:
                if last[visitor.session_hash] is not mine:
                    return
                yield html

    return handle
