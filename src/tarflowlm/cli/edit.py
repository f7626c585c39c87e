"""`tarflowlm edit`: a text changed in latent space."""

from collections.abc import Callable

import torch
from rich.console import Console

from tarflowlm.cli.arguments import EditArgs
from tarflowlm.cli.models import load_checkpoint
from tarflowlm.data import Tokenizer
from tarflowlm.device import pick_device
from tarflowlm.editing import Edit, Encoded, encode, interpolate, renoise, substitute
from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import bits
from tarflowlm.model import TarFlowLM, as_flow
from tarflowlm.runs.config import checked_seed
from tarflowlm.runs.released import chosen
from tarflowlm.terminal.bars import sampling_bar
from tarflowlm.terminal.tables import print_json
from tarflowlm.terminal.texts import print_edits


def run_edit(args: EditArgs) -> None:
    directory = chosen(args.directory, args.model)
    checkpoint = load_checkpoint(directory, pick_device(args.device))
    refusal = f"{directory} is a discrete baseline, which has no latents to edit: give a flow"
    model = as_flow(checkpoint.model, refusal)
    tokenizer = checkpoint.tokenizer.with_normalization(args.normalize)
    generator = torch.Generator().manual_seed(checked_seed(args.seed))
    tokens = _tokens(args, tokenizer, args.text, "text")
    with sampling_bar(Console(stderr=True), model, len(tokens)) as tick:
        text = encode(model, tokens.expand(args.num, -1), generator)
        edit = _edited(args, model, tokenizer, text, tokens, generator, tick)
    _show(args, edit, tokenizer)


def _tokens(args: EditArgs, tokenizer: Tokenizer, text: str, name: str) -> torch.Tensor:
    prepared = text if args.normalize is None else tokenizer.prepare(text)
    if not prepared:
        raise UserError(f"the {name} is empty: give at least one token")
    return torch.from_numpy(tokenizer.encode(prepared))


def _edited(
    args: EditArgs,
    model: TarFlowLM,
    tokenizer: Tokenizer,
    text: Encoded,
    tokens: torch.Tensor,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> Edit:
    level = model.num_blocks if args.level is None else args.level
    if args.strength is not None:
        return renoise(
            model, text, level=level, strength=args.strength, generator=generator, decoder=args.decoder, tick=tick
        )
    if args.toward is not None:
        toward = _tokens(args, tokenizer, args.toward, "other text")
        other = encode(model, toward.expand(args.num, -1), generator)
        return interpolate(
            model, text, other, level=level, weight=args.weight, generator=generator, decoder=args.decoder, tick=tick
        )
    assert args.replace is not None
    old, new = (_tokens(args, tokenizer, part, "replacement") for part in args.replace)
    if len(old) != len(new):
        raise UserError(f"{args.replace[0]!r} has {len(old)} tokens, {args.replace[1]!r} {len(new)}: they must agree")
    found = (tokens.unfold(0, len(old), 1) == old).all(-1).nonzero() if len(old) <= len(tokens) else tokens[:0]
    if not len(found):
        raise UserError(f"{args.replace[0]!r} does not occur in the text: give a piece of it")
    at = int(found[0])
    replacements = torch.full_like(tokens, -1)
    replacements[at : at + len(new)] = new
    return substitute(model, text, replacements, generator=generator, tick=tick)


def _show(args: EditArgs, edit: Edit, tokenizer: Tokenizer) -> None:
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
            }
        )
        return
    symbols = tokenizer.symbols
    notes = [
        f"{sum(changed)} of {len(changed)} tokens changed; bits per character <= {a:.3f} before, <= {b:.3f} now"
        for changed, a, b in zip(edit.changed.tolist(), old, new, strict=True)
    ]
    shown = [[symbols[i] for i in row] for row in edit.tokens.tolist()]
    print_edits(Console(), [symbols[i] for i in edit.before[0].tolist()], shown, notes)
