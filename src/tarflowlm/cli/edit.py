"""`tarflowlm edit`: a text with some of its words or states changed."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tarflowlm.cli import options
from tarflowlm.cli.options import arg
from tarflowlm.config import Decoder
from tarflowlm.terminal.bars import Bars, print_json, print_notice

if TYPE_CHECKING:
    from tarflowlm import editing
    from tarflowlm.texts import Edit

MUCH_CHANGED = 0.5
"""Share of changed tokens above which an edit of a state gets advice."""


@dataclass(frozen=True)
class Args:
    """Draw some words of a text anew, given all others. Or --rewrite pieces of it, --replace OLD
    NEW, move it --toward another text, or change one of its states in latent space (--level).
    """

    text: Annotated[str, arg("TEXT")]  # The text to edit.
    directory: options.Model = None
    strength: options.Number = None
    """Share of the words to draw anew, given all the others: 0 keeps the text, 0.1 (the default)
    changes a word here and there, 1 leaves none. With --level: how much noise the states get.
    """
    # Number of words to draw anew, not a share. With --level: only so many get noise.
    words: options.Count = None
    pick: Annotated[Literal["random", "unlikely"] | None, arg()] = None
    """Words to draw anew: random ones (the default), or the most unlikely ones."""
    rewrite: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], arg("PIECE")] = ()
    """Draw this piece of the text anew, a word or more, given everything else. May be given several
    times.
    """
    everywhere: options.Flag = False  # With --rewrite: every occurrence, as whole words.
    candidates: options.Count = None
    """Candidates for every piece that is drawn anew (32), weighted by the rest of the text."""
    temperature: options.Temperature = None
    toward: options.Text = None
    """Take a stretch of this text instead, and redraw the words it cuts. With --level: interpolate
    between the states of the two texts.
    """
    # With --toward: the share of words to take (0.5); 0 is the text, 1 the other text.
    weight: options.Number = None
    replace: Annotated[tuple[str, str] | None, arg("OLD NEW")] = None
    """Put NEW where OLD first stands, as a word if it is one, and keep the rest."""
    # With --replace: so many words on each side may be drawn anew (1).
    around: options.Count = None
    counterfactual: Annotated[tuple[str, str] | None, arg("OLD NEW")] = None
    """Put NEW, of as many tokens, where OLD first stands, and regenerate what follows from its
    noise.
    """
    level: options.Count = None
    """Change a state in latent space, as in the paper: 0 is the latents, the number of blocks is
    the noise. Adds noise by h -> sqrt(1 - s^2) h + s eps with s the strength, or interpolates.
    """
    num: int = 1  # Number of edits, each with its own noise.
    seed: int = 0  # The same seed gives the same edits.
    decoder: Annotated[Decoder | None, arg()] = None
    """With --level: how to invert a block, see `tarflowlm sample --help`."""
    normalize: options.Normalize = None
    device: options.Device = "auto"
    json: options.PrintJson = False

    def edit(self) -> "Edit":
        """The request."""
        from tarflowlm.texts import Edit

        return Edit(
            text=self.text,
            rewrite=self.rewrite or None,
            everywhere=self.everywhere,
            replace=self.replace,
            around=self.around,
            counterfactual=self.counterfactual,
            toward=self.toward,
            level=self.level,
            strength=self.strength,
            words=self.words,
            pick=self.pick,
            weight=self.weight,
            candidates=self.candidates,
            temperature=self.temperature,
            decoder=self.decoder,
            num=self.num,
            seed=self.seed,
            normalize=self.normalize,
        )


def run(args: Args) -> None:
    from tarflowlm.terminal.texts import print_edits

    request = args.edit()
    lm = options.load_checkpoint(args.directory, args.device)
    with Bars() as bars:
        edited = request.run(lm, bars)
    for notice in edited.notices:
        print_notice(notice)
    advice = _advice(request, edited.edit)
    if not args.json:
        print_edits(edited, advice)
        return
    edits: list[dict[str, object]] = []
    for row, text in enumerate(edited.texts):
        one: dict[str, object] = {
            "text": text,
            "changed": edited.edit.changed[row].tolist(),
            "bpc_before": edited.bits_before[row].item(),
            "bpc": edited.bits[row].item(),
        }
        if edited.edit.pareto_k:
            one["pareto_k"] = edited.edit.pareto_k[row]
        edits.append(one)
    print_json({"before": edited.before, "edits": edits, "advice": advice})


def _advice(request: "Edit", edit: "editing.Edit") -> str | None:
    """A better option where the edits have lost the text, or changed nothing."""
    from tarflowlm.generation.particles import UNRELIABLE

    changed = edit.changed.double().mean().item()
    if request.rewrite is not None and changed == 0:
        return "all candidates equal the text: more --candidates may find others"
    if request.level is not None and request.toward is None and changed > MUCH_CHANGED:
        return (
            f"editing state {request.level} changes {changed:.0%} of the tokens: "
            "without --level only some words are drawn anew"
        )
    unreliable = [k for k in edit.pareto_k if k > UNRELIABLE]
    if unreliable:
        return (
            "few of the candidates count here, so the choice between them is unreliable "
            f"(tail index {max(unreliable):.2f}): try shorter pieces or more --candidates"
        )
    return None
