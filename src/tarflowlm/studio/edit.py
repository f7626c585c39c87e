"""The view that edits: words replaced or rewritten, states re-noised, the way from one text to another."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import BLANK
from tarflowlm.device import threads_for
from tarflowlm.editing import Edit, Encoded, Redraw, Renoise, Rewrite, Source, Toward, encode
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

WORDS, LATENTS, NOISE = TARGETS = ("words", "latents", "noise")
"""What is changed: words, redrawn given all others, or a state: h^(0) = z, or h^(L) = u."""
STEPS = 8
"""Parts of the way from one text to another."""
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
    pieces = named(tokenizer, request.text(words, "list of words"))
    template = blanked(tokenizer, tokens, pieces)
    if not checkpoint.model.config.has_token_weights:
        edits = request.whole(tries, "tries", 1, TRIES)

        def change(source: Source) -> Edit:
            return Rewrite(pieces=pieces, everywhere=True).apply(source)

        yield from _compared(_edited(catalogue, model, text, seed, change, num=edits))
        return
    for shown in fill(checkpoint, template, tries, particles, TEMPERATURE, seed):
        if isinstance(shown, str):
            yield page(card(shown))
        else:
            original = stage(text_tokens(tokens, tokenizer)) + muted("the original")
            yield page(card(original), card(choices(tokenizer, shown, template)), card(trust(shown)))


def named(tokenizer: Tokenizer, words: str) -> list[str]:
    """The words of a list separated by commas, as the model reads them."""
    pieces = [request.reading(tokenizer, piece, "word").text.strip() for piece in words.split(",") if piece.strip()]
    if not pieces:
        raise UserError("no word is named: write the words to replace, separated by commas")
    return pieces


def blanked(tokenizer: Tokenizer, tokens: Tensor, pieces: Sequence[str]) -> Tensor:
    """The text [T] with a blank for every token of the pieces, wherever they are whole words in it."""
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
    """HTML of texts in which a share `strength` of the words is redrawn, or whose states are re-noised."""
    kind, share = str(target), request.number(strength, "strength", 0.0, 1.0)
    edits = request.whole(num, "edits", 1, request.SAMPLES)

    def change(source: Source) -> Edit:
        if kind == WORDS:
            return Redraw(strength=share).apply(source)
        return Renoise(level=_level(source.model, kind), strength=share).apply(source)

    yield from _compared(_edited(catalogue, model, text, seed, change, num=edits))


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

    def change(source: Source, other: Encoded) -> list[Edit]:
        level = None if kind == WORDS else _level(source.model, kind)
        # words from the start of the text on, so that a word once taken stays
        ways = (Toward(other=other, weight=i / STEPS, stretch="start", level=level) for i in range(STEPS + 1))
        return [way.apply(source) for way in ways]

    for shown in _edited(catalogue, model, text, seed, change, other=toward):
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


def _level(flow: TarFlowLM, target: str) -> int:
    """The state that `target` names."""
    return 0 if target == LATENTS else flow.num_blocks


def _edited(
    catalogue: Catalogue,
    model: Any,
    text: Any,
    seed: Any,
    change: Callable[..., Any],
    *,
    num: int = 1,
    other: str | None = None,
) -> Iterator[str | tuple[Tokenizer, Any, float]]:
    """Progress as HTML, then the tokenizer, what `change` returned, and its seconds.

    `change` gets the source, in `num` rows, and the other text if there is one, cut to the same length.
    """
    checkpoint = catalogue.load(model)
    flow, tokenizer = as_flow(checkpoint.model, NO_LATENTS), checkpoint.tokenizer
    texts = [request.reading(tokenizer, text).tokens]
    if other is not None:
        texts.append(request.reading(tokenizer, other, "other text").tokens)
    length = min(map(len, texts))
    request.check_length(length, flow.config.context)
    generator = torch.Generator().manual_seed(request.whole(seed, "seed", 0, 2**31))

    def work(job: Job[Any]) -> Any:
        with threads_for(1):
            encoded, *others = (encode(flow, tokens[None, :length], generator) for tokens in texts)
            return change(Source(flow, tokenizer, encoded.repeated(num), generator, job), *others)

    job = Job(work)
    for _ in job.follow():
        yield stage(text_tokens(texts[0], tokenizer)) + muted("editing")
    yield tokenizer, job.result, job.seconds


def _bits(nats: Tensor, tokens: Tensor, tokenizer: Tokenizer) -> float:
    """Bits per character of a text [T] with this bound, a scalar, in nats."""
    characters = int(tokenizer.characters_per_token[tokens.numpy()].sum())
    return bits(nats.cpu()).item() / max(characters, 1)
