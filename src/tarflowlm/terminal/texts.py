"""Samples and edits: panels on a terminal, plain text elsewhere, objects for --json."""

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from tarflowlm.data import Tokenizer
from tarflowlm.errors import counted
from tarflowlm.generation.particles import is_rough
from tarflowlm.generation.sampling import Evidence
from tarflowlm.generation.texts import Written
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.terminal.bars import print_notice
from tarflowlm.terminal.tokens import Kind, Token, pass_rows, text_tokens

if TYPE_CHECKING:  # a written text needs no edits
    from tarflowlm.editing.edits import Edited

STYLES: dict[Kind, str] = {
    "given": "underline",
    "final": "",
    "changed": "green",
    "noise": "dim",
    "open": "dim",
}


def printable(text: str) -> str:
    """The text without control characters, which a terminal takes for commands.

    Tabs and line ends stay.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def write_out(piece: str) -> None:
    """A piece of text to stdout at once."""
    sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def print_samples(written: Written, lm: Checkpoint, *, passes: bool = False) -> None:
    """Print every sample, on request with its passes, and the weights of several candidates."""
    generation = written.generation
    states = generation.passes(lm.model) if passes else ()
    for row, (number, text) in enumerate(zip(written.rows, written.texts, strict=True)):
        body = Text(printable(text))
        if passes:
            rows = pass_rows([state[row, : written.lengths[row]] for state in states], lm.tokenizer)
            parts = [
                Text.assemble((f"{one.label}\n", "bold cyan"), styled(one.tokens)) for one in rows
            ]
            body = Text("\n").join(parts)
        show(body, f"sample {number + 1}", is_first=number == 0)
        if generation.filled is not None:
            for gap, lengths in enumerate(generation.filled.lengths, 1):
                # lengths of 1, 2, ... tokens
                likeliest = sorted(enumerate(lengths[row].tolist(), 1), key=lambda one: -one[1])
                shown = (f"{counted(length, 'token')} {p:.0%}" for length, p in likeliest[:4])
                print_notice(f"  gap {gap}: {', '.join(shown)}")
        evidence = generation.evidence
        if written.particles == 1 or evidence is None:
            continue
        print_notice(f"  {trust(evidence, slice(row, row + 1))}")


def trust(evidence: Evidence, rows: slice, remedy: str | None = None) -> str:
    """How many candidates the choice of a text rests on; the least and the most of several."""
    R = evidence.particles[rows]
    # of gaps each length is a candidate
    ess = evidence.ess[rows].clamp(max=R)
    counts = dict.fromkeys((f"{ess.min():.1f}", f"{ess.max():.1f}"))
    words = f"rests on about {' to '.join(counts)} independent candidates of {R.max()}"
    if not is_rough(evidence)[rows].any():
        return words
    return f"{words}, which is rough; {remedy or f'try --particles {4 * R.max()}'}"


def samples_to_json(
    written: Written, lm: Checkpoint, *, passes: bool = False
) -> list[dict[str, object]]:
    """One object per sample: its text, on request its passes, and how far candidates agree."""
    generation = written.generation
    shown = generation.passes(lm.model) if passes else ()
    samples: list[dict[str, object]] = []
    for row, text in enumerate(written.texts):
        sample: dict[str, object] = {"text": text, "ended": written.streams[row].has_ended}
        if passes:
            cut = [one[row, : written.lengths[row]] for one in shown]
            sample["passes"] = [lm.tokenizer.decode(tokens.tolist()) for tokens in cut]
        if generation.evidence is not None and written.particles > 1:
            for name in ("log_evidence", "ess", "draws", "pareto_k", "particles"):
                sample[name] = getattr(generation.evidence, name)[row].item()
        if generation.filled is not None and generation.filled.lengths:
            sample["lengths"] = [one[row].tolist() for one in generation.filled.lengths]
        samples.append(sample)
    return samples


def print_edits(edited: "Edited", tokenizer: Tokenizer, advice: str | None) -> None:
    """The text, each of its edits with the changes highlighted and a note, and the advice."""
    edit = edited.change
    sign = "<=" if edit.states else "="
    is_terminal = Console().is_terminal
    if is_terminal:
        show(styled(text_tokens(edit.before[0], tokenizer)), "text")
    for row, tokens in enumerate(edit.tokens):
        changed = edit.changed[row]
        note = (
            f"{int(changed.sum())} of {counted(len(changed), 'token')} changed; bits per character "
            f"{sign} {edited.bits_before:.3f} before, {sign} {edited.bits[row]:.3f} now "
            "(fewer: likelier to the model)"
        )
        body = Text(printable(edited.texts[row]))
        if is_terminal:
            body = styled(text_tokens(tokens, tokenizer, {"changed": changed}))
        show(body, f"edit {row + 1}", note, is_first=row == 0)
    if advice is not None:
        print_notice(advice)


def styled(tokens: Sequence[Token]) -> Text:
    """Tokens in the colours of their kinds."""
    return Text.assemble(*((token.symbol, STYLES[token.kind]) for token in tokens))


def show(body: Text, title: str, note: str | None = None, *, is_first: bool = True) -> None:
    """A text in a panel on a terminal; elsewhere alone, after an empty line unless it `is_first`.

    The note is below it, on stderr.
    """
    console = Console()
    if console.is_terminal:
        console.print(Panel(body, title=title, title_align="left"))
        if note is not None:
            print_notice(note)
        return
    if not is_first:
        sys.stdout.write("\n")
    sys.stdout.write(f"{body.plain}\n")
    if note is not None:
        print_notice(f"{title}: {note}")
