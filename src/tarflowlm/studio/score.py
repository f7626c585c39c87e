"""The view that scores: the bits of every token as a heat map, models side by side, and the part of
every block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import Reading
from tarflowlm.evaluation.scores import Scores, score
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.studio import request
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.pieces import asked, bar, card, facts, muted, page, title, took
from tarflowlm.studio.request import Job, num_characters
from tarflowlm.views.grid import symbols

SAMPLES = 8  # draws from the posterior that a bound is averaged over
MODELS = 2  # models that are compared
GAP = 2.0  # bits between two models, or around the mean of a block, that are shown in full colour
COLD, HOT = "var(--st-blue)", "var(--st-warm)"


@dataclass(frozen=True)
class Scored:
    """A text under one model."""

    name: str
    tokenizer: Tokenizer
    reading: Reading
    scores: Scores

    @property
    def symbols(self) -> list[str]:
        """The tokens; those within a character are escaped, as every token has a number to be
        seen.
        """
        tokens = self.reading.tokens
        shown = symbols(tokens, self.tokenizer)
        return [
            symbol or self.tokenizer.symbols[t]
            for symbol, t in zip(shown, tokens.tolist(), strict=True)
        ]


def compare(catalogue: Catalogue, names: Any, text: Any) -> Iterator[str]:
    """HTML with the bits of every token of `text` under each of the models `names`."""
    wanted = names if isinstance(names, list) and names else [names]
    checkpoints = [(str(name), catalogue.load(name)) for name in wanted[:MODELS]]
    readings = [request.reading(checkpoint.tokenizer, text) for _, checkpoint in checkpoints]
    found: list[Scored] = []
    seconds = 0.0
    for (name, checkpoint), reading in zip(checkpoints, readings, strict=True):
        job = Job(partial(_scored, checkpoint, reading))
        progress = page(card(muted(f"scoring with {name}") + bar(len(found) / len(checkpoints))))
        scores = yield from job.follow(partial(str, progress))
        found.append(Scored(name, checkpoint.tokenizer, reading, scores))
        seconds += job.seconds
    # one scale for all, so that colours compare
    most = max(one.scores.bits.abs().quantile(0.98).item() for one in found)
    ground = (
        f"background:linear-gradient(90deg,transparent,color-mix(in srgb,{HOT} 75%,transparent))"
    )
    scale = f'0<span class="st-scale" style="{ground}"></span>{most:.1f} bits per token; point at one or tap it'
    explained = card(f'<div class="st-muted">{scale}</div>', facts(took(seconds)))
    pair = "".join(_card(one, most) for one in found)
    second = () if len(found) < 2 else ("--baseline", found[1].name)
    command = asked("score", found[0].name, "--text", text, *second)
    yield page(
        command,
        f'<div class="st-pair">{pair}</div>',
        _difference(found),
        *map(_blocks, found),
        explained,
    )


def _scored(checkpoint: Checkpoint, reading: Reading, job: Job[Scores]) -> Scores:
    return score(checkpoint.model, reading.tokens, samples=SAMPLES, progress=job)


def _card(one: Scored, most: float) -> str:
    per_character = one.scores.total / num_characters(one.tokenizer, one.reading.tokens)
    sign, kind = (
        ("", "exact")
        if one.scores.exact
        else ("≤ ", f"a bound, mean of {SAMPLES} posterior samples")
    )
    total = (f"{sign}{one.scores.total:.1f}", "bits in all")
    numbers = facts((f"{sign}{per_character:.3f}", "bits per character"), total, ("", kind))
    shown = heat(one.symbols, one.scores.bits.tolist(), most)
    return card(title(one.name), shown, muted(one.reading.notice), numbers)


def _difference(found: Sequence[Scored]) -> str:
    """Where the first model needs more or fewer bits than the second, if both read the same
    tokens.
    """
    if len(found) < 2:
        return ""
    first, second = found
    if first.reading.text != second.reading.text:
        return muted(
            f"{first.name} and {second.name} read different texts: their bits do not compare."
        )
    if first.tokenizer.fingerprint != second.tokenizer.fingerprint:
        return ""
    shown = heat(first.symbols, (first.scores.bits - second.scores.bits).tolist(), GAP)
    key = f"Blue: {first.name} needs fewer bits than {second.name}. Orange: it needs more. Full colour: {GAP:g} bits."
    return card(title(f"{first.name} against {second.name}"), shown, muted(key))


def _blocks(one: Scored) -> str:
    """The contribution of every block of a flow at every token, around its mean."""
    if one.scores.blocks is None or len(one.scores.blocks) < 2:
        return ""
    rows = ""
    for block, row in enumerate(one.scores.blocks, 1):
        words = f"block {block}: {row.mean().item():+.2f} bits per token"
        body = heat(
            one.symbols, (row.mean() - row).tolist(), max(GAP, row.std(correction=0).item() * 2)
        )
        rows += (
            f"<details{' open' if block == 1 else ''}><summary>{words}</summary>{body}</details>"
        )
    key = "Blue: the block spreads this token's latents more than others, which makes it likelier; orange: less."
    return card(
        title(f"Blocks of {one.name}"),
        rows,
        muted(f"log2 |det J| of each block around its mean. {key}"),
    )


def heat(shown: Sequence[str], values: Sequence[float], most: float) -> str:
    """A text whose tokens have a warmer ground the higher their value, a blue one below 0; `most`
    is full colour.
    """
    spans = []
    for text, value in zip(shown, values, strict=True):
        share = min(abs(value) / max(most, 1e-9), 1.0)
        colour = HOT if value >= 0 else COLD
        ground = f"background:color-mix(in srgb,{colour} {75 * share:.0f}%,transparent)"
        spans.append(f'<span style="{ground}" title="{value:.2f} bits">{escape(text)}</span>')
    # the line below is for fingers, which cannot point
    return f'<div class="st-heat">{"".join(spans)}</div><p class="st-muted"></p>'
