"""Texts as tokens of several kinds. Samples and edits: panels on a terminal, plain text elsewhere,
objects for --json.
"""

import codecs
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.editing.edits import Edited
from tarflowlm.errors import counted
from tarflowlm.generation.particles import UNRELIABLE
from tarflowlm.generation.texts import Written
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.terminal.bars import print_notice

Kind = Literal["given", "final", "changed", "noise"]
STYLES: dict[Kind, str] = {"given": "underline", "final": "", "changed": "green", "noise": "dim"}
END = "∎"
"""The sign for the end of a document."""


@dataclass(frozen=True)
class Token:
    """One token of a row; the lower its `probability`, the fainter it is."""

    symbol: str
    kind: Kind = "final"
    probability: float = 1.0


@dataclass(frozen=True)
class Row:
    """A text under its label."""

    label: str
    tokens: Sequence[Token]


def symbols(tokens: Tensor, tokenizer: Tokenizer) -> list[str]:
    """Visible strings of tokens [T], which concatenate to the text.

    A character of several tokens is in the last of them; the others are empty.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    places = tokens.tolist()
    found = [decoder.decode(tokenizer.token_bytes[token]) for token in places]
    if found:
        found[-1] += decoder.decode(b"", final=True)
    ended = [token == tokenizer.end for token in places]
    return [END if end else visible(text) for text, end in zip(found, ended, strict=True)]


UNREADABLE = re.compile("[\ufffd\u2400-\u241f]")
"""Parts of characters, and pictures of control characters, which many fonts show as boxes."""
PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {ord("\n"): "↵\n"}


def visible(text: str) -> str:
    """`text` with control characters as pictures; ↵ precedes a new line."""
    shown = ""
    for character in text.translate(PICTURES):
        is_shown = character.isprintable() or character == "\n"
        shown += character if is_shown else character.encode("unicode_escape").decode("ascii")
    return shown


def text_tokens(
    tokens: Tensor,
    tokenizer: Tokenizer,
    kinds: Mapping[Kind, Tensor] = {},
    probabilities: Tensor | None = None,
) -> list[Token]:
    """A text [T]. A token has the first of the `kinds` whose mask [T] is true there, else final."""
    found = []
    for place, symbol in enumerate(symbols(tokens, tokenizer)):
        kind: Kind = next((kind for kind, mask in kinds.items() if mask[place]), "final")
        p = 1.0 if probabilities is None else probabilities[place].item()
        shown = UNREADABLE.sub("·", symbol) if kind == "noise" else symbol
        found.append(Token(shown, kind, p))
    return found


def pass_rows(
    passes: Sequence[Tensor],
    tokenizer: Tokenizer,
    *,
    given: Tensor | None = None,
    probabilities: Sequence[Tensor] | None = None,
) -> list[Row]:
    """One row for each of the `passes` [T] of a text, noise first.

    Tokens where `given` [T] is true are marked in the last row. `probabilities` are [T] for every
    pass.
    """
    rows: list[Row] = []
    before = passes[0]
    last = len(passes) - 1
    for index, tokens in enumerate(passes):
        changed = tokens != before
        count = int(changed.sum())
        noise = tokens != passes[-1] if index > 0 else ~changed
        kinds: dict[Kind, Tensor] = {"changed": changed, "noise": noise}
        if index == last and given is not None:
            kinds = {"given": given, "changed": changed}
        label = f"after block {last - index + 1}: {count} of {len(tokens)} changed"
        p = None if probabilities is None else probabilities[index]
        shown = text_tokens(tokens, tokenizer, kinds, p)
        rows.append(Row(label if index > 0 else "noise", shown))
        before = tokens
    return rows


# samples and edits


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
        print_notice(
            f"  effective sample size {evidence.ess[row]:.1f} of {written.particles} candidates; "
            f"the given text has log p about {evidence.log_evidence[row]:.1f} nats"
        )
        k = evidence.pareto_k[row]
        if k > UNRELIABLE:  # NaN is not
            print_notice(f"  unreliable (Pareto k {k:.2f}): use more --particles")


def samples_to_json(
    written: Written, lm: Checkpoint, *, passes: bool = False
) -> list[dict[str, object]]:
    """One object per sample: its text, on request its passes, and weights if text was given."""
    generation = written.generation
    shown = generation.passes(lm.model) if passes else ()
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
