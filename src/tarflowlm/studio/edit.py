"""The view that edits: words replaced by infilling, a text re-noised, the way from one text to another."""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.device import threads_for
from tarflowlm.editing import Edit, encode, interpolate, renoise
from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import bits
from tarflowlm.generation.inversion import Tick
from tarflowlm.generation.sampling import BLANK
from tarflowlm.model import TarFlowLM, as_flow
from tarflowlm.report.grid import GridRow
from tarflowlm.studio import request
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.infill import choices, drawn, template_tokens, trust
from tarflowlm.studio.job import Job
from tarflowlm.studio.pieces import bar, card, facts, milliseconds, muted, page, scrubbed, stage
from tarflowlm.studio.rows import changed_words, difference, final_tokens

LATENTS, NOISE = "the latents", "the noise"
LEVELS = (LATENTS, NOISE)
"""Which state is changed: h^(0) = z, or h^(L) = u."""
STEPS = 8
"""Parts of the way from one text to another."""
TEMPERATURE = 0.7
"""Of replaced words: rare words are rarely what was meant."""
NO_LATENTS = "a discrete baseline has no latents to edit: choose a flow"


def replace_words(
    catalogue: Catalogue, model: Any, text: Any, words: Any, tries: Any, particles: Any, seed: Any
) -> Iterator[str]:
    """HTML of texts in which other words stand for `words` (several, separated by commas), drawn by particles."""
    checkpoint = catalogue.load(model)
    tokenizer = checkpoint.tokenizer
    tokens = request.required(tokenizer, request.text(text, "text"), "text")
    template = blanked(tokenizer, tokens, request.text(words, "list of words"))
    for shown in drawn(checkpoint, template, tries, particles, TEMPERATURE, seed):
        if isinstance(shown, str):
            yield page(card(stage(template_tokens(tokenizer, template), is_open=True) + shown))
        else:
            found, seconds = shown
            original = stage(final_tokens(tokens, tokenizer)) + muted("the original")
            yield page(
                card(original), card(choices(tokenizer, found, template)), card(trust(found, particles, seconds))
            )


def blanked(tokenizer: Tokenizer, tokens: Tensor, words: str) -> Tensor:
    """The text [T] with a blank for every token of `words`, wherever they stand as whole words."""
    pieces = [piece.strip() for piece in words.split(",") if piece.strip()]
    if not pieces:
        raise UserError("no word is named: write the words to replace, separated by commas")
    template, decoded = tokens.clone(), [tokenizer.decode([token]) for token in tokens.tolist()]
    whole = "".join(decoded)
    ends = torch.tensor([len(piece) for piece in decoded]).cumsum(0)
    for piece in pieces:
        wanted = tokenizer.decode(request.encoded(tokenizer, piece)).strip()
        found = list(re.finditer(rf"(?<!\w){re.escape(wanted)}(?!\w)", whole)) if wanted else []
        if not found:
            raise UserError(f"{piece!r} is no word of the text: copy one from it")
        for match in found:
            begins = torch.cat((ends.new_zeros(1), ends[:-1]))
            template[(begins < match.end()) & (ends > match.start())] = BLANK
    if (template == BLANK).all():
        raise UserError("every word would be replaced: keep some")
    return template


def loosen(catalogue: Catalogue, model: Any, text: Any, level: Any, strength: Any, seed: Any) -> Iterator[str]:
    """HTML of a text whose state is re-noised, beside the original."""
    name, eta = request.one_of(level, "state", LEVELS), request.number(strength, "strength", 0.0, 1.0)

    def change(flow: TarFlowLM, tokens: Tensor, generator: torch.Generator, tick: Tick) -> Edit:
        at = 0 if name == LATENTS else flow.num_blocks
        return renoise(
            flow, encode(flow, tokens[None], generator), level=at, strength=eta, generator=generator,
            decoder="auto", tick=tick,
        )  # fmt: skip

    for shown in _edited(catalogue, model, text, seed, change):
        if isinstance(shown, str):
            yield page(card(shown))
            continue
        tokenizer, edit, seconds = shown
        before, after = edit.before[0].cpu(), edit.tokens[0].cpu()
        old, new = (_bits(nats, row, tokenizer) for nats, row in ((edit.bound_before, before), (edit.bound, after)))
        numbers = facts(
            ("", changed_words(edit.changed[0])),
            (f"≤ {new:.2f}", f"bits per character, ≤ {old:.2f} before"),
            (milliseconds(seconds), "in all"),
        )
        yield page(
            card(stage(difference(before, after, tokenizer)) + numbers),
            card(stage(final_tokens(before, tokenizer)) + muted("the original")),
        )


def blend(catalogue: Catalogue, model: Any, text: Any, other: Any, level: Any, seed: Any) -> Iterator[str]:
    """HTML of the way from one text to another of the same length, with a slider."""
    name, toward = request.one_of(level, "state", LEVELS), request.text(other, "other text")

    def change(flow: TarFlowLM, tokens: Tensor, generator: torch.Generator, tick: Tick) -> list[Edit]:
        second = request.required(catalogue.load(model).tokenizer, toward, "other text")
        length = min(len(tokens), len(second))
        a, b = (encode(flow, x[None, :length], generator) for x in (tokens, second))
        at = 0 if name == LATENTS else flow.num_blocks
        return [
            interpolate(
                flow, a, b, level=at, weight=i / STEPS, generator=generator, decoder="auto", tick=tick
            )
            for i in range(STEPS + 1)
        ]  # fmt: skip

    for shown in _edited(catalogue, model, text, seed, change):
        if isinstance(shown, str):
            yield page(card(shown))
            continue
        tokenizer, edits, seconds = shown
        texts = [edit.tokens[0].cpu() for edit in edits]
        rows = [GridRow("0 % of the other text", final_tokens(texts[0], tokenizer))]
        rows += [
            GridRow(f"{100 * i // STEPS} % · {changed_words(now != before)}", difference(before, now, tokenizer))
            for i, (before, now) in enumerate(itertools.pairwise(texts), 1)
        ]
        body = stage(rows[-1].tokens) + facts((milliseconds(seconds), "in all"))
        yield page(card(body + scrubbed(rows, "weight of the other text", summary="every step of the way")))


def _edited(
    catalogue: Catalogue,
    model: Any,
    text: Any,
    seed: Any,
    change: Callable[[TarFlowLM, Tensor, torch.Generator, Tick], Any],
) -> Iterator[str | tuple[Tokenizer, Any, float]]:
    """Progress as HTML, then the tokenizer, what `change` found, and the seconds that it took."""
    checkpoint = catalogue.load(model)
    flow = as_flow(checkpoint.model, NO_LATENTS)
    tokens = request.required(checkpoint.tokenizer, request.text(text, "text"), "text")
    request.one_window(len(tokens), flow.config.context)
    generator = torch.Generator().manual_seed(request.whole(seed, "seed", 0, 2**31))

    def work(job: Job[Any]) -> Any:
        with threads_for(1):
            return change(flow, tokens, generator, job.tick)

    job = Job(work)
    for _ in job.follow():
        yield stage(final_tokens(tokens, checkpoint.tokenizer)) + bar(0.5) + muted("editing")
    yield checkpoint.tokenizer, job.result, job.seconds_taken


def _bits(nats: Tensor, tokens: Tensor, tokenizer: Tokenizer) -> float:
    """Bits per character of a text [T] with this bound, [1], in nats."""
    characters = int(tokenizer.characters_per_token[tokens.numpy()].sum())
    return bits(nats.cpu()).item() / max(characters, 1)
