"""The view that edits: words replaced or rewritten, states re-noised, the way from one text to another."""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tarflowlm import editing
from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import BLANK, Reading
from tarflowlm.device import threads_for
from tarflowlm.editing import Edit, Encoded, encode, interpolate, renoise, telling_level
from tarflowlm.editing.words import Span, blended_spans, count_of, find_words, joined, pick_words, words_of
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
CANDIDATES = 32
"""Draws from which a resampled word is chosen."""
STEPS = 8
"""Parts of the way from one text to another."""
TEMPERATURE = 0.7
"""Temperature of new words, where a model has one: rare words are rarely wanted."""
NO_LATENTS = "a discrete baseline has no latents to edit: choose a flow"


@dataclass(frozen=True)
class Source:
    """A text to edit, and the model that edits it."""

    flow: TarFlowLM
    tokenizer: Tokenizer
    reading: Reading
    generator: torch.Generator

    def encoded(self, tokens: Tensor, edits: int = 1) -> Encoded:
        """The states of `tokens` [T], once per edit."""
        return encode(self.flow, tokens[None], self.generator).repeated(edits)

    def settings(self, text: Encoded) -> dict[str, Any]:
        """Options of resampling words of the text."""
        return {
            "candidates": CANDIDATES,
            "temperature": _temperature(self.flow.config.has_token_weights),
            "level": telling_level(self.flow, text.row(0)),
            "generator": self.generator,
        }

    def level(self, target: str) -> int:
        """The number of the state that `target` names."""
        return 0 if target == LATENTS else self.flow.num_blocks

    def words(self, tokens: Tensor) -> list[Span]:
        """The words of `tokens` [T]."""
        found = words_of([self.tokenizer.token_bytes[token] for token in tokens.tolist()])
        if not found:
            raise UserError("the text has no words: write some")
        return found


def replace_words(
    catalogue: Catalogue, model: Any, text: Any, words: Any, tries: Any, particles: Any, seed: Any
) -> Iterator[str]:
    """HTML of texts in which other words stand for `words` (several, separated by commas).

    They are drawn by particles, or resampled where block 1, from which particles come, has no token weights.
    """
    checkpoint = catalogue.load(model)
    tokenizer, has_weights = checkpoint.tokenizer, checkpoint.model.config.has_token_weights
    reading = request.reading(tokenizer, text)
    spans = named(tokenizer, reading.tokens, request.text(words, "list of words"))
    template = blanked(reading.tokens, spans)
    if has_weights:
        found = yield from fill(checkpoint, template, tries, particles, _temperature(has_weights), seed)
        filled = choices(tokenizer, found, template)
        yield page(_original(tokenizer, reading), card(filled), card(trust(found)))
        return
    edits = request.whole(tries, "tries", 1, TRIES)

    def change(source: Source, job: Job[Edit]) -> Edit:
        before = source.encoded(reading.tokens, edits)
        return editing.rewrite(source.flow, before, [spans] * edits, progress=job, **source.settings(before))

    yield from _compared(catalogue, model, text, seed, change)


def named(tokenizer: Tokenizer, tokens: Tensor, words: str) -> list[Span]:
    """The places of these `words`, separated by commas, as whole words in the text [T]."""
    pieces = [piece.strip() for piece in words.split(",") if piece.strip()]
    if not pieces:
        raise UserError("no word is named: write the words to replace, separated by commas")
    parts, spans = [tokenizer.token_bytes[token] for token in tokens.tolist()], set[Span]()
    for piece in pieces:
        found = find_words(parts, request.reading(tokenizer, piece, "word").text.strip())
        if not found:
            raise UserError(f"{piece!r} is no word of the text: copy one from it")
        spans.update(found)
    return sorted(spans)


def blanked(tokens: Tensor, spans: Sequence[Span]) -> Tensor:
    """The text [T] with a blank for every token of the spans."""
    template = tokens.clone()
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

    def change(source: Source, job: Job[Edit]) -> Edit:
        flow, generator, tokens = source.flow, source.generator, source.reading.tokens
        before = source.encoded(tokens, edits)
        if target != WORDS:
            settings = {"level": source.level(target), "generator": generator, "decoder": "auto", "progress": job}
            return renoise(flow, before, strength=share, **settings)  # type: ignore[arg-type]
        words = source.words(tokens)
        picked = [pick_words(words, count_of(share, words), len(tokens), generator) for _ in range(edits)]
        spans = [joined(row, words) for row in picked]
        return editing.rewrite(flow, before, spans, spare=words, progress=job, **source.settings(before))

    yield from _compared(catalogue, model, text, seed, change)


