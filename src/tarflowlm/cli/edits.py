"""The edits of `tarflowlm edit`."""

from collections.abc import Sequence
from dataclasses import fields

import torch
from rich.console import Console
from torch import Tensor

from tarflowlm.cli.edit import Args
from tarflowlm.cli.options import load_checkpoint
from tarflowlm.config import checked_seed
from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import read
from tarflowlm.editing import EDITS, Edit, Source, Toward, encode
from tarflowlm.evaluation.likelihood import bits
from tarflowlm.model import TarFlowLM, as_flow
from tarflowlm.progress import Progress
from tarflowlm.runs.released import choose_directory
from tarflowlm.terminal.bars import Bars
from tarflowlm.terminal.tables import print_json, print_notice
from tarflowlm.terminal.texts import print_edits

MUCH_CHANGED, MUCH_LONGER = 0.5, 1.25
"""An edit of a state that changes more than this share of the tokens, or multiplies the bits by more than this, comes
with a note on what keeps a text."""


def run_edit(args: Args) -> None:
    directory = choose_directory(args.directory, args.model)
    checkpoint = load_checkpoint(directory, args.device)
    refusal = f"{directory} is a discrete baseline, which has no latents to edit: give a flow"
    model = as_flow(checkpoint.model, refusal)
    tokenizer = checkpoint.tokenizer
    texts = _texts(args, tokenizer)
    with Bars() as bars:
        edit = _edited(args, tokenizer, model, texts, bars)
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


def _edited(args: Args, tokenizer: Tokenizer, model: TarFlowLM, texts: Sequence[Tensor], progress: Progress) -> Edit:
    """The edit of the first text; a second one is what it moves toward."""
    generator = torch.Generator().manual_seed(checked_seed(args.seed))
    text, *others = (encode(model, tokens[None], generator) for tokens in texts)

    def piece(text: str, name: str) -> str:
        return read(tokenizer, text, name=name, normalize=args.normalize).text.strip()

    kind = args.kind
    names = {field.name for field in fields(EDITS[kind])}
    options = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    if args.rewrite is not None:
        options["pieces"] = [piece(text, "piece") for text in args.rewrite]
    if args.replace is not None:
        old, new = args.replace
        options |= {"old": piece(old, "text to replace"), "new": piece(new, "replacement")}
    if others:
        options["other"] = others[0]
    source = Source(model, tokenizer, text.repeated(args.num), generator, progress)
    return EDITS[kind](**options).apply(source)


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
        more = (
            "more --candidates or a higher --temperature" if model.config.has_token_weights else "more --candidates"
        )
        return f"all candidates were what is there: {more} may find others"
    weight = 0.0 if args.toward is None else Toward.weight if args.weight is None else args.weight
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
