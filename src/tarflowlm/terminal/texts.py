"""Samples and edits: panels on a terminal, plain text elsewhere, objects for --json."""

import codecs
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.editing import Edit
from tarflowlm.generation import Generation
from tarflowlm.generation.particles import UNRELIABLE
from tarflowlm.terminal.bars import print_notice
from tarflowlm.views.grid import Kind, Token, pass_rows, text_tokens

Show = Callable[[str], None]
Texts = Sequence[str] | None


def printable(text: str) -> str:
    """The text for a terminal, which takes control characters for commands, but not tabs and line
    ends.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def write_out(piece: str) -> None:
    """A piece of text to stdout at once."""
    sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def first_stop(text: str, stops: Sequence[str], start: int = 0) -> int:
    """Where the first of `stops` begins that is complete, at or after `start`; the length of the
    text without one.
    """
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop, start)) >= 0]
    return min(found, default=(0, len(text)))[1]


class TextStream:
    """Shows a text as its tokens come. What may be the beginning of a stop waits until it is known
    not to be one.
    """

    def __init__(
        self,
        show: Show,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        start: int = 0,
        shown: int = 0,
    ) -> None:
        """Stops count from character `start` on; the first `shown` characters are not shown."""
        self.show, self.stops, self.start, self.shown = show, stops, start, shown
        self.text, self.has_stopped = "", False
        self._bytes, self._decoder = (
            tokenizer.token_bytes,
            codecs.getincrementaldecoder("utf-8")(errors="replace"),
        )

    def add(self, tokens: Tensor) -> None:
        """The next tokens [n] of the text."""
        if not self.has_stopped:
            self._extend(self._decoder.decode(b"".join(self._bytes[i] for i in tokens.tolist())))

    def close(self) -> str:
        """Show what still waits; the whole text, up to its stop."""
        if not self.has_stopped:
            self._extend(self._decoder.decode(b"", final=True), is_last=True)
        return self.text

    def _extend(self, piece: str, *, is_last: bool = False) -> None:
        self.text += piece
        # nothing before what was shown can belong to a stop
        at = first_stop(self.text, self.stops, max(self.start, self.shown))
        self.has_stopped = at < len(self.text)
        self.text = self.text[:at]
        ready = at if self.has_stopped or is_last else at - self._waiting()
        if ready > self.shown:
            self.show(self.text[self.shown : ready])
            self.shown = ready

    def _waiting(self) -> int:
        """Characters at the end of the text that may begin a stop."""
        longest = min(max(map(len, self.stops), default=0) - 1, len(self.text) - self.start)
        return next(
            (
                n
                for n in range(longest, 0, -1)
                if any(s.startswith(self.text[-n:]) for s in self.stops)
            ),
            0,
        )


def print_samples(
    console: Console,
    result: Generation,
    tokenizer: Tokenizer,
    *,
    texts: Texts = None,
    first: int = 0,
    candidates: int = 1,
    passes: bool = False,
    about: str = "",
) -> None:
    """Print every sample, with its passes on request, and the weights of several `candidates`;
    `texts` replaces the decoded tokens, and `first` samples came before. Panels are titled with a
    number and what there is `about` it.
    """
    for row, tokens in enumerate(result.tokens):
        body = Text(printable(tokenizer.decode(tokens.tolist()) if texts is None else texts[row]))
        if passes and result.passes:
            rows = pass_rows([state[row] for state in result.passes], tokenizer)
            parts = [
                Text.assemble((f"{one.label}\n", "bold cyan"), _styled(one.tokens)) for one in rows
            ]
            body = Text("\n").join(parts)
        _show(console, body, f"sample {first + row + 1}{about}", is_first=first + row == 0)
        evidence = result.evidence
        if candidates == 1 or evidence is None:
            continue
        ess, log_p = evidence.ess[row].item(), evidence.log_evidence[row].item()
        print_notice(
            f"  {candidates} candidates, effective number {ess:.1f}; log p(given) about {log_p:.1f} nats"
        )
        # NaN is not above it
        if (k := evidence.pareto_k[row].item()) > UNRELIABLE:
            why = f"the weights have no finite variance (k = {k:.2f})"
            print_notice(
                f"  log p(given) is unreliable: {why}; more particles find texts that fit better"
            )


def samples_to_json(
    result: Generation,
    tokenizer: Tokenizer,
    *,
    texts: Texts = None,
    passes: bool = False,
    states: bool = False,
) -> list[dict[str, Any]]:
    """One object per sample: text, passes and states on request, weights if tokens were given;
    `texts` as above.
    """
    samples: list[dict[str, Any]] = []
    for row, tokens in enumerate(result.tokens):
        sample: dict[str, Any] = {
            "text": tokenizer.decode(tokens.tolist()) if texts is None else texts[row]
        }
        if passes or states:
            sample["passes"] = [tokenizer.decode(state[row].tolist()) for state in result.passes]
        if states:
            sample["states"] = [state[row].tolist() for state in result.states]
        for name in ("log_evidence", "ess", "draws", "pareto_k"):
            if result.evidence is not None:
                sample[name] = getattr(result.evidence, name)[row].item()
        samples.append(sample)
    return samples


def print_edits(
    console: Console,
    tokenizer: Tokenizer,
    edit: Edit,
    notes: Sequence[str],
    advice: str | None,
) -> None:
    """The text, then each of its edits with a note, changes highlighted; then the advice."""
    if console.is_terminal:
        _show(console, _styled(text_tokens(edit.before[0], tokenizer)), "text")
    rows = zip(edit.tokens, edit.changed, notes, strict=True)
    for number, (tokens, changed, note) in enumerate(rows, 1):
        body = _styled(text_tokens(tokens, tokenizer, changed=changed))
        _show(console, body, f"edit {number}", note, is_first=number == 1)
    if advice is not None:
        print_notice(advice)


STYLES: dict[Kind, str] = {"given": "underline", "final": "", "changed": "green", "noise": "dim"}


def _styled(tokens: Sequence[Token]) -> Text:
    return Text.assemble(*((token.symbol, STYLES[token.kind]) for token in tokens))


def _show(
    console: Console, body: Text, title: str, note: str | None = None, *, is_first: bool = True
) -> None:
    """A text in a panel on a terminal. Elsewhere the text alone, after an empty line unless it
    `is_first`.
    """
    if console.is_terminal:
        console.print(
            Panel(body, title=title, title_align="left", subtitle=note, subtitle_align="left")
        )
        return
    console.file.write("\n" * (not is_first) + f"{body.plain}\n")
    if note is not None:
        print_notice(f"{title}: {note}")
