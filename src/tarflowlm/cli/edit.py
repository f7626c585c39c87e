"""`tarflowlm edit`."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from tarflowlm.cli import options
from tarflowlm.cli.options import arg
from tarflowlm.config import Decoder
from tarflowlm.errors import UserError

MUCH_CHANGED, MUCH_LONGER = (
    0.5,
    1.25,
)  # share of changed tokens, ratio of bits: above these an edit gets advice
KINDS = ("rewrite", "replace", "counterfactual", "toward")
"""Options that name the edit; without one it is "level" or "words"."""


@dataclass(frozen=True)
class Args:
    """Draw some words of a text anew, given all others. Or --rewrite pieces of it, --replace OLD
    NEW, move it --toward another text, or change one of its states in latent space (--level).
    """

    text: Annotated[str, arg("TEXT")]  # The text to edit.
    directory: options.Model = None
    model: options.ModelName = None
    strength: options.Number = None
    """Share of the words to draw anew, given all the others: 0 keeps the text, 0.1 (the default)
    changes a word here and there, 1 leaves none. With --level: how much noise the states get.
    """
    words: options.Count = (
        None  # Number of words to draw anew, not a share. With --level: only so many get noise.
    )
    pick: Annotated[Literal["random", "unlikely"] | None, arg()] = None
    """Words to draw anew: random ones (the default), or the most unlikely ones."""
    rewrite: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], arg("PIECE")] = ()
    """Draw this piece of the text anew, a word or more, given everything else. May be given several
    times.
    """
    everywhere: options.Flag = False  # With --rewrite: every occurrence, as whole words.
    candidates: options.Count = None
    """Candidates for every piece that is drawn anew (32). One is taken by how well the rest of the text
    follows it.
    """
    temperature: Annotated[
        float | None, arg("FLOAT", f"Of the candidates (0.7): {options.TEMPERATURE}")
    ] = None
    toward: options.Text = None
    """Take a stretch of this text of the same length, in its place, and redraw the words it cuts.
    With --level: interpolate between the states of the two texts.
    """
    weight: options.Number = (
        None  # With --toward: the share of words to take (0.5); 0 is the text, 1 the other text.
    )
    replace: Annotated[tuple[str, str] | None, arg("OLD NEW")] = None
    """Put NEW where OLD first stands, as a word if it is one. The rest is kept, but for the
    neighbouring words, which may be drawn anew.
    """
    around: options.Number = None  # With --replace: so many words on each side (1); 0 keeps them.
    counterfactual: Annotated[tuple[str, str] | None, arg("OLD NEW")] = None
    """Put NEW, of as many tokens, where OLD first stands, and regenerate what follows from its
    noise.
    """
    level: options.Count = None
    """Change a state in latent space, as in the paper: 0 is the latents, the number of blocks is
    the noise. Adds noise by h -> sqrt(1 - s^2) h + s eps with s the strength, or interpolates.
    """
    # Number of edits, each with its own noise.
    num: int = 1
    seed: int = 0  # The same seed gives the same edits.
    decoder: Annotated[Decoder | None, arg()] = None
    """With --level: how to invert a block: position by position, in parallel sweeps, or by the
    cheaper of the two (auto, the default).
    """
    normalize: options.Normalize = None
    device: options.Device = "auto"
    json: options.PrintJson = False

    def __post_init__(self) -> None:
        exclusive: dict[str, tuple[str, ...]] = {
            "rewrite": ("toward", "replace", "counterfactual"),
            "toward": ("replace", "counterfactual"),
            "replace": ("counterfactual",),
        }
        if self.kind == "words":
            exclusive["words"] = ("strength",)
        needed = {"everywhere": ("rewrite",), "around": ("replace",)}
        if self.kind == "level":
            needed["pick"] = ("words",)
        options.check(self, ("num", "candidates", "words"), exclusive, needed)

    @property
    def kind(self) -> str:
        """The name of the edit in `editing.EDITS`."""
        if self.toward is not None and self.level is not None:
            return "interpolate"
        given = (name for name in KINDS if getattr(self, name))
        return next(given, "words" if self.level is None else "level")


def run(args: Args) -> None:
    import torch
    from rich.console import Console

    from tarflowlm.checks import checked_seed
    from tarflowlm.data.prompts import Reading, read
    from tarflowlm.editing import EDITS, Source, common_length, encode, options_of
    from tarflowlm.evaluation.likelihood import bits
    from tarflowlm.generation.particles import UNRELIABLE
    from tarflowlm.model import as_flow
    from tarflowlm.runs.hub import choose_directory
    from tarflowlm.terminal.bars import Bars, print_json, print_notice
    from tarflowlm.terminal.texts import print_edits

    used = options_of(args.kind)
    given: dict[str, Any] = {}
    for name in (
        "strength",
        "words",
        "pick",
        "candidates",
        "temperature",
        "weight",
        "level",
        "decoder",
    ):
        if (value := getattr(args, name)) is not None:
            if name not in used:
                raise UserError(f"--{name} has no effect on this edit ({args.kind}): leave it out")
            given[name] = value
    directory = choose_directory(args.directory, args.model)
    checkpoint = options.load_checkpoint(directory, args.device)
    refusal = f"{directory} is a discrete baseline, which has no latents to edit: give a flow"
    model, tokenizer = as_flow(checkpoint.model, refusal), checkpoint.tokenizer

    def reading_of(text: str, name: str) -> Reading:
        return read(tokenizer, text, name=name, normalize=args.normalize)

    readings = {"text": reading_of(args.text, "text")}
    if args.toward is not None:
        readings["other text"] = reading_of(args.toward, "other text")
    if args.everywhere:
        given["everywhere"] = True
    if args.around is not None:
        given["around"] = int(args.around)
    if args.rewrite:
        given["pieces"] = [reading_of(text, "piece").text.strip() for text in args.rewrite]
    if (pair := args.replace or args.counterfactual) is not None:
        for key, text, name in zip(
            ("old", "new"), pair, ("text to replace", "replacement"), strict=True
        ):
            given[key] = reading_of(text, name).text.strip()
    tokens, *more = (reading.tokens for reading in readings.values())
    length = common_length(tokens, more[0]) if more else len(tokens)
    for name, reading in readings.items():
        if reading.notice is not None:
            print_notice(reading.notice)
        if len(reading.tokens) > length:
            print_notice(
                f"the {name} is cut from {len(reading.tokens)} to {length} tokens, the length of the other"
            )
    generator = torch.Generator().manual_seed(checked_seed(args.seed))
    # once for every edit: all of them start from the same latents
    source, *others = (
        encode(model, reading.tokens[None, :length], generator) for reading in readings.values()
    )
    if others:
        given["other"] = others[0]
    with Bars() as bars:
        edit = EDITS[args.kind](
            Source(model, tokenizer, source.repeated(args.num), generator, bars), **given
        )
    characters = torch.from_numpy(tokenizer.characters_per_token)
    bpc_before = bits(edit.bound_before.cpu()) / characters[edit.before.cpu()].sum(-1)
    bpc = bits(edit.bound.cpu()) / characters[edit.tokens.cpu()].sum(-1)
    texts = [tokenizer.decode(tokens) for tokens in edit.tokens.tolist()]
    measured = {"changed": edit.changed, "bpc_before": bpc_before, "bpc": bpc}
    columns: dict[str, Any] = {"text": texts} | {
        name: column.tolist() for name, column in measured.items()
    }
    if edit.pareto_k:
        columns["pareto_k"] = edit.pareto_k
    edits = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    changed, ratio = (
        edit.changed.double().mean().item(),
        (edit.bound.sum() / edit.bound_before.sum()).item(),
    )
    advice = _advice(args, changed, ratio, has_token_weights=model.config.has_token_weights)
    if advice is None and (unreliable := [k for k in edit.pareto_k if k > UNRELIABLE]):
        advice = (
            f"the weights of the candidates have no finite variance (k = {max(unreliable):.2f}): "
        )
        advice += "the choice between them is unreliable, shorter pieces may do better"
    if args.json:
        print_json(
            {"before": tokenizer.decode(edit.before[0].tolist()), "edits": edits, "advice": advice}
        )
        return
    notes = []
    for one in edits:
        bounds = f"bits per character <= {one['bpc_before']:.3f} before, <= {one['bpc']:.3f} now"
        notes.append(f"{sum(one['changed'])} of {len(one['changed'])} tokens changed; {bounds}")
    print_edits(Console(), tokenizer, edit, notes, advice)


def _advice(args: Args, changed: float, ratio: float, *, has_token_weights: bool) -> str | None:
    """A better option where the edits have lost the text, or changed nothing; `ratio` of bits after
    and before.
    """
    if args.rewrite and changed == 0:
        more = "more --candidates" + " or a higher --temperature" * has_token_weights
        return f"all candidates equal the text: {more} may find others"
    weight = 0.0 if args.toward is None else 0.5 if args.weight is None else args.weight
    if args.level is None or weight == 1:
        return None
    # a part of a text that moves has to change
    if changed <= weight + (1 - weight) * MUCH_CHANGED and ratio <= MUCH_LONGER:
        return None
    fewer = (
        "some words are drawn anew"
        if args.toward is None
        else "a stretch of the other text is taken"
    )
    much = f"({changed:.0%} of the tokens, bits x {ratio:.2f})"
    return f"editing state {args.level} changes nearly everything here {much}. Without --level only {fewer}."
