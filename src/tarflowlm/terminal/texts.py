"""Samples and edits: panels on a terminal, plain text elsewhere, objects for --json."""

import re
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.editing.edits import Edited
from tarflowlm.errors import counted
from tarflowlm.generation.particles import UNRELIABLE
from tarflowlm.generation.texts import Written
from tarflowlm.model import TarFlowLM
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.terminal.bars import print_notice
from tarflowlm.terminal.grid import Kind, Token, pass_rows, text_tokens

STYLES: dict[Kind, str] = {"given": "underline", "final": "", "changed": "green", "noise": "dim"}


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
    states = passes_of(written, lm) if passes else []
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
                # of 1, 2, ... tokens
                likeliest = sorted(enumerate(lengths[row].tolist(), 1), key=lambda one: -one[1])
                shown = (f"{counted(length, 'token')} {p:.0%}" for length, p in likeliest[:4])
                print_notice(f"  gap {gap}: {', '.join(shown)}")
        evidence = generation.evidence
        if written.particles == 1 or evidence is None:
            continue
        print_notice(
            f"  effective sample size {evidence.ess[row]:.1f} of {written.particles} candidates; "
            f"the given text has log p about {evidence.log_evidence[row]:.1f} nats"
        )
        k = evidence.pareto_k[row]
        if k > UNRELIABLE:  # NaN is not
            print_notice(f"  unreliable (Pareto k {k:.2f}): use more --particles")


def passes_of(written: Written, lm: Checkpoint) -> Sequence[Tensor]:
    """The samples decoded after every block, each [num, T]; none of a baseline."""
    return written.generation.passes(lm.model) if isinstance(lm.model, TarFlowLM) else ()


def samples_to_json(
    written: Written, lm: Checkpoint, *, passes: bool = False
) -> list[dict[str, object]]:
    """One object per sample: its text, on request its passes, and weights if text was given."""
    generation = written.generation
    shown = passes_of(written, lm) if passes else []
    samples: list[dict[str, object]] = []
    for row, text in enumerate(written.texts):
        sample: dict[str, object] = {"text": text, "ended": written.streams[row].has_ended}
        if passes:
            cut = [one[row, : written.lengths[row]] for one in shown]
            sample["passes"] = [lm.tokenizer.decode(tokens.tolist()) for tokens in cut]
        if generation.evidence is not None:
            for name in ("log_evidence", "ess", "draws", "pareto_k"):
                sample[name] = getattr(generation.evidence, name)[row].item()
        if generation.filled is not None and generation.filled.lengths:
            sample["lengths"] = [one[row].tolist() for one in generation.filled.lengths]
        samples.append(sample)
    return samples


def print_edits(edited: Edited, tokenizer: Tokenizer, advice: str | None) -> None:
    """The text, each of its edits with the changes highlighted and a note, and the advice."""
    edit = edited.change
    if Console().is_terminal:
        show(styled(text_tokens(edit.before[0], tokenizer)), "text")
    for row, tokens in enumerate(edit.tokens):
        changed = edit.changed[row]
        note = (
            f"{int(changed.sum())} of {counted(len(changed), 'token')} changed; bits per character "
            f"<= {edited.bits_before[row]:.3f} before, <= {edited.bits[row]:.3f} now "
            "(fewer: likelier to the model)"
        )
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
