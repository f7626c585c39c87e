"""The view that edits: words replaced or resampled, states re-noised."""

from collections.abc import Callable, Generator, Iterator
from typing import Any

from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import BLANK, Reading
from tarflowlm.editing import Edit, Redraw, Renoise, Rewrite, Source, encode
from tarflowlm.editing.edits import TEMPERATURE
from tarflowlm.editing.words import find_words
from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import bits
from tarflowlm.model import TarFlowLM, as_flow
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.studio import request
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.pieces import asked, card, counted, facts, muted, page, stage, took
from tarflowlm.studio.request import Job, R
from tarflowlm.studio.write import TRIES, fill
from tarflowlm.views.grid import text_tokens

WORDS, LATENTS, NOISE = TARGETS = ("words", "latents", "noise")
"""Words are resampled given all others; of the states, h^(0) = z or h^(L) = u is changed."""
NO_LATENTS = "a discrete baseline has no latents to edit: choose a flow"


def replace_words(
    catalogue: Catalogue, model: Any, text: Any, words: Any, tries: Any, particles: Any, seed: Any
) -> Iterator[str]:
    """HTML of texts in which other words stand for `words` (several, separated by commas). They are
    drawn by particles, or resampled where block 1, from which particles come, has no token
    weights.
    """
    checkpoint = catalogue.load(model)
    tokenizer, reading = checkpoint.tokenizer, request.reading(checkpoint.tokenizer, text)
    named = [piece for piece in request.text(words, "list of words").split(",") if piece.strip()]
    pieces = [request.reading(tokenizer, piece, "word").text.strip() for piece in named or [""]]
    # the text with a blank for every token of these whole words
    template, parts = (
        reading.tokens.clone(),
        [tokenizer.token_bytes[token] for token in reading.tokens.tolist()],
    )
    for piece in pieces:
        if not (spans := find_words(parts, piece)):
            raise UserError(f"{piece!r} is no word of the text: copy one from it")
        for start, stop in spans:
            template[start:stop] = BLANK
    if checkpoint.model.config.has_token_weights:
        shown = "".join(
            " " * part.startswith(b" ") + request.MARK
            if token == BLANK
            else part.decode("utf-8", "replace")
            for token, part in zip(template.tolist(), parts, strict=True)
        )
        blanks = Reading(template, shown, shown)
        filled = yield from fill(
            str(model), checkpoint, blanks, tries, particles, TEMPERATURE, seed
        )
        yield page(_original(tokenizer, reading), filled)
    else:
        edits = request.whole(tries, "tries", 1, TRIES)
        options = ("--rewrite", *pieces, "--num", edits, "--seed", request.seed(seed))
        command = asked("edit", model, "--text", reading.given, *options)
        kind = Rewrite(pieces=pieces, everywhere=True)
        yield from _compared(command, checkpoint, reading, edits, seed, kind.apply)


def rewrite(
    catalogue: Catalogue, model: Any, text: Any, target: Any, strength: Any, num: Any, seed: Any
) -> Iterator[str]:
    """HTML of texts in which a share `strength` of the words is resampled, or whose states are
    re-noised.
    """
    share = request.number(strength, "strength", 0.0, 1.0)
    edits = request.whole(num, "edits", 1, request.SAMPLES)
    checkpoint = catalogue.load(model)
    level = _level(target, as_flow(checkpoint.model, NO_LATENTS))
    kind = Redraw(strength=share) if level is None else Renoise(level=level, strength=share)
    reading, where = (
        request.reading(checkpoint.tokenizer, text),
        () if level is None else ("--level", level),
    )
    numbers = ("--strength", f"{share:g}", "--num", edits, "--seed", request.seed(seed))
    command = asked("edit", model, "--text", reading.given, *where, *numbers)
    yield from _compared(command, checkpoint, reading, edits, seed, kind.apply)


def _level(target: Any, model: TarFlowLM) -> int | None:
    """The state that a target names, or None for words."""
    return {WORDS: None, LATENTS: 0, NOISE: model.num_blocks}[request.choice(target, TARGETS)]


def _edited(
    checkpoint: Checkpoint, tokens: Tensor, edits: int, seed: Any, change: Callable[[Source], R]
) -> Generator[str, None, tuple[R, float]]:
    """Pages of the progress; returns the result of `change` for so many `edits` of a text [T], and
    its seconds.
    """
    flow, tokenizer = as_flow(checkpoint.model, NO_LATENTS), checkpoint.tokenizer
    generator = request.generator(seed)

    def work(job: Job[R]) -> R:
        text = encode(flow, tokens[None], generator).repeated(edits)
        return change(Source(flow, tokenizer, text, generator, job))

    job = Job(work)
    shown = stage(text_tokens(tokens, tokenizer))
    result = yield from job.follow(lambda: page(card(shown, muted(job.doing("editing")))))
    return result, job.seconds


def _compared(
    command: str,
    checkpoint: Checkpoint,
    reading: Reading,
    edits: int,
    seed: Any,
    change: Callable[[Source], Edit],
) -> Iterator[str]:
    """HTML of the progress, then of an `Edit`, every text beside the original."""
    tokenizer = checkpoint.tokenizer
    edit, seconds = yield from _edited(checkpoint, reading.tokens, edits, seed, change)
    before, cards = edit.before[0].cpu(), []
    for after, changed, old, new in zip(
        edit.tokens.cpu(), edit.changed, edit.bound_before, edit.bound, strict=True
    ):
        count = f"{int(changed.sum())} of {counted(len(changed), 'token')} changed"
        was = f"bits per character, ≤ {_bits(old, before, tokenizer):.2f} before"
        numbers = facts(("", count), (f"≤ {_bits(new, after, tokenizer):.2f}", was))
        cards.append(card(stage(text_tokens(after, tokenizer, before=before)), numbers))
    yield page(command, _original(tokenizer, reading), *cards, card(facts(took(seconds))))


def _original(tokenizer: Tokenizer, reading: Reading) -> str:
    note = f"the original, {reading.notice}" if reading.notice else "the original"
    return card(stage(text_tokens(reading.tokens, tokenizer)), muted(note))


def _bits(nats: Tensor, tokens: Tensor, tokenizer: Tokenizer) -> float:
    """Bits per character of a text [T] with this bound, a scalar, in nats."""
    return bits(nats.cpu()).item() / request.num_characters(tokenizer, tokens)
