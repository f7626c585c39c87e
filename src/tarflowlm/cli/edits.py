"""The edits of `tarflowlm edit`."""

import shlex
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from tarflowlm.cli.edit import Args
from tarflowlm.cli.options import load_checkpoint
from tarflowlm.config import checked_seed
from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import read
from tarflowlm.editing import (
    Edit,
    Encoded,
    blend,
    encode,
    interpolate,
    renoise,
    rewrite,
    substitute,
    telling_level,
    token_costs,
)
from tarflowlm.editing.words import (
    Span,
    blended_spans,
    count_of,
    find_piece,
    joined,
    pick_stretch,
    pick_words,
    words_of,
)
from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import bits
from tarflowlm.model import TarFlowLM, as_flow
from tarflowlm.progress import Progress
from tarflowlm.runs.released import choose_directory
from tarflowlm.terminal.bars import Bars
from tarflowlm.terminal.tables import print_json, print_notice
from tarflowlm.terminal.texts import print_edits

STRENGTH, CANDIDATES, TEMPERATURE, WEIGHT = 0.1, 32, 0.7, 0.5
"""What holds where nothing is given."""
MUCH_CHANGED, MUCH_LONGER = 0.5, 1.25
"""An edit of a state that changes more than this share of the tokens, or multiplies the bits by more than this, comes
with a note on what keeps a text."""


def run_edit(args: Args) -> None:
    directory = choose_directory(args.directory, args.model)
    checkpoint = load_checkpoint(directory, args.device)
    refusal = f"{directory} is a discrete baseline, which has no latents to edit: give a flow"
    model = as_flow(checkpoint.model, refusal)
    tokenizer = checkpoint.tokenizer
    generator = torch.Generator().manual_seed(checked_seed(args.seed))
    # once for every edit: all of them start from the same latents
    texts = [encode(model, t[None], generator).repeated(args.num) for t in _texts(args, tokenizer)]
    with Bars() as bars:
        edit = _edited(args, model, tokenizer, texts, generator, bars)
    _show(args, edit, tokenizer, _advice(args, edit, model))


def _texts(args: Args, tokenizer: Tokenizer) -> list[Tensor]:
    """Tokens [tokens] of the text, and of the text to move toward if there is one: the longer one is cut."""
    readings = [read(tokenizer, args.text, normalize=args.normalize)]
    if args.toward is not None:
        readings.append(read(tokenizer, args.toward, name="other text", normalize=args.normalize))
    for reading in readings:
        if reading.notice:
            print_notice(reading.notice)
    texts = [reading.tokens for reading in readings]
    shortest = min(map(len, texts))
    for name, text in zip(("text", "other text"), texts, strict=False):
        if len(text) > shortest:
            print_notice(f"the {name} is cut from {len(text)} to {shortest} tokens, the length of the other")
    return [text[:shortest] for text in texts]


def _edited(
    args: Args,
    model: TarFlowLM,
    tokenizer: Tokenizer,
    texts: Sequence[Encoded],
    generator: torch.Generator,
    progress: Progress,
) -> Edit:
    """The edit of the first text; a second one is what it moves toward."""
    text, *others = texts
    num_positions = text.tokens.shape[1] // model.config.patch
    # where block 1 has no weights of tokens, the model is sampled as it is
    usual = TEMPERATURE if model.config.has_token_weights else 1.0

    def redrawing() -> dict[str, Any]:
        return {
            "candidates": CANDIDATES if args.candidates is None else args.candidates,
            "temperature": usual if args.temperature is None else args.temperature,
            "level": telling_level(model, text.row(0)),
            "generator": generator,
        }

    if args.replace is not None:
        wanted = _replacements(args, tokenizer, text)
        progress.stage("editing, positions", num_positions)
        return substitute(model, text, wanted, generator=generator, progress=progress)
    if others:
        (other,) = others
        weight = WEIGHT if args.weight is None else args.weight
        if args.level is None:
            spans = _blended(text, other, tokenizer, weight, args.num, generator)
            progress.stage("redrawing, texts", args.num)
            return blend(model, text, other, spans, progress=progress, **redrawing())
        progress.stage("editing, positions", args.level * num_positions)
        return interpolate(
            model, text, other, level=args.level, weight=weight, generator=generator, decoder=args.decoder or "auto",
            progress=progress,
        )  # fmt: skip
    strength = STRENGTH if args.strength is None else args.strength
    if args.level is None:
        chosen_spans = _redrawn(args, model, tokenizer, text, strength, generator)
        # pieces that are named are meant; a word that was picked may as well be another
        spare = [] if args.rewrite is not None else words_of(_pieces(text, tokenizer))
        progress.stage("redrawing, pieces", sum(map(len, chosen_spans)))
        return rewrite(model, text, chosen_spans, spare=spare, progress=progress, **redrawing())
    progress.stage("editing, positions", args.level * num_positions)
    where = None
    if args.words is not None:
        (chosen_words,) = _picked(args, model, tokenizer, text, args.words, 1, generator)
        where = torch.zeros(text.tokens.shape[1], dtype=torch.bool)
        for start, stop in chosen_words:
            where[start:stop] = True
    return renoise(
        model, text, level=args.level, strength=strength, generator=generator, where=where,
        decoder=args.decoder or "auto", progress=progress,
    )  # fmt: skip


