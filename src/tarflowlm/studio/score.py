"""The view that scores: the bits of every token, models side by side, the part of every block."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape

from tarflowlm.data import Tokenizer
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.studio import values
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.job import Job
from tarflowlm.studio.pieces import asked, bar, card, facts, muted, page, title, took
from tarflowlm.texts import Score, Scored
from tarflowlm.views.grid import symbols

MODELS = 2  # models that are compared
GAP = 2.0  # bits between two models, or around the mean of a block, that are shown in full colour
COLD, HOT = "var(--st-blue)", "var(--st-warm)"
SCALE = (
    '0<span class="st-scale" style="background:linear-gradient(90deg,transparent,'
    f'color-mix(in srgb,{HOT} 75%,transparent))"></span>'
)


@dataclass(frozen=True)
class Result:
    """A text under one model."""

    name: str
    tokenizer: Tokenizer
    scored: Scored

    @property
    def symbols(self) -> list[str]:
        """The tokens. Parts of a character are escaped: every token has a number to be seen."""
        tokens = self.scored.reading.tokens
        shown = symbols(tokens, self.tokenizer)
        names = [self.tokenizer.symbols[token] for token in tokens.tolist()]
        return [symbol or name for symbol, name in zip(shown, names, strict=True)]


def compare(catalogue: Catalogue, names: object, text: object) -> Iterator[str]:
    """HTML with the bits of every token of `text` under each of the models `names`."""
    wanted = names if isinstance(names, list) and names else [names]
    checkpoints = [(str(name), catalogue.load(name)) for name in wanted[:MODELS]]
    request = Score(texts=(values.text(text),))
    found: list[Result] = []
    seconds = 0.0
    for name, checkpoint in checkpoints:
        job = Job(partial(_scored, request, checkpoint))
        progress = page(card(muted(f"scoring with {name}") + bar(len(found) / len(checkpoints))))
        scored = yield from job.follow(partial(str, progress))
        found.append(Result(name, checkpoint.tokenizer, scored))
        seconds += job.seconds
    # one scale for all, so that colours compare
    most = max(one.scored.bits.abs().quantile(0.98).item() for one in found)
    scale = f"{SCALE}{most:.1f} bits per token; point at one or tap it"
    explained = card(f'<div class="st-muted">{scale}</div>', facts(took(seconds)))
    first, *others = (catalogue.entry(one.name).command_name for one in found)
    command = request.command(first)
    if others:
        command += ["--baseline", *others]
    yield page(
        asked(command),
        f'<div class="st-pair">{"".join(_card(one, request, most) for one in found)}</div>',
        _difference(*found) if len(found) == 2 else "",
        *map(_blocks, found),
        explained,
    )


def _scored(request: Score, checkpoint: Checkpoint, job: Job[Scored]) -> Scored:
    return request.run(checkpoint, job)[0]


def _card(one: Result, request: Score, most: float) -> str:
    """The bits of every token under a model, and in all."""
    scored = one.scored
    sign = "" if scored.exact else "≤ "
    kind = "exact" if scored.exact else f"a bound, mean of {request.samples} posterior samples"
    numbers = facts(
        (f"{sign}{scored.bits_per_character:.3f}", "bits per character"),
        (f"{sign}{scored.total:.1f}", "bits in all"),
        ("", kind),
    )
    shown = heat(one.symbols, scored.bits.tolist(), most)
    return card(title(one.name), shown, muted(scored.notice), numbers)


def _difference(first: Result, second: Result) -> str:
    """Where the first model needs more or fewer bits, if both read the same tokens."""
    if first.scored.reading.text != second.scored.reading.text:
        return muted(
            f"{first.name} and {second.name} read different texts: their bits do not compare."
        )
    if first.tokenizer.fingerprint != second.tokenizer.fingerprint:
        return ""
    shown = heat(first.symbols, (first.scored.bits - second.scored.bits).tolist(), GAP)
    key = f"Blue: {first.name} needs fewer bits than {second.name}. Orange: it needs more."
    colour = f"Full colour: {GAP:g} bits."
    return card(title(f"{first.name} against {second.name}"), shown, muted(f"{key} {colour}"))


def _blocks(one: Result) -> str:
    """The contribution of every block of a flow at every token, around its mean."""
    blocks = one.scored.blocks
    if blocks is None or len(blocks) < 2:
        return ""
    rows = ""
    for block, row in enumerate(blocks, 1):
        words = f"block {block}: {row.mean().item():+.2f} bits per token"
        most = max(GAP, row.std(correction=0).item() * 2)
        body = heat(one.symbols, (row.mean() - row).tolist(), most)
        opened = " open" if block == 1 else ""
        rows += f"<details{opened}><summary>{words}</summary>{body}</details>"
    key = (
        "log2 |det J| of each block around its mean. Blue: the block spreads this token's latents "
        "more than others, which makes it likelier; orange: less."
    )
    return card(title(f"Blocks of {one.name}"), rows, muted(key))


def heat(shown: Sequence[str], values: Sequence[float], most: float) -> str:
    """A text whose tokens have a warmer ground the higher their value, a blue one below 0.

    `most` is full colour.
    """
    spans = []
    for text, value in zip(shown, values, strict=True):
        share = min(abs(value) / max(most, 1e-9), 1.0)
        colour = HOT if value >= 0 else COLD
        ground = f"background:color-mix(in srgb,{colour} {75 * share:.0f}%,transparent)"
        spans.append(f'<span style="{ground}" title="{value:.2f} bits">{escape(text)}</span>')
    # the line below is for fingers, which cannot point
    return f'<div class="st-heat">{"".join(spans)}</div><p class="st-muted"></p>'
