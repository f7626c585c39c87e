"""Two edits toward a second text, which `tarflowlm edit` leaves out.

They keep less of a text than resampling some of its words (`examples/measure_edits.py`).

    first, second = (encode(model, x[None], generator) for x in tokens)  # of equal length
    edit = interpolate(Source(model, first, generator), second, level=1, weight=0.5)
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tarflowlm.editing.edits import covered
from tarflowlm.editing.redraw import Candidates, Span, collected, redraw
from tarflowlm.editing.states import Change, Encoded, Source, compared, inverted_below
from tarflowlm.model import as_flow


@torch.no_grad()
def interpolate(source: Source, second: Encoded, *, level: int, weight: float) -> Change:
    """Interpolate the states l of two texts on a sphere, and invert blocks l, ..., 1.

        (sin((1 - kappa) theta) first^(l) + sin(kappa theta) second^(l)) / sin(theta)

    theta is the angle between the two states of a sequence, vectors in R^(T d). `weight` kappa = 0
    gives the first text, 1 the second, exactly; `Change.before` is the first.
    """
    first = source.text
    assert first.length == second.length
    a = first.states[level]
    b = second.states[level]
    cosine = torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).double()
    angle = cosine.clamp(-1, 1).arccos().clamp(1e-4, math.pi - 1e-4)[:, None, None]
    state = (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / angle.sin()
    anchor = second if weight == 1.0 else first
    state = anchor.states[level] if weight in (0.0, 1.0) else state.to(a)
    states = inverted_below(replace(source, text=anchor), level, state, "auto")
    return compared(source, as_flow(source.model).codebook.decode(states[-1]), states)


@torch.no_grad()
def blend(
    source: Source,
    second: Encoded,
    spans: Sequence[tuple[Sequence[Span], Sequence[Span]]],
    candidates: Candidates,
) -> Change:
    """Take spans of second texts, at their places, and resample the words that they cut.

    `spans[b]` are the spans that row b takes, and the spans of the first text that it keeps
    (`blended_spans`).
    """
    model = as_flow(source.model)
    first = source.text
    assert first.length == second.length
    rows = []
    for b, (taken, kept) in enumerate(spans):
        is_second = covered(taken, first.tokens.shape[1])
        stays = covered(kept, first.tokens.shape[1])
        mask = is_second.to(first.tokens.device)
        z = torch.where(mask[:, None], second.states[0][b], first.states[0][b])[None]
        tokens = torch.where(mask, second.tokens[b], first.tokens[b])[None]
        row = replace(first, tokens=tokens, states=tuple(model.prior.states(z)[0]))
        for span in runs(~(is_second | stays)[: first.length]):
            row = redraw(replace(source, text=row), span, candidates)
        rows.append(row)
    return collected(source, rows)


def blended_spans(
    first: Sequence[Span], second: Sequence[Span], taken: Sequence[Span], length: int
) -> tuple[list[Span], list[Span]]:
    """The spans of two texts of `length` tokens when words `taken` of the second enter the first.

    Returned are the places of these words, and the words of the first text that none of them
    overlaps, all with the white space around them.
    """

    def with_space(word: Span, words: Sequence[Span]) -> Span:
        at = words.index(word)
        before = words[at - 1][1] if at else 0
        return before, words[at + 1][0] if at + 1 < len(words) else length

    new = [with_space(word, second) for word in taken]
    whole = [(a, b) for a, b in first if not any(start < b and a < stop for start, stop in new)]
    return new, [with_space(word, first) for word in whole]


def runs(mask: Tensor) -> list[Span]:
    """Maximal runs of True."""
    spans: list[Span] = []
    for at in mask.nonzero()[:, 0].tolist():
        start = spans.pop()[0] if spans and spans[-1][1] == at else at
        spans.append((start, at + 1))
    return spans