def _pieces(text: Encoded, tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every token of the (first) text."""
    return [tokenizer.token_bytes[token] for token in text.tokens[0, : text.length].tolist()]


def _redrawn(
    args: Args,
    model: TarFlowLM,
    tokenizer: Tokenizer,
    text: Encoded,
    strength: float,
    generator: torch.Generator,
) -> list[list[Span]]:
    """The spans that each edit redraws."""
    parts = _pieces(text, tokenizer)
    if args.rewrite is not None:
        if not args.rewrite:
            raise UserError("--rewrite names no piece of the text: give at least one")
        pieces = [_piece(args, tokenizer, piece, "piece") for piece in args.rewrite]
        return [sorted(find_piece(parts, piece) for piece in pieces)] * args.num
    words = words_of(parts)
    if not words:
        raise UserError(f"the text {args.text!r} has no words: give some, or name a piece of it with --rewrite")
    count = count_of(strength, words) if args.words is None else args.words
    picked = _picked(args, model, tokenizer, text, count, args.num, generator)
    return [joined(row, words) for row in picked]


def _picked(
    args: Args,
    model: TarFlowLM,
    tokenizer: Tokenizer,
    text: Encoded,
    count: int,
    num: int,
    generator: torch.Generator,
) -> list[list[Span]]:
    words = words_of(_pieces(text, tokenizer))
    costs = token_costs(model, text)[0].tolist() if args.pick == "unlikely" else None
    return [pick_words(words, count, text.length, generator, costs=costs) for _ in range(num)]


def _blended(
    text: Encoded, other: Encoded, tokenizer: Tokenizer, weight: float, num: int, generator: torch.Generator
) -> list[tuple[list[Span], list[Span]]]:
    """What each edit takes from the other text, and what it keeps of this one."""
    first, second = (words_of(_pieces(one, tokenizer)) for one in (text, other))
    count = round(weight * len(second))
    taken = [pick_stretch(second, count, generator) for _ in range(num)]
    return [blended_spans(first, second, row, text.length) for row in taken]


def _piece(args: Args, tokenizer: Tokenizer, text: str, name: str) -> str:
    return read(tokenizer, text, name=name, normalize=args.normalize).text.strip()


def _replacements(args: Args, tokenizer: Tokenizer, text: Encoded) -> torch.Tensor:
    assert args.replace is not None
    parts = _pieces(text, tokenizer)
    names = ("text to replace", "replacement")
    old, new = (_piece(args, tokenizer, part, name) for part, name in zip(args.replace, names, strict=True))
    start, stop = find_piece(parts, old)
    # with what else is in these tokens: those of word pieces begin with a space
    held = b"".join(parts[start:stop]).decode("utf-8", errors="replace")
    tokens = torch.from_numpy(tokenizer.encode(held.replace(old, new, 1)))
    if len(tokens) != stop - start:
        count = f"{stop - start} token{'s' * (stop - start != 1)}"
        raise UserError(
            f"{held!r} has {count}, with {new!r} in its place {len(tokens)}, and these must agree: choose words of "
            f"{count}, or let the model choose them, with --rewrite {shlex.quote(old)} in place of --replace"
        )
    replacements = torch.full((text.length,), -1)
    replacements[start:stop] = tokens
    return replacements


def _show(args: Args, edit: Edit, tokenizer: Tokenizer, advice: str | None) -> None:
    def per_character(nats: torch.Tensor, tokens: torch.Tensor) -> list[float]:
        characters = torch.as_tensor(tokenizer.characters_per_token)[tokens.cpu()].sum(-1)
        return (bits(nats.cpu()) / characters).tolist()

    texts = [tokenizer.decode(row) for row in edit.tokens.tolist()]
    old, new = per_character(edit.bound_before, edit.before), per_character(edit.bound, edit.tokens)
    if args.json:
        before = tokenizer.decode(edit.before[0].tolist())
        rows = zip(texts, edit.changed.tolist(), old, new, strict=True)
        print_json(
            {
                "before": before,
                "edits": [
                    {"text": text, "changed": changed, "bpc_before": a, "bpc": b} for text, changed, a, b in rows
                ],
                "advice": advice,
            }
        )
        return
    notes = [
        f"{sum(changed)} of {len(changed)} tokens changed; bits per character <= {a:.3f} before, <= {b:.3f} now"
        for changed, a, b in zip(edit.changed.tolist(), old, new, strict=True)
    ]
    print_edits(Console(), tokenizer, edit.before[0], edit.tokens, notes, advice)


def _advice(args: Args, edit: Edit, model: TarFlowLM) -> str | None:
    """What works better than an edit that has lost the text, or changed nothing of what it was to change."""
    if args.rewrite is not None and not edit.changed.any():
        more = "more --candidates" + " or a higher --temperature" * model.config.has_token_weights
        return f"all candidates were what is there: {more} may find others"
    weight = 0.0 if args.toward is None else WEIGHT if args.weight is None else args.weight
    if args.level is None or weight == 1:
        return None
    changed, times = edit.changed.double().mean().item(), (edit.bound.sum() / edit.bound_before.sum()).item()
    # of a text that is to move, a part has to change
    if changed <= weight + (1 - weight) * MUCH_CHANGED and times <= MUCH_LONGER:
        return None
    better = "some words are redrawn" if args.toward is None else "a stretch of the other text is taken"
    return (
        f"state {args.level} does not steer this text ({changed:.0%} of the tokens changed, bits x {times:.2f}): "
        f"without --level {better} and the rest stays"
    )
