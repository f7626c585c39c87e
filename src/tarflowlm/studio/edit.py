"""The view that edits: words replaced or rewritten, states re-noised, the way from one text to another."""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import BLANK, Reading
from tarflowlm.device import threads_for
from tarflowlm.editing import Edit, EditKind, Encoded, Redraw, Renoise, Rewrite, Source, Toward, encode
from tarflowlm.editing.edits import TEMPERATURE
from tarflowlm.editing.words import find_words
from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import bits
from tarflowlm.model import TarFlowLM, as_flow
from tarflowlm.report.grid import Row, text_tokens
from tarflowlm.studio import request
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.infill import TRIES, choices, fill, trust
from tarflowlm.studio.job import Job
from tarflowlm.studio.pieces import card, counted, facts, muted, page, slider, stage, took

R = TypeVar("R")

WORDS, LATENTS, NOISE = TARGETS = ("words", "latents", "noise")
"""Words are resampled given all others; of the states, h^(0) = z or h^(L) = u is changed."""
STEPS = 8
"""Parts of the way from one text to another."""
NO_LATENTS = "a discrete baseline has no latents to edit: choose a flow"


def replace_words(
    catalogue: Catalogue, model: Any, text: Any, words: Any, tries: Any, particles: Any, seed: Any
) -> Iterator[str]:
    """HTML of texts in which other words stand for `words` (several, separated by commas).

    They are drawn by particles, or resampled where block 1, from which particles come, has no token weights.
    """
    checkpoint = catalogue.load(model)
    tokenizer = checkpoint.tokenizer
    reading = request.reading(tokenizer, text)
    pieces = named(tokenizer, request.text(words, "list of words"))
    template = blanked(tokenizer, reading.tokens, pieces)
    if checkpoint.model.config.has_token_weights:
        found = yield from fill(checkpoint, template, tries, particles, TEMPERATURE, seed)
        filled = choices(tokenizer, found, template)
        yield page(_original(tokenizer, reading), card(filled), card(trust(found)))
        return
    edits = request.whole(tries, "tries", 1, TRIES)
    yield from _compared(catalogue, model, text, seed, edits, lambda flow: Rewrite(pieces=pieces, everywhere=True))


def named(tokenizer: Tokenizer, words: str) -> list[str]:
    """The words of a list separated by commas, as the model reads them."""
    pieces = [piece.strip() for piece in words.split(",") if piece.strip()]
    if not pieces:
        raise UserError("no word is named: write the words to replace, separated by commas")
    return [request.reading(tokenizer, piece, "word").text.strip() for piece in pieces]


def blanked(tokenizer: Tokenizer, tokens: Tensor, pieces: Sequence[str]) -> Tensor:
    """The text [T] with a blank for every token of the pieces, wherever they are whole words."""
    template, symbols = tokens.clone(), [tokenizer.token_bytes[token] for token in tokens.tolist()]
    for piece in pieces:
        spans = find_words(symbols, piece)
        if not spans:
            raise UserError(f"{piece!r} is no word of the text: copy one from it")
        for start, stop in spans:
            template[start:stop] = BLANK
    if (template == BLANK).all():
        raise UserError("every word would be replaced: keep some")
    return template


def rewrite(
    catalogue: Catalogue, model: Any, text: Any, target: Any, strength: Any, num: Any, seed: Any
) -> Iterator[str]:
    """HTML of texts in which a share `strength` of the words is resampled, or whose states are re-noised."""
    target, share = _target(target), request.number(strength, "strength", 0.0, 1.0)
    edits = request.whole(num, "edits", 1, request.SAMPLES)

    def kind(flow: TarFlowLM) -> EditKind:
        return Redraw(strength=share) if target == WORDS else Renoise(level=_level(flow, target), strength=share)

    yield from _compared(catalogue, model, text, seed, edits, kind)