def blend(catalogue: Catalogue, model: Any, text: Any, other: Any, target: Any, seed: Any) -> Iterator[str]:
    """HTML of the way from one text to another, cut to the same length, with a slider."""
    target, toward = _target(target), request.text(other, "other text")

    def change(source: Source, job: Job[list[Edit]]) -> list[Edit]:
        flow, generator = source.flow, source.generator
        second = request.reading(source.tokenizer, toward, "other text").tokens
        length = min(len(source.reading.tokens), len(second))
        texts = source.reading.tokens[:length], second[:length]
        a, b = map(source.encoded, texts)
        if target != WORDS:
            settings = {"level": source.level(target), "generator": generator, "decoder": "auto", "progress": job}
            return [interpolate(flow, a, b, weight=i / STEPS, **settings) for i in range(STEPS + 1)]  # type: ignore[arg-type]
        first_words, second_words = map(source.words, texts)
        found = []
        for i in range(STEPS + 1):
            # from the start of the text on, so that a word once taken stays
            taken = second_words[: round(i / STEPS * len(second_words))]
            spans = [blended_spans(first_words, second_words, taken, length)]
            found.append(editing.blend(flow, a, b, spans, progress=job, **source.settings(a)))
        return found

    source, edits, seconds = yield from _edited(catalogue, model, text, seed, change)
    texts = [edit.tokens[0].cpu() for edit in edits]
    rows = [Row("the text", text_tokens(texts[0], source.tokenizer))]
    for i, (before, now) in enumerate(itertools.pairwise(texts), 1):
        label = f"{100 * i // STEPS} % · {int((now != before).sum())} changed"
        rows.append(Row(label, text_tokens(now, source.tokenizer, before=before)))
    way = slider(rows, "share of the other text", summary="every step of the way")
    yield page(card(stage(rows[-1].tokens), facts(took(seconds)), way))


def _target(value: Any) -> str:
    if value not in TARGETS:
        raise UserError(f"target: choose one of {', '.join(TARGETS)}")
    return str(value)


def _temperature(has_token_weights: bool) -> float:
    return TEMPERATURE if has_token_weights else 1.0


def _edited(
    catalogue: Catalogue, model: Any, text: Any, seed: Any, change: Callable[[Source, Job[R]], R]
) -> Generator[str, None, tuple[Source, R, float]]:
    """Pages of the progress; returns the text with its model, the result of `change`, and its seconds."""
    checkpoint = catalogue.load(model)
    flow, tokenizer = as_flow(checkpoint.model, NO_LATENTS), checkpoint.tokenizer
    reading = request.reading(tokenizer, text)
    request.check_length(len(reading.tokens), flow.config.context)
    generator = torch.Generator().manual_seed(request.whole(seed, "seed", 0, 2**31))
    source = Source(flow, tokenizer, reading, generator)

    def work(job: Job[R]) -> R:
        with threads_for(1):
            return change(source, job)

    job = Job(work)
    for _ in job.follow():
        words = "editing" if job.advanced else "waiting for its turn"
        yield page(card(stage(text_tokens(reading.tokens, tokenizer)), muted(words)))
    assert job.result is not None
    return source, job.result, job.seconds


def _compared(
    catalogue: Catalogue, model: Any, text: Any, seed: Any, change: Callable[[Source, Job[Edit]], Edit]
) -> Iterator[str]:
    """HTML of the progress, then of an `Edit`, every text beside the original."""
    source, edit, seconds = yield from _edited(catalogue, model, text, seed, change)
    tokenizer, before, cards = source.tokenizer, edit.before[0].cpu(), []
    for after, changed, old, new in zip(edit.tokens.cpu(), edit.changed, edit.bound_before, edit.bound, strict=True):
        count = f"{int(changed.sum())} of {counted(len(changed), 'token')} changed"
        was = f"bits per character, ≤ {_bits(old, before, tokenizer):.2f} before"
        numbers = facts(("", count), (f"≤ {_bits(new, after, tokenizer):.2f}", was))
        cards.append(card(stage(text_tokens(after, tokenizer, before=before)), numbers))
    yield page(_original(tokenizer, source.reading), *cards, card(facts(took(seconds))))


def _original(tokenizer: Tokenizer, reading: Reading) -> str:
    return card(stage(text_tokens(reading.tokens, tokenizer)), muted(reading.notice or "the original"))


def _bits(nats: Tensor, tokens: Tensor, tokenizer: Tokenizer) -> float:
    """Bits per character of a text [T] with this bound, a scalar, in nats."""
    characters = int(tokenizer.characters_per_token[tokens.numpy()].sum())
    return bits(nats.cpu()).item() / max(characters, 1)
