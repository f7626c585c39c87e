"""The layout of the page in Gradio: one tab per view."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

import gradio as gr

from tarflowlm_apps.grid import div
from tarflowlm_apps.studio import values
from tarflowlm_apps.studio.catalogue import Catalogue
from tarflowlm_apps.studio.edit import KINDS, WORDS, change, exchange, rewrite
from tarflowlm_apps.studio.pieces import Pages, card, guarded, muted, page
from tarflowlm_apps.studio.refusals import Blocks
from tarflowlm_apps.studio.runs import runs
from tarflowlm_apps.studio.score import MODELS, compare
from tarflowlm_apps.studio.write import infill, offer, write

# gradio's classes cannot be named in annotations that tests check
Component = Any
Event = Callable[..., Any]
View = Callable[..., Pages]

TITLE = "tarflowlm studio"
HEADING = div(
    "st",
    f'<h1 class="st-head">{TITLE} <span>watch a small language model write</span></h1>',
    # studio.js tells screen readers here what the page is doing
    '<p id="st-status" class="st-unseen" role="status"></p>',
)
WAITING = 64  # requests that may wait for their turn; further ones are refused
REFRESH = 4.0  # seconds between two looks at the folders of runs
DRAWN = 6  # runs that are drawn at first

EXAMPLES = (
    # a story that comes to its end
    ("Begin a story", "stories", "One day, Ben", 256, 4),
    # a text in which block 1 fills in all of eight gaps
    ("Watch passes", "english-passes", "one day the king ", 128, 24),
    ("Fill in blanks", "stories", "The little _ sat by the _ and gave the _ a hug.", 96, 0),
)
"""Label, model, text, length and seed of each; the page begins with the first."""
ONE_EACH = "Put _ where the model should choose one token: a word, a part of one, or a letter"
GAPS = "One day, Lily found [...] in the garden. She wanted to [...] with it."
BLANKS = "the old ____ lived in the ______ by the sea"
SENTENCE = "Tom had a red ball. He loved his red ball."
STORY = (
    "Once upon a time, there was a little girl named Lily. She had a small dog, and the dog was "
    "so kind that the birds sat on his nose."
)


def build(catalogue: Catalogue) -> Component:
    """The page about the models and runs of `catalogue`."""
    with Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(HEADING, apply_default_css=False)
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
        return [name, [], text, length, *usual, 1, seed, "", ""]

    examples = {
        label: partial(values_of, name, text, length, seed)
        for label, name, text, length, seed in EXAMPLES
        if name in catalogue.entries
    }
    first = [*examples.values(), partial(values_of, catalogue.models[0], "", 96)][0]
    shown = dict(zip(values.LINKED, first(), strict=True))
    with _form("Write", "The text appears here, then its passes.") as (out, _):
        with gr.Row():
            buttons = [gr.Button(label, size="sm", min_width=90) for label in examples]
        model = _model(catalogue, shown["model"])
        text = gr.Textbox(
            shown["text"],
            label="Start, or a text with blanks",
            placeholder="empty: from the title on · the old _ lived by the sea",
            info=f"{ONE_EACH}. Enter writes, Shift+Enter begins a line. "
            "Click a word of the result to see other words for it.",
            lines=2,
            max_lines=6,
        )
        ask = _buttons("Write")
        with gr.Accordion("More: words, length, temperature", open=False):
            contains = gr.Textbox(
                label="Words that must appear",
                placeholder="wolf, bright moon",
                info="After the start, in any order, with commas between them.",
                max_lines=1,
            )
            without = gr.Textbox(
                label="Words or letters that must not appear",
                placeholder="king, q",
                info="With commas between them. The start may have them.",
                max_lines=1,
            )
            # a list of at most one can be emptied
            beside = gr.Dropdown(
                catalogue.choices,
                value=[],
                label="Compare with a second model",
                multiselect=True,
                max_choices=1,
            )
            length = gr.Slider(8, values.TOKENS, shown["length"], step=8, label="Length in tokens")
            temperature = _temperature(catalogue, model)
            words = (
                "0.9 keeps the likeliest tokens that make up 90 %. A text with blanks keeps all."
            )
            top_p = _usual(catalogue.top_p, model, 1.0, "Top-p", words)
            with gr.Row():
                num = _number("Samples", 1)
                seed = _number("Seed", 0)
        inputs = [model, beside, text, length, temperature, top_p, num, seed, contains, without]

        def asked_for(visitor: gr.Request) -> list[values.Value]:
            asked = dict(visitor.query_params)
            found = values.from_address(asked, first(), catalogue.models)
            if asked.get("model", found[0]) != found[0]:
                gr.Warning(f"This page has no model of the link's name: {found[0]} writes instead.")
            return found

        exact = [_quick(arrival, asked_for, None, inputs).then]
        for button, example in zip(buttons, examples.values(), strict=True):
            exact.append(_quick(button.click, example, None, inputs).then)
        _ask(ask, partial(write, catalogue), inputs, out, [text.submit], exact, seed=seed)
        # studio.js writes a model and a text with a gap for a word, clicks, and shows the answer
        # at the word
        writer = gr.Textbox(elem_id="st-writer", container=False, show_label=False)
        gap = gr.Textbox(elem_id="st-gap", container=False, show_label=False)
        click = gr.Button("offer", elem_id="st-offer")
        answer = gr.HTML(elem_id="st-answer", apply_default_css=False)
        others = ask._replace(go=click, another=None, last={})
        _ask(others, partial(offer, catalogue), [writer, gap], answer)


def _infill(catalogue: Catalogue) -> None:
    with _form("Infill", "Candidates appear here, with their weights.") as (out, arrival):
        model = _model(catalogue, _of_words(catalogue))
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
        asks = [text.submit]
        _ask(ask, partial(infill, catalogue), inputs, out, asks, arrival=arrival, seed=seed)


def _edit(catalogue: Catalogue) -> None:
    with _form("Edit", "The edit appears here, below the original.") as (out, arrival):
        model = _model(catalogue, _of_words(catalogue))
        text = gr.Textbox(label="Text", value=SENTENCE, lines=3, max_lines=8)
        num = gr.Slider(1, values.SAMPLES, 3, step=1, label="Edits")
        seed = _number("Seed", 2)
        # one output, whichever tab has asked for it
        last: Asked = {}
        with gr.Tab("Rewrite"):
            words = gr.Textbox(
                "a red ball",
                label="Words to rewrite",
                info="Whole words, separated by commas. The rest is kept.",
            )
            inputs = [model, text, words, num, seed]
            ask = _buttons("Rewrite", last)
            asks = [words.submit]
            _ask(ask, partial(rewrite, catalogue), inputs, out, asks, arrival=arrival, seed=seed)
        with gr.Tab("Replace"):
            with gr.Row():
                old = gr.Textbox("boy", label="Word", min_width=110)
                new = gr.Textbox("girl", label="Put in its place", min_width=110)
            around = gr.Slider(
                0,
                values.AROUND,
                1,
                step=1,
                label="Words around it that may change, too",
                info="So that the text reads well. 0 keeps all the rest.",
            )
            inputs = [model, text, old, new, around, num, seed]
            ask = _buttons("Replace", last)
            _ask(ask, partial(exchange, catalogue), inputs, out, [new.submit], seed=seed)
        with gr.Tab("Words"):
            share = _strength("Share of the words that are resampled.", 0.2)
            inputs = [model, text, gr.State(WORDS), share, num, seed]
            ask = _buttons("Resample", last)
            _ask(ask, partial(change, catalogue), inputs, out, [share.release], seed=seed)
        with gr.Tab("Level"):
            share = _strength(
                "How far the points move: 0 keeps the text, 1 forgets it. Beyond a little the "
                "text falls apart.",
                0.05,
            )
            state = gr.Radio(
                KINDS[1:],
                value=KINDS[1],
                label="What is changed",
                info="For experts: the model reads every token as a point in space, the latents, "
                "and maps them to noise. Points that are moved a little lie between the codes of "
                "tokens, and may be read as others.",
            )
            inputs = [model, text, state, share, num, seed]
            ask = _buttons("Re-noise", last)
            _ask(ask, partial(change, catalogue), inputs, out, [share.release], seed=seed)


def _score(catalogue: Catalogue) -> None:
    with _form("Score", "The bits of every token appear here.") as (out, arrival):
        models = gr.Dropdown(
            catalogue.choices,
            value=catalogue.pair,
            label="Models",
            multiselect=True,
            max_choices=MODELS,
        )
        text = gr.Textbox(label="Text", value=STORY, lines=4, max_lines=12)
        ask = _buttons("Score", has_seed=False)
        view = partial(compare, catalogue)
        _ask(ask, view, [models, text], out, [text.submit], arrival=arrival)


def _runs(catalogue: Catalogue, arrival: Event) -> None:
    names = catalogue.runs
    with gr.Tab("Runs"):
        with gr.Row(visible=bool(names)) as row:
            chosen = gr.CheckboxGroup(names, value=names[:DRAWN], label="Runs")
        out = gr.HTML(apply_default_css=False, padding=False)

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
        out = gr.HTML(
            page(card(muted(words))), apply_default_css=False, padding=False, render=False
        )
        with gr.Column(scale=3):
            yield out, opened.select
        with gr.Column(scale=7):
            out.render()


def _of_words(catalogue: Catalogue) -> str:
    """The first model that reads word pieces, or the first one."""
    names = catalogue.models
    of_kind = [name for name in names if catalogue.entry(name).run.data.tokenizer.kind == "bpe"]
    return [*of_kind, *names][0]


def _model(catalogue: Catalogue, name: object) -> Component:
    """The list of models, with a line about the chosen one, at first that of a name."""

    def about(name: object) -> str:
        return div("st st-about", muted(catalogue.about(name)))

    model = gr.Dropdown(catalogue.choices, value=name, label="Model", filterable=False)
    line = gr.HTML(about(name), apply_default_css=False, padding=False)
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


Asked = dict[str | None, tuple[object, ...]]
"""The last request of every visitor, for one output."""


class Buttons(NamedTuple):
    """Buttons around a view: one starts it, one stops it, and one asks for another result."""

    go: Component
    stop: Component
    another: Component | None
    """None for a view without a seed."""
    last: Asked


def _buttons(words: str, last: Asked | None = None, *, has_seed: bool = True) -> Buttons:
    # the page shows Stop while something runs, and Another while nothing does
    with gr.Row():
        go = gr.Button(words, variant="primary", min_width=120)
        another = (
            gr.Button("Another", min_width=80, elem_classes="st-another") if has_seed else None
        )
        stop = gr.Button("Stop", min_width=80, elem_classes="st-stop")
    return Buttons(go, stop, another, {} if last is None else last)


def _ask(
    ask: Buttons,
    view: View,
    inputs: list[Component],
    out: Component,
    events: Sequence[Event] = (),
    exact: Sequence[Event] = (),
    *,
    arrival: Event | None = None,
    seed: Component | None = None,
) -> None:
    """The buttons and the events call the view, and one button stops it.

    The `seed`, one of the inputs, counts up for another result, and for a request that is asked
    again, but not for the `exact` events. The `arrival` of a visitor who has asked for nothing yet
    calls the view, too.
    """
    calls = [ask.go.click, *events]
    if seed is not None and ask.another is not None:
        place = inputs.index(seed)
        counts = [(event, next_seed(place, ask.last)) for event in calls]
        counts.append((ask.another.click, next_seed(place)))
        calls = [_quick(event, count, inputs, seed).then for event, count in counts]
    calls += exact
    if arrival is not None:
        calls.append(arrival)
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


def next_seed(place: int, last: Asked | None = None) -> Callable[..., object]:
    """A handler that gives the seed after the one at a `place` of a request.

    With the `last` requests of visitors only for one that is asked again; else the given one.
    """

    def handle(visitor: gr.Request, *given: object) -> object:
        seed = given[place]
        is_again = last is None or last.get(visitor.session_hash) == given
        return seed + 1 if is_again and isinstance(seed, int) else seed

    return handle


def newest(view: View, last: Asked, *, greets: bool = False) -> View:
    """The view as a handler of events: a visitor's next request ends the `last` one.

    One that `greets` answers only those who have asked for nothing yet.
    """

    def handle(visitor: gr.Request, *given: object) -> Pages:
        if greets and visitor.session_hash in last:
            yield gr.skip()
            return
        last[visitor.session_hash] = given
        with closing(view(*given)) as pages:
            for html in pages:
                if last[visitor.session_hash] is not given:
                    return
                yield html

    return handle
