"""The layout of the page: one tab per view, in Gradio. What the views do is in modules without Gradio."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tarflowlm.studio import request
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.curves import AXES, runs
from tarflowlm.studio.edit import TARGETS, WORDS, blend, replace_words, rewrite
from tarflowlm.studio.infill import TRIES, infill
from tarflowlm.studio.pieces import card, guarded, muted, page
from tarflowlm.studio.score import MODELS, compare
from tarflowlm.studio.write import write

# gradio is optional, so its classes cannot be named in annotations that tests check
Blocks = Any
Component = Any

TITLE = "tarflowlm studio"
WAITING = 16
"""Requests that may wait for their turn; further ones are refused."""
REFRESH = 4.0
"""Seconds between two looks at the metrics of runs."""

# what needs no model waits for none
LOOK = {"concurrency_id": "runs", "concurrency_limit": 2, "show_progress": "hidden", "api_visibility": "private"}

SENTENCE = "The people of this country have a right to peace and to work."
HISTORY = "The war of the nations had come to an end, and the President asked the Congress to make a lasting peace."
OTHER = "a group of people who live in the north of the rive"


def build(catalogue: Catalogue) -> Blocks:
    """The page about the models and runs of `catalogue`."""
    import gradio as gr

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(
            f'<div class="st"><div class="st-head">{TITLE}<span>noise becomes latents, latents become text</span>'
            "</div></div>",
            apply_default_css=False,
        )
        for name, view in (
            ("Write", _write),
            ("Infill", _infill),
            ("Edit", _edit),
            ("Score", _score),
            ("Runs", _runs),
        ):
            with gr.Tab(name):
                view(catalogue)
    # nothing may be called past the queue, and all work of a model waits in one line
    blocks.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    return blocks


def _write(catalogue: Catalogue) -> None:
    import gradio as gr

    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            model = _model(catalogue.models)
            text = gr.Textbox(
                label="Start, or a text with blanks",
                value="The people of",
                placeholder="empty: from nothing · the people of the _ in peace",
                info="Every _ is one token that the model chooses.",
                lines=2,
                max_lines=6,
            )
            length = gr.Slider(8, request.TOKENS, 160, step=8, label="Length in tokens")
            temperature = _temperature(catalogue, model, 0.7)
            top_p = gr.Slider(0.1, 1.0, 1.0, step=0.05, label="Top-p")
            with gr.Row():
                num = gr.Number(1, label="Samples", precision=0, minimum=1, maximum=request.SAMPLES, min_width=110)
                seed = _seed()
            go, stop = _buttons("Write")
        with gr.Column(scale=7, min_width=320):
            out = _output("The text appears here, then how it came about.")
    _bind(go, stop, write, catalogue, [model, text, length, temperature, top_p, num, seed], out, also=[text.submit])


def _infill(catalogue: Catalogue) -> None:
    import gradio as gr

    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            model = _model(catalogue.models)
            text = gr.Textbox(
                label="Text with blanks",
                value="The people of the _ _ in the _ of peace",
                info="Every _ is one token that the model chooses, with regard to both sides.",
                lines=3,
                max_lines=8,
            )
            tries, particles = _tries()
            temperature = _temperature(catalogue, model, 0.6)
            seed = _seed()
            go, stop = _buttons("Fill in")
        with gr.Column(scale=7, min_width=320):
            out = _output("Candidates appear here, with their weights.")
    _bind(go, stop, infill, catalogue, [model, text, tries, particles, temperature, seed], out, also=[text.submit])


def _edit(catalogue: Catalogue) -> None:
    import gradio as gr

    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            model = _model(catalogue.models)
            text = gr.Textbox(label="Text", value=SENTENCE, lines=3, max_lines=8)
            seed = _seed()
            with gr.Tabs():
                with gr.Tab("Replace"):
                    words = gr.Textbox(
                        label="Words to replace", value="peace, work", info="Separated by commas. The rest is kept."
                    )
                    tries, particles = _tries()
                    replace, stop_replacing = _buttons("Replace")
                with gr.Tab("Rewrite"):
                    strength = gr.Slider(
                        0.0, 1.0, 0.2, step=0.05, label="Strength", info="0 keeps the text, 1 forgets it."
                    )
                    target = _target()
                    num = gr.Slider(1, request.SAMPLES, 3, step=1, label="Edits")
                    rewriting, stop_rewriting = _buttons("Rewrite")
                with gr.Tab("Blend"):
                    other = gr.Textbox(label="Other text", value=OTHER, lines=3, max_lines=8)
                    between = _target()
                    mix, stop_blending = _buttons("Blend")
        with gr.Column(scale=7, min_width=320):
            out = _output("The edit appears here, beside the original.")
    _bind(replace, stop_replacing, replace_words, catalogue, [model, text, words, tries, particles, seed], out)
    inputs = [model, text, target, strength, num, seed]
    _bind(rewriting, stop_rewriting, rewrite, catalogue, inputs, out, also=[strength.release])
    _bind(mix, stop_blending, blend, catalogue, [model, text, other, between, seed], out)


def _score(catalogue: Catalogue) -> None:
    import gradio as gr

    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            first = [*catalogue.flows[:1], *(name for name in catalogue.models if name in catalogue.baselines)]
            models = gr.Dropdown(
                catalogue.models,
                value=(first or catalogue.models)[:MODELS],
                multiselect=True,
                max_choices=MODELS,
                label="Models",
            )
            text = gr.Textbox(label="Text", value=HISTORY, lines=4, max_lines=12)
            go, stop = _buttons("Score")
        with gr.Column(scale=7, min_width=320):
            out = _output("The bits of every token appear here.")
    _bind(go, stop, compare, catalogue, [models, text], out, also=[text.submit])


def _runs(catalogue: Catalogue) -> None:
    import gradio as gr

    names = catalogue.runs
    with gr.Row(equal_height=False):
        chosen = gr.CheckboxGroup(names, value=names[:6], label="Runs", scale=4, visible=bool(names))
        axis = gr.Radio(list(AXES), value=AXES[0], label="Over", scale=1, min_width=200, visible=bool(names))
    view = _handler(runs, catalogue)
    out = gr.HTML(value=_last(view(names[:6], AXES[0])), apply_default_css=False)
    if not names:
        return
    inputs = [chosen, axis]
    for event in (chosen.change, axis.change, gr.Timer(REFRESH).tick):
        event(lambda *values: _last(view(*values)), inputs, out, **LOOK)


def _last(shown: Iterator[str]) -> str:
    *_, final = shown
    return final


def _model(names: Sequence[str]) -> Component:
    import gradio as gr

    return gr.Dropdown(list(names), value=next(iter(names), None), label="Model", filterable=False)


def _temperature(catalogue: Catalogue, model: Component, usual: float) -> Component:
    """A slider at `usual`, or at 1 for a model that is best drawn from as it is; choosing a model resets it."""
    import gradio as gr

    def suited(name: object) -> float:
        return usual if name in catalogue.weighing else 1.0

    slider = gr.Slider(0.1, 1.5, suited(model.value), step=0.05, label="Temperature")
    model.change(suited, model, slider, **LOOK)
    return slider


def _seed() -> Component:
    import gradio as gr

    return gr.Number(0, label="Seed", precision=0, minimum=0, min_width=110)


def _target() -> Component:
    import gradio as gr

    return gr.Radio(list(TARGETS), value=WORDS, label="What is changed", info="Words work best.")


def _tries() -> tuple[Component, Component]:
    import gradio as gr

    tries = gr.Slider(1, TRIES, 6, step=1, label="Tries")
    particles = gr.Slider(1, request.PARTICLES, 16, step=1, label="Particles in each try")
    return tries, particles


def _buttons(words: str) -> tuple[Component, Component]:
    import gradio as gr

    with gr.Row():
        go = gr.Button(words, variant="primary", min_width=120)
        stop = gr.Button("Stop", min_width=80)
    return go, stop


def _output(words: str) -> Component:
    import gradio as gr

    return gr.HTML(value=page(card(muted(words))), apply_default_css=False)


def _handler(view: Callable[..., Iterator[str]], catalogue: Catalogue) -> Callable[..., Iterator[str]]:
    safe = guarded(view)

    def handle(*values: Any) -> Iterator[str]:
        yield from safe(catalogue, *values)

    return handle


def _bind(
    go: Component,
    stop: Component,
    view: Callable[..., Iterator[str]],
    catalogue: Catalogue,
    inputs: list[Component],
    out: Component,
    *,
    also: Sequence[Callable[..., Any]] = (),
) -> None:
    """Call the view at a click on `go`, or at the events `also`, until a click on `stop`."""
    settings = {
        "concurrency_id": "model",
        "concurrency_limit": 1,
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    handler = _handler(view, catalogue)
    started = [event(handler, inputs, out, **settings) for event in (go.click, *also)]
    stop.click(None, None, None, cancels=started, api_visibility="private")
