"""The layout of the page: one tab per view, in Gradio. The views are in modules without it."""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import gradio as gr

from tarflowlm.studio import values
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.edit import STATES, renoise, resample, rewrite
from tarflowlm.studio.pieces import Pages, card, guarded, muted, page
from tarflowlm.studio.runs import runs
from tarflowlm.studio.score import MODELS, compare
from tarflowlm.studio.write import infill, write
from tarflowlm.views.curves import AXES

# gradio's classes cannot be named in annotations that tests check
Component = Any
Event = Callable[..., Any]
View = Callable[..., Pages]

TITLE = "tarflowlm studio"
WAITING = 16  # requests that may wait for their turn; further ones are refused
REFRESH = 4.0  # seconds between two looks at the folders of runs
DRAWN = 6  # runs that are drawn at first

EXAMPLES = (
    ("Watch the passes", "english-passes", "", 96),
    ("Continue a sentence", "english-small", "The people of", 160),
    ("Fill in blanks", "english-small", "The _ of the _ _ was heard in the city of Washington", 96),
)
"""Label, model, text and length of each example; a visitor is shown the first one."""
ONE_EACH = "Every _ is one token that the model chooses"
SENTENCE = "The people of this country have a right to peace and to work."
HISTORY = (
    "The war of the nations had come to an end, and the President asked the Congress to make a "
    "lasting peace."
)


def build(catalogue: Catalogue) -> Component:
    """The page about the models and runs of `catalogue`."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        head = f"{TITLE}<span>noise becomes latents, latents become text</span>"
        gr.HTML(f'<div class="st"><div class="st-head">{head}</div></div>', apply_default_css=False)
        with gr.Tab("Write"), gr.Row(equal_height=False):
            _write(catalogue, blocks.load)
        for name, view in (("Infill", _infill), ("Edit", _edit), ("Score", _score)):
            with gr.Tab(name), gr.Row(equal_height=False):
                view(catalogue)
        with gr.Tab("Runs"):
            _runs(catalogue, blocks.load)
        lists = [block for block in blocks.blocks.values() if isinstance(block, gr.Dropdown)]

        def offer() -> list[object]:
            catalogue.refresh()
            return [gr.Dropdown(catalogue.models) for _ in lists]

        _quick(blocks.load, offer, None, lists)
    # nothing may be called past the queue
    blocks.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    return blocks


def _quick(event: Event, function: Callable[..., object], inputs: object, outputs: object) -> Any:
    """Bind what needs no model, and so waits for none."""
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
    """The view that writes; at first what the address asks for, or the first example."""
    examples = [example for example in EXAMPLES if example[1] in catalogue.entries]
    with gr.Column(scale=3, min_width=300):
        with gr.Row():
            buttons = [gr.Button(words, size="sm", min_width=90) for words, *_ in examples]
        model = _model(catalogue, catalogue.models[0])
        text = gr.Textbox(
            "The people of",
            label="Start, or a text with blanks",
            placeholder="empty: from nothing · the people of the _ in peace",
            info=f"{ONE_EACH}. Shift+Enter writes.",
            lines=2,
            max_lines=6,
        )
        length = gr.Slider(8, values.TOKENS, 160, step=8, label="Length in tokens")
        temperature = _temperature(catalogue, model)
        top_p = gr.Slider(0.1, 1.0, 1.0, step=0.05, label="Top-p")
        with gr.Row():
            num = _number("Samples", 1)
            seed = _number("Seed", 0)
        go = _buttons("Write")
    out = _output("The text appears here, then its passes.")
    inputs = [model, text, length, temperature, top_p, num, seed]
    answer = _bind(go, write, catalogue, inputs, out, text.submit)

    def values_of(name: str, start: str, tokens: int) -> list[str | int | float]:
        return [name, start, tokens, catalogue.temperature(name), 1.0, 1, 0]

    def asked_for(visitor: gr.Request) -> list[str | int | float]:
        usual = values_of(*(examples[0][1:] if examples else (catalogue.models[0], "", 96)))
        return values.from_address(dict(visitor.query_params), usual, catalogue.models)

    for button, (_, name, start, tokens) in zip(buttons, examples, strict=True):
        example = partial(values_of, name, start, tokens)
        answer(_quick(button.click, example, None, inputs).then)
    answer(_quick(arrival, asked_for, None, inputs).then)


def _infill(catalogue: Catalogue) -> None:
    with gr.Column(scale=3, min_width=300):
        model = _model(catalogue, catalogue.word_model)
        text = gr.Textbox(
            "The people of the _ _ in the _ of peace",
            label="Text with blanks",
            info=f"{ONE_EACH}, with regard to both sides.",
            lines=3,
            max_lines=8,
        )
        tries = gr.Slider(1, values.TRIES, 6, step=1, label="Tries")
        particles = gr.Slider(1, values.PARTICLES, 16, step=1, label="Particles in each try")
        temperature = _temperature(catalogue, model)
        seed = _number("Seed", 0)
        go = _buttons("Fill in")
    out = _output("Candidates appear here, with their weights.")
    inputs = [model, text, tries, particles, temperature, seed]
    _bind(go, infill, catalogue, inputs, out, text.submit)


def _edit(catalogue: Catalogue) -> None:
    with gr.Column(scale=3, min_width=300):
        model = _model(catalogue, catalogue.word_model)
        text = gr.Textbox(label="Text", value=SENTENCE, lines=3, max_lines=8)
        num = gr.Slider(1, values.SAMPLES, 3, step=1, label="Edits")
        seed = _number("Seed", 0)
        with gr.Tab("Rewrite"):
            named = gr.Textbox(
                "peace, work",
                label="Words to rewrite",
                info="Separated by commas. The rest is kept.",
            )
            go_named = _buttons("Rewrite")
        with gr.Tab("Words"):
            share = _strength("Share of the words that are resampled.")
            go_words = _buttons("Resample")
        with gr.Tab("Level"):
            change = _strength("0 keeps the text, 1 forgets it.")
            state = gr.Radio(list(STATES), value=STATES[0], label="What is changed")
            go_level = _buttons("Re-noise")
    out = _output("The edit appears here, below the original.")
    common = [num, seed]
    _bind(go_named, rewrite, catalogue, [model, text, named, *common], out, named.submit)
    _bind(go_words, resample, catalogue, [model, text, share, *common], out, share.release)
    _bind(go_level, renoise, catalogue, [model, text, state, change, *common], out, change.release)


def _score(catalogue: Catalogue) -> None:
    with gr.Column(scale=3, min_width=300):
        models = gr.Dropdown(
            catalogue.models,
            value=catalogue.pair,
            label="Models",
            multiselect=True,
            max_choices=MODELS,
        )
        text = gr.Textbox(label="Text", value=HISTORY, lines=4, max_lines=12)
        go = _buttons("Score")
    out = _output("The bits of every token appear here.")
    _bind(go, compare, catalogue, [models, text], out, text.submit)


def _runs(catalogue: Catalogue, arrival: Event) -> None:
    """The view of runs, which looks at the folders on arrival and now and then."""
    names = catalogue.runs
    with gr.Row(equal_height=False, visible=bool(names)) as row:
        chosen = gr.CheckboxGroup(names, value=names[:DRAWN], label="Runs", scale=4)
        axis = gr.Radio(list(AXES), value=AXES[0], label="Over", scale=1, min_width=200)
    out = gr.HTML(apply_default_css=False)

    def shown(names: object, axis: object) -> str:
        *_, final = guarded(runs)(catalogue, names, axis)
        return final

    def look(names: object, axis: object) -> tuple[object, object, str]:
        catalogue.refresh()
        found = catalogue.runs
        return gr.Row(visible=bool(found)), gr.CheckboxGroup(found), shown(names, axis)

    for event in (chosen.change, axis.change):
        _quick(event, shown, [chosen, axis], out)
    for event in (arrival, gr.Timer(REFRESH).tick):
        _quick(event, look, [chosen, axis], [row, chosen, out])


def _model(catalogue: Catalogue, name: str) -> Component:
    """The list of models, with a line about the chosen one."""

    def about(name: object) -> str:
        return f'<div class="st">{muted(catalogue.about(name))}</div>'

    model = gr.Dropdown(catalogue.models, value=name, label="Model", filterable=False)
    line = gr.HTML(about(name), apply_default_css=False, padding=False)
    _quick(model.change, about, model, line)
    return model


def _temperature(catalogue: Catalogue, model: Component) -> Component:
    """A slider at the temperature of the model's configuration; choosing a model resets it."""
    usual = catalogue.temperature(model.value)
    slider = gr.Slider(0.1, 1.5, usual, step=0.05, label="Temperature")
    _quick(model.input, catalogue.temperature, model, slider)
    return slider


