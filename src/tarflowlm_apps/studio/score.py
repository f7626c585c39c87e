"""The view that scores: bits of every token, models side by side, blocks, passes of the text."""

from collections.abc import Mapping
from functools import partial

from torch import Generator, Tensor

from tarflowlm.data.prompts import read
from tarflowlm.editing.states import encode
from tarflowlm.evaluation.scores import Scores, score_texts
from tarflowlm.model import as_flow
from tarflowlm.requests import Score
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.terminal.tokens import Token, text_tokens, visible
from tarflowlm_apps.grid import div
from tarflowlm_apps.studio import pieces, values
from tarflowlm_apps.studio.catalogue import Catalogue
from tarflowlm_apps.studio.job import Job

MODELS = 2  # models that are compared
GAP = 2.0  # bits between two models, or around the mean of a block, that have the full colour
COLD, HOT = "var(--st-cold)", "var(--st-hot)"
SCALE = (
    '<span class="st-nowrap">0<span class="st-scale" style="background:linear-gradient(90deg,'
    f'transparent,color-mix(in srgb,{HOT} 75%,transparent))"></span>'
)
KEY = (
    "The stronger the colour of a token, the more it surprised the model. Point at one, tap it, or "
    "use the arrow keys."
)


def compare(catalogue: Catalogue, names: object, text: object) -> pieces.Pages:
    """The bits of every token of `text` under each of the models `names`."""
    wanted = names[:MODELS] if isinstance(names, list) and names else [names]
    shown = values.text(text)
    request = Score(text=shown)
    found: dict[str, Scores] = {}
    watched: list[str] = []
    seconds = 0.0
    so_far = pieces.unfinished([Token(visible(shown))])
    for name in wanted:
        job = Job(f"scoring with {name}")
        work = partial(_read, str(name), request, catalogue.load(name), job)
        found[str(name)], more = yield from job.follow(work, lambda: so_far)
        watched.append(more)
        seconds += job.seconds
    first, *others = (catalogue.entry(name).command_name for name in found)
    command = request.command(first)
    if others:
        command += ["--baseline", *others]
    # one scale for all, so that colours compare
    most = max(one.bits.abs().quantile(0.98).item() for one in found.values())
    scale = f"{KEY} {SCALE}{most:.1f} bits</span>"
    yield pieces.page(
        pieces.asked(command),
        div("st-muted", scale),
        div(
            "st-pair", *(_card(catalogue, name, one, request, most) for name, one in found.items())
        ),
        pieces.facts(pieces.took(seconds)),
        _difference(found),
        *watched,
        *(_blocks(name, one) for name, one in found.items()),
    )


def _read(name: str, request: Score, checkpoint: Checkpoint, job: Job) -> tuple[Scores, str]:
    """The score of the text under a model, and a card of its passes."""
    (scored,) = score_texts(request, checkpoint, job)
    return scored, _passes(name, read(checkpoint.tokenizer, scored.text).tokens, checkpoint)


def _card(catalogue: Catalogue, name: str, scored: Scores, request: Score, most: float) -> str:
    """The bits of every token under a model, and their sum."""
    sign = "≤ "
    kind = f"at most: an upper bound from {request.samples} samples"
    if scored.exact:
        sign = ""
        kind = "exact"
    numbers = pieces.facts(
        (f"{sign}{scored.bits_per_character:.3f}", "bits per character"),
        (f"{sign}{scored.total:.1f}", f"bits in all, {kind}"),
    )
    shown = heat(scored, scored.bits, most)
    notes = [] if scored.notice is None else [scored.notice]
    # every text is made of bytes
    if scored.rare and catalogue.entry(name).run.data.tokenizer.kind != "byte":
        rare = " ".join(scored.rare)
        notes.append(f"Hardly ever in the text that it learnt from, if at all: {rare}")
    return pieces.card(pieces.title(name), shown, *map(pieces.muted, notes), numbers)


def _difference(found: Mapping[str, Scores]) -> str:
    """Where the first of two models needs more or fewer bits, if both read the same tokens."""
    if len(found) < 2:
        return ""
    (first, one), (second, other) = found.items()
    if one.text != other.text:
        return pieces.muted(
            f"{first} and {second} read different texts: their bits do not compare."
        )
    if one.symbols != other.symbols:
        return ""
    shown = heat(one, one.bits - other.bits, GAP)
    key = f"Blue: {first} needs fewer bits than {second}. Orange: it needs more."
    return pieces.card(
        pieces.title(f"{first} against {second}"),
        shown,
        pieces.muted(f"{key} At {GAP:g} bits the colour is full."),
    )


def _blocks(name: str, scored: Scores) -> str:
    """log2 |det J| of every block of a flow at every token, around its mean."""
    blocks = scored.blocks
    if blocks is None or len(blocks) < 2:
        return ""
    rows = ""
    for block, row in enumerate(blocks, 1):
        words = f"block {block}: {row.mean().item():+.2f} bits per token"
        most = max(GAP, row.std(correction=0).item() * 2)
        body = heat(scored, row.mean() - row, most)
        rows += pieces.title(words) + body
    key = (
        "log2 |det J| of each block, around its mean over the text. Blue: the block made this "
        "token likelier than it made others. Orange: less likely."
    )
    return pieces.card(pieces.folded(f"For experts: the blocks of {name}", pieces.muted(key), rows))


def _passes(name: str, tokens: Tensor, checkpoint: Checkpoint) -> str:
    """The passes by which several blocks of a flow write a text from its own noise, if they do."""
    if checkpoint.model.num_blocks < 2 or len(tokens) > checkpoint.model.config.context:
        return ""
    model = as_flow(checkpoint.model)
    encoded = encode(model, tokens[None], Generator().manual_seed(0))
    states = [state[0, : encoded.length] for state in encoded.states[::-1]]
    texts = [model.codebook.decode(state) for state in states]
    rows, is_watched = pieces.passes(model, checkpoint.tokenizer, texts, states)
    if not is_watched:
        return ""
    way = "The blocks turn this text into noise; from there each pass leads back to it."
    text = pieces.stage(text_tokens(tokens, checkpoint.tokenizer))
    return pieces.card(
        pieces.title(f"Passes of {name}"),
        text,
        pieces.slider(rows, "pass", pieces.BY_BLOCK, is_open=True),
        pieces.muted(way),
        pieces.key(model),
    )


def heat(scored: Scores, bits: Tensor, most: float) -> str:
    shown = scored.heat(bits, most, HOT, COLD)
    how = 'tabindex="0" role="group" aria-label="Bits of tokens: arrow keys tell them one by one"'
    # the line below is for fingers and keys, which cannot point
    return f'<div class="st-heat" {how}>{shown}</div><p class="st-muted" aria-live="polite"></p>'
