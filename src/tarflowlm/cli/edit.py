"""`tarflowlm edit`: a text with some of its words or states changed."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from tarflowlm.cli.options import OfModel, load_checkpoint
from tarflowlm.requests import Edit
from tarflowlm.terminal.bars import Bars, print_json, print_notice

if TYPE_CHECKING:
    from tarflowlm.editing.states import Change

MUCH_CHANGED = 0.5
"""Share of changed tokens above which an edit of a state gets advice."""


@dataclass(frozen=True, kw_only=True)
class Args(OfModel):
    """Resample some words of a text given all others; or --rewrite pieces of it, --replace OLD NEW,
    or change one of its states in latent space (--level).
    """

    edit: Annotated[Edit, tyro.conf.arg(name="", help="")]


def run(args: Args) -> None:
    from tarflowlm.editing.edits import edit
    from tarflowlm.terminal.texts import print_edits

    lm = load_checkpoint(args.directory, args.device)
    with Bars() as bars:
        edited = edit(args.edit, lm, bars)
    if edited.reading.notice is not None:
        print_notice(edited.reading.notice)
    found = "; ".join(advice(args.edit, edited.change) or ()) or None
    if not args.json:
        print_edits(edited, lm.tokenizer, found)
        return
    edits: list[dict[str, object]] = []
    for row, text in enumerate(edited.texts):
        one: dict[str, object] = {
            "text": text,
            "changed": edited.change.changed[row].tolist(),
            "bpc_before": edited.bits_before,
            "bpc": edited.bits[row].item(),
        }
        if edited.change.pareto_k:
            one["pareto_k"] = edited.change.pareto_k[row]
        edits.append(one)
    print_json({"before": edited.reading.text, "edits": edits, "advice": found})


def advice(request: Edit, change: "Change") -> tuple[str, str] | None:
    """The flaw of the edits, and an option that helps; None for good ones."""
    from tarflowlm.generation.particles import UNRELIABLE

    changed = change.changed.float().mean().item()
    if request.kind == "rewrite" and changed == 0:
        return "all candidates equal the text", "more --candidates may find others"
    if request.level is not None and changed > MUCH_CHANGED:
        what = f"editing state {request.level} changes {changed:.0%} of the tokens"
        return what, "without --level only some words are resampled"
    rough = [str(row) for row, k in enumerate(change.pareto_k, 1) if k > UNRELIABLE]
    if rough:
        which = f"edit {rough[0]}" if len(rough) == 1 else f"edits {', '.join(rough)}"
        what = f"{which}: the choice rests on few of the candidates, and is rough"
        return what, "try shorter pieces or more --candidates"
    return None
