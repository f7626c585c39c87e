"""The layout of the page: one tab per view, in Gradio. The views themselves are in modules without
Gradio.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import gradio as gr

from tarflowlm.studio import request
from tarflowlm.studio.catalogue import AXES, Catalogue, runs
from tarflowlm.studio.edit import TARGETS, WORDS, replace_words, rewrite
from tarflowlm.studio.pieces import card, guarded, muted, page
from tarflowlm.studio.score import MODELS, compare
from tarflowlm.studio.write import TRIES, infill, write

# gradio's classes cannot be named in annotations that tests check
Blocks = Any
Component = Any
Buttons = tuple[Component, Component]
View = Callable[..., Iterator[str]]
Closable = Callable[..., Generator[str, None, None]]

TITLE = "tarflowlm studio"
WAITING = 16  # requests that may wait for their turn; further ones are refused
REFRESH = 4.0  # seconds between two looks at the metrics of runs

PRIVATE = {"show_progress": "hidden", "api_visibility": "private"}
# settings of events that need no model, and so wait for none, and of those that do: they wait for
# each other in `job`
LOOK = {"concurrency_id": "runs", "concurrency_limit": 2, **PRIVATE}
WORK = {"concurrency_id": "model", "concurrency_limit": WAITING, **PRIVATE}

EXAMPLES = (
    ("Watch the passes", "english-passes", "", 96),
    ("Continue a sentence", "english-small", "The people of", 160),
    ("Fill in blanks", "english-small", "The _ of the _ _ was heard in the city of Washington", 96),
)
"""What their buttons say, model, text and length; a visitor is shown the first one."""
ONE_EACH = "Every _ is one token that the model chooses"
SENTENCE = "The people of this country have a right to peace and to work."
HISTORY = "The war of the nations had come to an end, and the President asked the Congress to make a lasting peace."


def build(catalogue: Catalogue) -> Blocks:
    """The page about the models and runs of `catalogue`."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        head = f"{TITLE}<span>noise becomes latents, latents become text</span>"
        gr.HTML(f'<div class="st"><div class="st-head">{head}</div></div>', apply_default_css=False)
        with gr.Tab("Write"), gr.Row(equal_height=False):
            arrive = _write(catalogue)
        for name, view in {"Infill": _infill, "Edit": _edit, "Score": _score}.items():
            with gr.Tab(name), gr.Row(equal_height=False):
                view(catalogue)
        with gr.Tab("Runs"):
            _runs(catalogue)
        arrive(blocks.load)
    # nothing may be called past the queue
    blocks.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    return blocks


def _write(catalogue: Catalogue) -> Callable[[Any], None]:
    """The view that writes. Returns what binds an arrival to it: the request in the address, or the
    first example.
    """
    examples = [example for example in EXAMPLES if example[1] in catalogue.places]
    with gr.Column(scale=3, min_width=300):
        with gr.Row():
            buttons = [gr.Button(words, size="sm", min_width=90) for words, *_ in examples]
        model = _model(catalogue)
        label, info = "Start, or a text with blanks", f"{ONE_EACH}. Shift+Enter writes."
        hint = "empty: from nothing · the people of the _ in peace"
        text = gr.Textbox(
            "The people of", label=label, placeholder=hint, info=info, lines=2, max_lines=6
        )
        length = gr.Slider(8, request.TOKENS, 160, step=8, label="Length in tokens")
        temperature = _temperature(catalogue, model)
        top_p = gr.Slider(0.1, 1.0, 1.0, step=0.05, label="Top-p")
        with gr.Row():
            num, seed = _number("Samples", 1), _number("Seed", 0)
        go = _buttons("Write")
    out = _output("The text appears here, then its passes.")
    inputs = [model, text, length, temperature, top_p, num, seed]
    answer = _bind(go, write, catalogue, inputs, out, text.submit)

    def values_of(name: str, start: str, tokens: int) -> list[Any]:
        return [name, start, tokens, catalogue.configs[name].temperature, 1.0, 1, 0]

    def arrival(asked: gr.Request) -> list[Any]:
        usual = values_of(*(examples[0][1:] if examples else (catalogue.models[0], "", 96)))
        return request.from_address(dict(asked.query_params), usual, catalogue.models)

    for button, example in zip(buttons, examples, strict=True):
        answer(button.click(partial(values_of, *example[1:]), None, inputs, **LOOK).then)
    return lambda event: answer(event(arrival, None, inputs, **LOOK).then)


def _infill(catalogue: Catalogue) -> None:
    with gr.Column(scale=3, min_width=300):
        model = _model(catalogue)
        value, info = (
            "The people of the _ _ in the _ of peace",
            f"{ONE_EACH}, with regard to both sides.",
        )
        text = gr.Textbox(value, label="Text with blanks", info=info, lines=3, max_lines=8)
        tries, particles = _tries()
        temperature, seed = _temperature(catalogue, model), _number("Seed", 0)
        buttons = _buttons("Fill in")
    out = _output("Candidates appear here, with their weights.")
    _bind(
        buttons,
        infill,
        catalogue,
        [model, text, tries, particles, temperature, seed],
        out,
        text.submit,
    )


