"""Texts that change, as rows of coloured tokens: rounds of drafts, passes of blocks, an edit beside its original."""

import codecs
from collections.abc import Sequence

import torch
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.generation import Generation
from tarflowlm.model import TarFlowLM
from tarflowlm.report.grid import GridRow, Kind, Token
from tarflowlm.studio.pieces import counted

LEAST_CHANGE = 0.1
"""A pass is shown if it changes at least this share of the tokens."""


def symbols(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Tokens as strings that concatenate to the text: a character of several tokens comes with the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    found = [decoder.decode(tokenizer.token_bytes[token]) for token in tokens]
    return [*found[:-1], found[-1] + decoder.decode(b"", final=True)] if found else []


def marked(tokens: Sequence[int], tokenizer: Tokenizer, kinds: Sequence[Kind]) -> list[Token]:
    """Tokens of these kinds."""
    return [Token(text, kind) for text, kind in zip(symbols(tokens, tokenizer), kinds, strict=True)]


def final_tokens(tokens: Tensor, tokenizer: Tokenizer, given: Tensor | None = None) -> list[Token]:
    """A finished text [T], its given tokens (True in `given` [T]) locked."""
    locked = torch.zeros_like(tokens, dtype=torch.bool) if given is None else given
    return marked(tokens.tolist(), tokenizer, ["given" if lock else "final" for lock in locked.tolist()])


def difference(before: Tensor, after: Tensor, tokenizer: Tokenizer) -> list[Token]:
    """The text `after` [T], where it differs from `before` [T] as changed."""
    return marked(after.tolist(), tokenizer, ["changed" if d else "final" for d in (before != after).tolist()])


def pass_rows(
    model: TarFlowLM, result: Generation, row: int, tokenizer: Tokenizer, given: Tensor
) -> tuple[list[GridRow], int]:
    """Sample `row` before and after each block that changes its text, and how many blocks do not.

    A token is as opaque as its posterior probability p(x|h) under the codebook.
    """
    rows: list[GridRow] = []
    hidden, last, T = 0, len(result.passes) - 1, given.shape[0]
    before = result.passes[0][row]
    for index, (tokens, state) in enumerate(zip(result.passes, result.states, strict=True)):
        now = tokens[row]
        changed = now != before
        if 0 < index < last and changed.float().mean() < LEAST_CHANGE:
            hidden += 1
            continue
        log_p = model.codebook.log_components(state[row]).log_softmax(-1)
        sure = log_p.gather(-1, now[:, None].to(log_p.device))[:, 0].exp().tolist()
        kinds: list[Kind] = [
            "given" if lock and index == last else "noise" if index == 0 else "changed" if new else "final"
            for lock, new in zip(given.tolist(), changed.tolist(), strict=True)
        ]
        name = "noise" if index == 0 else f"block {last - index + 1} · {int(changed.sum())} of {T} changed"
        rows.append(
            GridRow(
                name,
                [
                    Token(text, kind, p, f"p = {p:.2f}" if p < 0.995 else "")
                    for text, kind, p in zip(symbols(now.tolist(), tokenizer), kinds, sure, strict=True)
                ],
            )
        )
        before = now
    return rows, hidden


def changed_words(changed: Tensor) -> str:
    """How many tokens of `changed` [T] are."""
    return f"{int(changed.sum())} of {counted(len(changed), 'token')} changed"
