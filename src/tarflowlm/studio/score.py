"""The view that scores: the bits of every token as a heat map, models side by side, and the part of every block."""

from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from typing import Any

from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.device import threads_for
from tarflowlm.errors import UserError
from tarflowlm.evaluation.scores import Scores, score
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.studio import request
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.job import Job
from tarflowlm.studio.pieces import bar, card, facts, milliseconds, muted, page, title

SAMPLES = 8
"""Draws from the posterior that a bound is averaged over."""
MODELS = 2
"""Models that are compared."""
GAP = 2.0
"""Bits between two models, or around the mean of a block, that are shown in full colour."""
COLD, HOT = "var(--st-blue)", "var(--st-warm)"


def compare(catalogue: Catalogue, names: Any, text: Any) -> Iterator[str]:
    """HTML with the bits of every token of `text` under each of the models `names`."""
    text = request.text(text, "text")
    found: list[tuple[str, Tokenizer, Tensor, Scores]] = []
    wanted = names if isinstance(names, list) else [names]
    if not wanted:
        raise UserError("no model is chosen: choose one or two")
    checkpoints = [catalogue.load(name) for name in wanted[:MODELS]]
    seconds = 0.0
    for name, checkpoint in zip(wanted, checkpoints, strict=False):
        tokens = request.required(checkpoint.tokenizer, text, "text")
        job = Job(partial(_scored, checkpoint, tokens))
        for _ in job.follow():
            yield page(card(muted(f"scoring with {name}") + bar(len(found) / len(checkpoints))))
        assert job.result is not None
        found.append((str(name), checkpoint.tokenizer, tokens, job.result))
        seconds += job.seconds_taken
    # one scale for all, so that colours compare
    most = max(scores.bits.abs().quantile(0.98).item() for *_, scores in found)
    pair = "".join(_card(*one, most) for one in found)
    yield page(f'<div class="st-pair">{pair}</div>', _difference(found), *map(_blocks, found), _scale(most, seconds))


def _scored(checkpoint: Checkpoint, tokens: Tensor, job: Job[Scores]) -> Scores:
    job.advance()
    with threads_for(1):
        found = score(checkpoint.model, tokens, samples=SAMPLES, progress=lambda done, total: job.advance())
    job.advance()
    return found


def _card(name: str, tokenizer: Tokenizer, tokens: Tensor, scores: Scores, most: float) -> str:
    characters = max(int(tokenizer.characters_per_token[tokens.numpy()].sum()), 1)
    sign = "" if scores.exact else "≤ "
    numbers = facts(
        (f"{sign}{scores.total / characters:.3f}", "bits per character"),
        (f"{sign}{scores.total:.1f}", "bits in all"),
        ("", "exact" if scores.exact else f"a bound, mean of {SAMPLES} posterior samples"),
    )
    return card(title(name), heat(_symbols(tokens, tokenizer), scores.bits.tolist(), most), numbers)


def _difference(found: Sequence[tuple[str, Tokenizer, Tensor, Scores]]) -> str:
    """Where the first model needs more or fewer bits than the second, if both read the same tokens."""
    if len(found) < 2 or found[0][1].fingerprint != found[1][1].fingerprint:
        return ""
    (first, tokenizer, tokens, a), (second, _, _, b) = found
    shown = heat(_symbols(tokens, tokenizer), (a.bits - b.bits).tolist(), GAP)
    text = f"Blue: {first} needs fewer bits than {second}. Orange: it needs more. Full colour: {GAP:g} bits."
    return card(title(f"{first} against {second}"), shown, muted(text))


def _blocks(one: tuple[str, Tokenizer, Tensor, Scores]) -> str:
    """What every block of a flow contributes at every token, around its mean."""
    name, tokenizer, tokens, scores = one
    if scores.blocks is None or len(scores.blocks) < 2:
        return ""
    shown, rows = _symbols(tokens, tokenizer), ""
    for block, row in enumerate(scores.blocks, 1):
        words = f"block {block}: {row.mean().item():+.2f} bits a token"
        body = heat(shown, (row.mean() - row).tolist(), max(GAP, row.std(correction=0).item() * 2))
        rows += f"<details{' open' if block == 1 else ''}><summary>{words}</summary>{body}</details>"
    text = (
        "log2 |det J| of each block around its mean. Blue: the block spreads this token's latents more than others, "
        "which makes it likelier; orange: less."
    )
    return card(title(f"Blocks of {name}"), rows, muted(text))


def _symbols(tokens: Tensor, tokenizer: Tokenizer) -> list[str]:
    """Tokens as they are; escaped where they are not whole characters, as every token has a number to be seen."""
    whole = [tokenizer.token_bytes[token].decode("utf-8", errors="replace") for token in tokens.tolist()]
    return [
        tokenizer.symbols[token] if "\ufffd" in text else text
        for token, text in zip(tokens.tolist(), whole, strict=True)
    ]


def heat(shown: Sequence[str], values: Sequence[float], most: float) -> str:
    """A text whose tokens have a warmer ground the higher their value, a blue one below 0; `most` is full colour."""
    spans = []
    for text, value in zip(shown, values, strict=True):
        share = min(abs(value) / max(most, 1e-9), 1.0)
        colour = HOT if value >= 0 else COLD
        ground = f"background:color-mix(in srgb,{colour} {75 * share:.0f}%,transparent)"
        spans.append(f'<span style="{ground}" title="{value:.2f} bits">{escape(text)}</span>')
    return f'<div class="st-heat">{"".join(spans)}</div>'


def _scale(most: float, seconds: float) -> str:
    ground = f"background:linear-gradient(90deg,transparent,color-mix(in srgb,{HOT} 75%,transparent))"
    scale = (
        f'0<span class="st-scale" style="{ground}"></span>{most:.1f} bits for a token; point at one for its number'
    )
    return card(f'<div class="st-muted">{scale}</div>', facts((milliseconds(seconds), "in all")))