def blend(catalogue: Catalogue, model: Any, text: Any, other: Any, target: Any, seed: Any) -> Iterator[str]:
    """HTML of the way from one text to another, cut to the same length, with a slider."""
    target, toward = _target(target), request.text(other, "other text")

    def change(source: Source, other: Encoded) -> list[Edit]:
        level = None if target == WORDS else _level(source.model, target)
        # words from the start of the text on, so that a word once taken stays
        steps = (Toward(other=other, weight=i / STEPS, stretch="start", level=level) for i in range(STEPS + 1))
        return [step.apply(source) for step in steps]

    edits, _, tokenizer, seconds = yield from _edited(catalogue, model, [text, toward], seed, 1, change)
    texts = [edit.tokens[0].cpu() for edit in edits]
    rows = [Row("the text", text_tokens(texts[0], tokenizer))]
    for i, (before, now) in enumerate(itertools.pairwise(texts), 1):
        label = f"{100 * i // STEPS} % · {int((now != before).sum())} changed"
        rows.append(Row(label, text_tokens(now, tokenizer, before=before)))
    way = slider(rows, "share of the other text", summary="every step of the way")
    yield page(card(stage(rows[-1].tokens), facts(took(seconds)), way))


def _target(value: Any) -> str:
    if value not in TARGETS:
        raise UserError(f"target: choose one of {', '.join(TARGETS)}")
    return str(value)


def _level(flow: TarFlowLM, target: str) -> int:
    """The state that `target` names."""
    return 0 if target == LATENTS else flow.num_blocks


def _edited(
    catalogue: Catalogue, model: Any, texts: Sequence[Any], seed: Any, num: int, change: Callable[..., R]
) -> Generator[str, None, tuple[R, Reading, Tokenizer, float]]:
    """Pages of the progress; returns the result of `change`, the text, its tokenizer, and the seconds.

    `change` gets a `Source` with the first text in `num` rows, and the others, all cut to the shortest.
    """
    checkpoint = catalogue.load(model)
    flow, tokenizer = as_flow(checkpoint.model, NO_LATENTS), checkpoint.tokenizer
    names = ("text", "other text")
    readings = [request.reading(tokenizer, text, name) for text, name in zip(texts, names, strict=False)]
    length = min(len(reading.tokens) for reading in readings)
    request.check_length(length, flow.config.context)
    generator = torch.Generator().manual_seed(request.whole(seed, "seed", 0, 2**31))

    def work(job: Job[R]) -> R:
        with threads_for(1):
            text, *others = (encode(flow, reading.tokens[None, :length], generator) for reading in readings)
            return change(Source(flow, tokenizer, text.repeated(num), generator, job), *others)

    job = Job(work)
    for _ in job.follow():
        words = "editing" if job.advanced else "waiting for its turn"
        yield page(card(stage(text_tokens(readings[0].tokens, tokenizer)), muted(words)))
    assert job.result is not None
    return job.result, readings[0], tokenizer, job.seconds


def _compared(
    catalogue: Catalogue, model: Any, text: Any, seed: Any, num: int, kind: Callable[[TarFlowLM], EditKind]
) -> Iterator[str]:
    """HTML of the progress, then of `num` edits, every text beside the original."""

    def change(source: Source) -> Edit:
        return kind(source.model).apply(source)

    edit, reading, tokenizer, seconds = yield from _edited(catalogue, model, [text], seed, num, change)
    before, cards = edit.before[0].cpu(), []
    for after, changed, old, new in zip(edit.tokens.cpu(), edit.changed, edit.bound_before, edit.bound, strict=True):
        count = f"{int(changed.sum())} of {counted(len(changed), 'token')} changed"
        was = f"bits per character, ≤ {_bits(old, before, tokenizer):.2f} before"
        numbers = facts(("", count), (f"≤ {_bits(new, after, tokenizer):.2f}", was))
        cards.append(card(stage(text_tokens(after, tokenizer, before=before)), numbers))
    yield page(_original(tokenizer, reading), *cards, card(facts(took(seconds))))


def _original(tokenizer: Tokenizer, reading: Reading) -> str:
    return card(stage(text_tokens(reading.tokens, tokenizer)), muted(reading.notice or "the original"))


def _bits(nats: Tensor, tokens: Tensor, tokenizer: Tokenizer) -> float:
    """Bits per character of a text [T] with this bound, a scalar, in nats."""
    characters = int(tokenizer.characters_per_token[tokens.numpy()].sum())
    return bits(nats.cpu()).item() / max(characters, 1)
