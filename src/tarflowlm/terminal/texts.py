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
from tarflowlm.terminal.streams import printable


def print_samples(
    console: Console,
    result: Generation,
    tokenizer: Tokenizer,
    *,
    texts: Sequence[str] | None = None,
    first: int = 0,
    candidates: int = 1,
) -> None:
    """Every sample in a panel, with its passes if there are any.

    `texts` replaces the decoded tokens, `first` samples came before. Of several `candidates` per sample it says how
    many count.
    """
    for row, tokens in enumerate(result.tokens):
        passes = [symbols(state[row], tokenizer) for state in result.passes]
        text = tokenizer.decode(tokens.tolist()) if texts is None else texts[row]
        body = _passes_text(passes) if passes else Text(printable(text))
        console.print(_panel(body, f"sample {first + row + 1}"))
        for note in _weights_notes(result, row, candidates):
            console.print(f"  {note}", highlight=False)


def _weights_notes(result: Generation, row: int, candidates: int) -> Iterator[str]:
    """What the weights of the candidates of a sample say."""
    if candidates == 1 or result.ess is None or result.log_evidence is None:
        return
    yield (
        f"{candidates} candidates, of which about {result.ess[row].item():.1f} count; "
        f"log p(given) about {result.log_evidence[row].item():.1f} nats"
    )
    # NaN is not above it
    if result.pareto_k is not None and (k := result.pareto_k[row].item()) > UNRELIABLE:
        yield f"log p(given) is unreliable: the weights have no finite variance (k = {k:.2f})"


def samples_to_json(
    result: Generation, tokenizer: Tokenizer, *, texts: Sequence[str] | None = None, states: bool = False
) -> list[dict[str, Any]]:
    """One object per sample: text, passes and states if there are any, weights if tokens were given.

    `texts` replaces the decoded tokens.
    """
    samples: list[dict[str, Any]] = []
    for row, tokens in enumerate(result.tokens):
        sample: dict[str, Any] = {"text": tokenizer.decode(tokens.tolist()) if texts is None else texts[row]}
        if result.passes:
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


def symbols(tokens: Tensor, tokenizer: Tokenizer) -> list[str]:
    """The symbols of tokens [T]."""
    return [tokenizer.symbols[i] for i in tokens.tolist()]


def print_edits(
    console: Console,
    before: Sequence[str],
    edits: Sequence[Sequence[str]],
    notes: Sequence[str],
    advice: str | None = None,
) -> None:
    """The text, then every edit of it, with the symbols that changed highlighted; and advice on a line of its own."""
    console.print(_panel(Text("".join(before)), "text"))
    for number, (symbols, note) in enumerate(zip(edits, notes, strict=True), 1):
        body = Text()
        for old, new in zip(before, symbols, strict=True):
            body.append(new, style="" if old == new else "bold green")
        console.print(_panel(body, f"edit {number}", note))
    if advice is not None:
        console.print(Text(advice), soft_wrap=True)


def _panel(body: Text, title: str, note: str | None = None) -> Panel:
    return Panel(body, title=title, title_align="left", subtitle=note, subtitle_align="left")


def _passes_text(passes: Sequence[Sequence[str]]) -> Text:
    """The symbols decoded after every pass, with those that changed highlighted."""
    body, last = Text(), len(passes) - 1
    before: Sequence[str] | None = None
    for index, symbols in enumerate(passes):
        name = "noise" if index == 0 else "text" if index == last else f"after block {last - index + 1}"
        changed = 0 if before is None else sum(a != b for a, b in zip(symbols, before, strict=True))
        count = f"  ({changed} of {len(symbols)} changed)" if before else ""
        body.append(f"{name}{count}\n", style="bold cyan")
        for i, symbol in enumerate(symbols):
            same = before is None or symbol == before[i]
            body.append(symbol, style="dim" if index == 0 else "" if same else "green")
        body.append("" if index == last else "\n")
        before = symbols
    return body
