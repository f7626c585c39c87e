"""The view that edits: words replaced or rewritten, states re-noised, the way from one text to another."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflowlm import editing
from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import BLANK
from tarflowlm.device import threads_for
from tarflowlm.editing import Edit, Encoded, encode, interpolate, renoise, telling_level
from tarflowlm.editing.words import Span, blended_spans, count_of, find_words, joined, pick_words, words_of
from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import bits
from tarflowlm.language_model import LanguageModel
from tarflowlm.model import TarFlowLM, as_flow
from tarflowlm.progress import Progress
from tarflowlm.report.grid import Row, text_tokens
from tarflowlm.studio import request
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.infill import TRIES, choices, fill, trust
from tarflowlm.studio.job import Job
from tarflowlm.studio.pieces import card, counted, facts, muted, page, slider, stage, took

WORDS, LATENTS, NOISE = TARGETS = ("words", "latents", "noise")
"""What is changed: words, redrawn given all others, or a state: h^(0) = z, or h^(L) = u."""
CANDIDATES = 32
"""Draws from which a redrawn word is chosen."""
STEPS = 8
"""Parts of the way from one text to another."""
TEMPERATURE = 0.7
"""Of new words, where a model has one: rare words are rarely what was meant."""
NO_LATENTS = "a discrete baseline has no latents to edit: choose a flow"


def replace_words(
    catalogue: Catalogue, model: Any, text: Any, words: Any, tries: Any, particles: Any, seed: Any
) -> Iterator[str]:
    """HTML of texts in which other words stand for `words` (several, separated by commas).

    They are drawn by particles, or redrawn where block 1, from which particles come, has no weights of tokens.
    """
    checkpoint = catalogue.load(model)
    tokenizer = checkpoint.tokenizer
    tokens = request.reading(tokenizer, text).tokens
    spans = named(tokenizer, tokens, request.text(words, "list of words"))
    template = blanked(tokens, spans)
    if not checkpoint.model.config.has_token_weights:
        edits = request.whole(tries, "tries", 1, TRIES)

        def change(source: Source, progress: Progress) -> Edit:
            encoded = encode(source.flow, source.tokens[None], source.generator).repeated(edits)
            return editing.rewrite(
                source.flow, encoded, [spans] * edits, progress=progress, **source.settings(encoded)
            )

        yield from _compared(_edited(catalogue, model, text, seed, change))
        return
    for shown in fill(checkpoint, template, tries, particles, _temperature(checkpoint.model), seed):
        if isinstance(shown, str):
            yield page(card(shown))
        else:
            original = stage(text_tokens(tokens, tokenizer)) + muted("the original")
            yield page(card(original), card(choices(tokenizer, shown, template)), card(trust(shown)))


def named(tokenizer: Tokenizer, tokens: Tensor, words: str) -> list[Span]:
    """Where these `words`, separated by commas, stand as whole words in the text [T]."""
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
    """The text [T] with a blank for every token of the spans. UserError if nothing is left."""
    template = tokens.clone()
    for start, stop in spans:
        template[start:stop] = BLANK
    if (template == BLANK).all():
        raise UserError("every word would be replaced: keep some")
    return template


def rewrite(
    catalogue: Catalogue, model: Any, text: Any, target: Any, strength: Any, num: Any, seed: Any
) -> Iterator[str]:
    """HTML of texts in which a share `strength` of the words is redrawn, or whose states are re-noised."""
    kind, share = str(target), request.number(strength, "strength", 0.0, 1.0)
    edits = request.whole(num, "edits", 1, request.SAMPLES)

    def change(source: Source, progress: Progress) -> Edit:
        flow, generator = source.flow, source.generator
        encoded = encode(flow, source.tokens[None], generator).repeated(edits)
        if kind != WORDS:
            return renoise(
                flow,
                encoded,
                level=source.level(kind),
                strength=share,
                generator=generator,
                decoder="auto",
                progress=progress,
            )
        words = source.words(source.tokens)
        count, length = count_of(share, words), len(source.tokens)
        picked = [pick_words(words, count, length, generator) for _ in range(edits)]
        spans = [joined(row, words) for row in picked]
        return editing.rewrite(flow, encoded, spans, spare=words, progress=progress, **source.settings(encoded))

    yield from _compared(_edited(catalogue, model, text, seed, change))


def _compared(edited: Iterator[str | tuple[Tokenizer, Any, float]]) -> Iterator[str]:
    """HTML of the progress, then of an `Edit`, every text beside the original."""
    for shown in edited:
        if isinstance(shown, str):
            yield page(card(shown))
            continue
        tokenizer, edit, seconds = shown
        before = edit.before[0].cpu()
        cards = []
        for after, changed, old, new in zip(
            edit.tokens.cpu(), edit.changed, edit.bound_before, edit.bound, strict=True
        ):
            numbers = facts(
                ("", f"{int(changed.sum())} of {counted(len(changed), 'token')} changed"),
                (
                    f"≤ {_bits(new, after, tokenizer):.2f}",
                    f"bits per character, ≤ {_bits(old, before, tokenizer):.2f} before",
                ),
            )
            cards.append(card(stage(text_tokens(after, tokenizer, before=before)) + numbers))
        original = stage(text_tokens(before, tokenizer)) + muted("the original")
        yield page(card(original), *cards, card(facts(took(seconds))))


def blend(catalogue: Catalogue, model: Any, text: Any, other: Any, target: Any, seed: Any) -> Iterator[str]:
    """HTML of the way from one text to another, cut to the same length, with a slider."""
    kind, toward = str(target), request.text(other, "other text")

    def change(source: Source, progress: Progress) -> list[Edit]:
        flow, generator = source.flow, source.generator
        second = request.reading(source.tokenizer, toward, "other text").tokens
        length = min(len(source.tokens), len(second))
        texts = source.tokens[:length], second[:length]
        a, b = (encode(flow, tokens[None], generator) for tokens in texts)
        if kind != WORDS:
            at = source.level(kind)
            return [
                interpolate(
                    flow, a, b, level=at, weight=i / STEPS, generator=generator, decoder="auto", progress=progress
                )
                for i in range(STEPS + 1)
            ]
        first_words, second_words = map(source.words, texts)
        found = []
        for i in range(STEPS + 1):
            # from the start of the text on, so that a word once taken stays
            taken = second_words[: round(i / STEPS * len(second_words))]
            spans = [blended_spans(first_words, second_words, taken, length)]
            found.append(editing.blend(flow, a, b, spans, progress=progress, **source.settings(a)))
        return found

    for shown in _edited(catalogue, model, text, seed, change):
        if isinstance(shown, str):
            yield page(card(shown))
            continue
        tokenizer, edits, seconds = shown
        texts = [edit.tokens[0].cpu() for edit in edits]
        rows = [Row("the text", text_tokens(texts[0], tokenizer))]
        for i, (before, now) in enumerate(itertools.pairwise(texts), 1):
            label = f"{100 * i // STEPS} % · {int((now != before).sum())} changed"
            rows.append(Row(label, text_tokens(now, tokenizer, before=before)))
        body = stage(rows[-1].tokens) + facts(took(seconds))
        yield page(card(body + slider(rows, "share of the other text", summary="every step of the way")))


@dataclass(frozen=True)
class Source:
    """A text to edit, and with what."""

    flow: TarFlowLM
    tokenizer: Tokenizer
    tokens: Tensor
    """[T]."""
    generator: torch.Generator

    def settings(self, text: Encoded) -> dict[str, Any]:
        """How words of the text are redrawn."""
        return {
            "candidates": CANDIDATES,
            "temperature": _temperature(self.flow),
            "level": telling_level(self.flow, text.row(0)),
            "generator": self.generator,
        }

    def level(self, target: str) -> int:
        """The number of the state that `target` names."""
        return 0 if target == LATENTS else self.flow.num_blocks

    def words(self, tokens: Tensor) -> list[Span]:
        """The words of `tokens` [T]. UserError if there are none."""
        found = words_of([self.tokenizer.token_bytes[token] for token in tokens.tolist()])
        if not found:
            raise UserError("the text has no words: write some")
        return found


def _edited(
    catalogue: Catalogue, model: Any, text: Any, seed: Any, change: Callable[[Source, Progress], Any]
) -> Iterator[str | tuple[Tokenizer, Any, float]]:
    """Progress as HTML, then the tokenizer, what `change` found, and the seconds that it took."""
    checkpoint = catalogue.load(model)
    flow, tokenizer = as_flow(checkpoint.model, NO_LATENTS), checkpoint.tokenizer
    tokens = request.reading(tokenizer, text).tokens
    request.check_length(len(tokens), flow.config.context)
    generator = torch.Generator().manual_seed(request.whole(seed, "seed", 0, 2**31))

    def work(job: Job[Any]) -> Any:
        with threads_for(1):
            return change(Source(flow, tokenizer, tokens, generator), job)

    job = Job(work)
    for _ in job.follow():
        yield stage(text_tokens(tokens, tokenizer)) + muted("editing")
    yield tokenizer, job.result, job.seconds


def _temperature(model: LanguageModel) -> float:
    return TEMPERATURE if model.config.has_token_weights else 1.0


def _bits(nats: Tensor, tokens: Tensor, tokenizer: Tokenizer) -> float:
    """Bits per character of a text [T] with this bound, a scalar, in nats."""
    characters = int(tokenizer.characters_per_token[tokens.numpy()].sum())
    return bits(nats.cpu()).item() / max(characters, 1)