def _number(label: str, value: int) -> Component:
    # without bounds: gradio's message would not name the field
    return gr.Number(value, label=label, precision=0, min_width=110)


def _strength(words: str) -> Component:
    return gr.Slider(0.0, 1.0, 0.2, step=0.05, label="Strength", info=words)


def _buttons(words: str) -> tuple[Component, Component]:
    with gr.Row():
        go = gr.Button(words, variant="primary", min_width=120)
        stop = gr.Button("Stop", min_width=80)
    return go, stop


def _output(words: str) -> Component:
    with gr.Column(scale=7, min_width=320):
        return gr.HTML(value=page(card(muted(words))), apply_default_css=False)


def _bind(
    buttons: tuple[Component, Component],
    view: View,
    catalogue: Catalogue,
    inputs: list[Component],
    out: Component,
    also: Event,
) -> Callable[[Event], None]:
    """Call the view at a click on the first button, or at the event `also`.

    A click on the second button ends it. Returns what binds the view to one more event.
    """
    go, stop = buttons
    handle = newest(partial(guarded(view), catalogue))

    def bind(event: Event) -> None:
        started = event(
            handle,
            inputs,
            out,
            trigger_mode="multiple",
            concurrency_id="model",
            concurrency_limit=WAITING,
            show_progress="hidden",
            api_visibility="private",
        )
        stop.click(None, None, None, cancels=[started], api_visibility="private")

    bind(go.click)
    bind(also)
    return bind


def newest(view: View) -> View:
    """The view as a handler of events: a visitor's next request ends the one before."""
    last: dict[str | None, object] = {}

    def handle(visitor: gr.Request, *given: object) -> Pages:
        last[visitor.session_hash] = mine = object()
        with closing(view(*given)) as pages:
            for html in pages:
                if last[visitor.session_hash] is not mine:
                    return
                yield html

    return handle