def _edit(catalogue: Catalogue) -> None:
    with gr.Column(scale=3, min_width=300):
        model = _model(catalogue)
        text = gr.Textbox(label="Text", value=SENTENCE, lines=3, max_lines=8)
        seed = _number("Seed", 0)
        with gr.Tab("Replace"):
            words = gr.Textbox(
                "peace, work",
                label="Words to replace",
                info="Separated by commas. The rest is kept.",
            )
            tries, particles = _tries()
            replacing = _buttons("Replace")
        with gr.Tab("Rewrite"):
            strength = gr.Slider(
                0.0, 1.0, 0.2, step=0.05, label="Strength", info="0 keeps the text, 1 forgets it."
            )
            target = _target()
            num = gr.Slider(1, request.SAMPLES, 3, step=1, label="Edits")
            rewriting = _buttons("Rewrite")
    out = _output("The edit appears here, beside the original.")
    _bind(replacing, replace_words, catalogue, [model, text, words, tries, particles, seed], out)
    _bind(
        rewriting,
        rewrite,
        catalogue,
        [model, text, target, strength, num, seed],
        out,
        strength.release,
    )


def _score(catalogue: Catalogue) -> None:
    with gr.Column(scale=3, min_width=300):
        several = {"multiselect": True, "max_choices": MODELS}
        models = gr.Dropdown(catalogue.models, value=catalogue.pair, label="Models", **several)
        text = gr.Textbox(label="Text", value=HISTORY, lines=4, max_lines=12)
        buttons = _buttons("Score")
    out = _output("The bits of every token appear here.")
    _bind(buttons, compare, catalogue, [models, text], out, text.submit)


def _runs(catalogue: Catalogue) -> None:
    names = catalogue.runs
    with gr.Row(equal_height=False):
        chosen = gr.CheckboxGroup(
            names, value=names[:6], label="Runs", scale=4, visible=bool(names)
        )
        axis = gr.Radio(
            list(AXES), value=AXES[0], label="Over", scale=1, min_width=200, visible=bool(names)
        )

    def shown(*values: Any) -> str:
        *_, final = guarded(runs)(catalogue, *values)
        return final

    out = gr.HTML(value=shown(names[:6], AXES[0]), apply_default_css=False)
    if names:
        for event in (chosen.change, axis.change, gr.Timer(REFRESH).tick):
            event(shown, [chosen, axis], out, **LOOK)


def _model(catalogue: Catalogue) -> Component:
    """The list of models, with a line about the chosen one."""

    def about(name: object) -> str:
        return f'<div class="st">{muted(catalogue.about(name))}</div>'

    model = gr.Dropdown(
        catalogue.models, value=catalogue.models[0], label="Model", filterable=False
    )
    line = gr.HTML(about(model.value), apply_default_css=False, padding=False)
    model.change(about, model, line, **LOOK)
    return model


def _temperature(catalogue: Catalogue, model: Component) -> Component:
    """A slider at the temperature of the model's configuration; choosing a model resets it."""

    def suited(name: object) -> float:
        return (
            catalogue.configs[name].temperature
            if isinstance(name, str) and name in catalogue.configs
            else 1.0
        )

    slider = gr.Slider(0.1, 1.5, suited(model.value), step=0.05, label="Temperature")
    model.input(suited, model, slider, **LOOK)
    return slider


def _number(label: str, value: int) -> Component:
    # without bounds: gradio's message would not name the field
    return gr.Number(value, label=label, precision=0, min_width=110)


def _target() -> Component:
    return gr.Radio(list(TARGETS), value=WORDS, label="What is changed", info="Words work best.")


def _tries() -> tuple[Component, Component]:
    tries = gr.Slider(1, TRIES, 6, step=1, label="Tries")
    return tries, gr.Slider(1, request.PARTICLES, 16, step=1, label="Particles in each try")


def _buttons(words: str) -> Buttons:
    with gr.Row():
        return gr.Button(words, variant="primary", min_width=120), gr.Button("Stop", min_width=80)


def _output(words: str) -> Component:
    with gr.Column(scale=7, min_width=320):
        return gr.HTML(value=page(card(muted(words))), apply_default_css=False)


def _bind(
    buttons: Buttons,
    view: View,
    catalogue: Catalogue,
    inputs: list[Component],
    out: Component,
    *also: Any,
) -> Callable[[Any], None]:
    """Call the view at a click on the first button, or at the events `also`, until a click on the
    second one. Returns what binds it to one more event.
    """
    go, stop = buttons
    handle = newest(partial(guarded(view), catalogue))

    def bind(event: Any) -> None:
        started = event(handle, inputs, out, trigger_mode="multiple", **WORK)
        stop.click(None, None, None, cancels=[started], api_visibility="private")

    for event in (go.click, *also):
        bind(event)
    return bind


def newest(view: Closable) -> Closable:
    """The view as a handler of events: a visitor's next request ends the one before."""
    last: dict[str | None, object] = {}

    def handle(visitor: gr.Request, *values: Any) -> Generator[str, None, None]:
        last[visitor.session_hash] = mine = object()
        with closing(view(*values)) as pages:
            for html in pages:
                if last[visitor.session_hash] is not mine:
                    return
                yield html

    return handle
