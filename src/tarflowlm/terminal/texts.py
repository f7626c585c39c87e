"""Samples and edits: panels on a terminal, objects for --json."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.generation import Generation
from tarflowlm.generation.particles import UNRELIABLE
from tarflowlm.report.grid import Kind, Row, Token, pass_rows, text_tokens
from tarflowlm.terminal.streams import printable


def print_samples(
    console: Console,
    result: Generation,
    tokenizer: Tokenizer,
    *,
    texts: Sequence[str] | None = None,
    first: int = 0,
    candidates: int = 1,
    passes: bool = False,
) -> None:
    """Print every sample in a panel, with its passes on request, and the weights of several `candidates`.

    `texts` replaces the decoded tokens; `first` samples came before.
    """
    for row, tokens in enumerate(result.tokens):
        text = tokenizer.decode(tokens.tolist()) if texts is None else texts[row]
        states = [state[row] for state in result.passes] if passes else []
        body = grid_text(pass_rows(states, tokenizer)) if states else Text(printable(text))
        console.print(_panel(body, f"sample {first + row + 1}"))
        for note in _weights_notes(result, row, candidates):
            console.print(f"  {note}", highlight=False)


def _weights_notes(result: Generation, row: int, candidates: int) -> Iterator[str]:
    """Notes on the weights of the candidates of a sample."""
    if candidates == 1 or result.ess is None or result.log_evidence is None:
        return
    yield (
        f"{candidates} candidates, effective number {result.ess[row].item():.1f}; "
        f"log p(given) about {result.log_evidence[row].item():.1f} nats"
    )
    # NaN is not above it
    if result.pareto_k is not None and (k := result.pareto_k[row].item()) > UNRELIABLE:
        yield f"log p(given) is unreliable: the weights have no finite variance (k = {k:.2f})"


def samples_to_json(
    result: Generation,
    tokenizer: Tokenizer,
    *,
    texts: Sequence[str] | None = None,
    passes: bool = False,
    states: bool = False,
) -> list[dict[str, Any]]:
    """One object per sample: text, passes and states on request, weights if tokens were given.

    `texts` replaces the decoded tokens.
    """
    samples: list[dict[str, Any]] = []
    for row, tokens in enumerate(result.tokens):
        sample: dict[str, Any] = {"text": tokenizer.decode(tokens.tolist()) if texts is None else texts[row]}
        if passes or states:
            sample["passes"] = [tokenizer.decode(state[row].tolist()) for state in result.passes]
        if states:
            sample["states"] = [state[row].tolist() for state in result.states]
        for name in ("log_evidence", "ess", "draws"):
            value = getattr(result, name)
            if value is not None:
                sample[name] = value[row].item()
        if result.pareto_k is not None:
            k = result.pareto_k[row].item()
            sample["pareto_k"] = None if math.isnan(k) else k
        samples.append(sample)
    return samples


def print_edits(
    console: Console,
    tokenizer: Tokenizer,
    before: Tensor,
    edits: Tensor,
    notes: Sequence[str],
    advice: str | None = None,
) -> None:
    """The text `before` [T], then each of its `edits` [num, T] with a note, changes highlighted; then the advice."""
    console.print(_panel(_styled(text_tokens(before, tokenizer)), "text"))
    for number, (tokens, note) in enumerate(zip(edits, notes, strict=True), 1):
        console.print(_panel(_styled(text_tokens(tokens, tokenizer, before=before)), f"edit {number}", note))
    if advice is not None:
        console.print(Text(advice), soft_wrap=True)


def grid_text(rows: Sequence[Row]) -> Text:
    """Rows of coloured tokens, each under its label."""
    parts = [Text.assemble((f"{row.label}\n", "bold cyan"), _styled(row.tokens)) for row in rows]
    return Text("\n").join(parts)


STYLES: dict[Kind, str] = {"given": "underline", "final": "", "changed": "green", "noise": "dim"}


def _styled(tokens: Sequence[Token]) -> Text:
    return Text.assemble(*((token.symbol, STYLES[token.kind]) for token in tokens))


def _panel(body: Text, title: str, note: str | None = None) -> Panel:
    return Panel(body, title=title, title_align="left", subtitle=note, subtitle_align="left")
