"""The view that writes: a prompt or a template with blanks, the text as it comes, and how it came about."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflowlm.device import threads_for
from tarflowlm.errors import UserError
from tarflowlm.generation import Generation, Watch, generate
from tarflowlm.generation.sampling import BLANK
from tarflowlm.generation.window import num_positions
from tarflowlm.model import as_flow
from tarflowlm.report.grid import GridRow
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.studio import request
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.job import Job
from tarflowlm.studio.pieces import bar, card, counted, facts, milliseconds, muted, page, scrubbed, stage
from tarflowlm.studio.rows import final_tokens, pass_rows


@dataclass(frozen=True)
class Order:
    """What to write."""

    given: Tensor
    """[T], BLANK where the model writes."""
    is_prompt: bool
    num: int
    seed: int
    temperature: float
    top_p: float

    @property
    def num_given(self) -> int:
        """Tokens that the model does not write."""
        return int((self.given != BLANK).sum())


def write(
    catalogue: Catalogue, model: Any, text: Any, length: Any, temperature: Any, top_p: Any, num: Any, seed: Any
) -> Iterator[str]:
    """HTML of the text while it is written, then of what came out. UserError for what the model cannot write."""
    checkpoint = catalogue.load(model)
    order = _order(checkpoint, text, length, temperature, top_p, num, seed)
    job = Job(lambda job: _generate(checkpoint, order, job))
    for _ in job.follow():
        yield page(card(_so_far(checkpoint, order, job)))
    assert job.result is not None
    yield page(*_cards(checkpoint, order, job.result, job))


def _order(
    checkpoint: Checkpoint, text: Any, length: Any, temperature: Any, top_p: Any, num: Any, seed: Any
) -> Order:
    text = request.text(text, "text")
    tokens = request.template(checkpoint.tokenizer, text)
    is_prompt = request.MARK not in text
    wanted = request.whole(length, "length", 1, request.TOKENS)
    if is_prompt and len(tokens) >= wanted:
        raise UserError(
            f"the text has {counted(len(tokens), 'token')}, which leaves no room in {wanted}: raise the length"
        )
    given = torch.full((max(wanted, len(tokens)),), BLANK)
    given[: len(tokens)] = tokens
    return Order(
        given,
        is_prompt,
        request.whole(num, "samples", 1, request.SAMPLES),
        request.whole(seed, "seed", 0, 2**31),
        request.number(temperature, "temperature", 0.1, 2.0),
        request.number(top_p, "top-p", 0.05, 1.0),
    )


def _generate(checkpoint: Checkpoint, order: Order, job: Job[Generation]) -> Generation:
    with threads_for(order.num):
        return generate(
            checkpoint.model,
            num_tokens=len(order.given),
            num=order.num,
            prompt=order.given,
            generator=torch.Generator().manual_seed(order.seed),
            temperature=order.temperature,
            top_p=order.top_p,
            decoder="auto",
            watch=Watch(job, job.tell),
        )


def _so_far(checkpoint: Checkpoint, order: Order, job: Job[Generation]) -> str:
    """What is written by now, and how much is left."""
    total = num_positions(checkpoint.model, len(order.given), order.num_given if order.is_prompt else 0)
    told = torch.cat(job.told, 1)[0] if job.told else order.given[:0]
    share = len(job.ticks) / max(total, 1)
    locked = order.given[: len(told)] != BLANK
    words = "waiting for its turn" if not job.ticks else f"{100 * min(share, 1.0):.0f} %"
    return stage(final_tokens(told, checkpoint.tokenizer, locked), is_open=True) + bar(share) + muted(words)


def _cards(checkpoint: Checkpoint, order: Order, result: Generation, job: Job[Generation]) -> Iterator[str]:
    tokenizer, T = checkpoint.tokenizer, len(order.given)
    locked = order.given != BLANK
    for row, tokens in enumerate(result.tokens):
        rows, note = _rows(checkpoint, order, result, row)
        body = stage(final_tokens(tokens, tokenizer, locked)) + _facts(result, T, order.num, job.seconds_taken)
        if rows:
            summary = "how it was written, block by block"
            body += scrubbed(rows, "pass", summary=summary, is_open=row == 0)
        yield card(body, muted(note) if note else "")


def _rows(checkpoint: Checkpoint, order: Order, result: Generation, row: int) -> tuple[list[GridRow], str]:
    """The rows that show how the sample came about, and a note about what they leave out."""
    if checkpoint.model.num_blocks == 1 or not result.passes:
        return [], ""
    locked = order.given != BLANK
    rows, hidden = pass_rows(as_flow(checkpoint.model), result, row, checkpoint.tokenizer, locked)
    note = f"{counted(hidden, 'block')} above changed next to nothing and {'is' if hidden == 1 else 'are'} not shown."
    return rows, note if hidden else ""


def _facts(result: Generation, length: int, num: int, seconds: float) -> str:
    found = [
        (f"{length:,}", "tokens"),
        (milliseconds(seconds), "in all"),
        (f"{num * length / seconds:,.0f}", "tokens a second"),
    ]
    for block, (passes, how) in enumerate(zip(reversed(result.sweeps), reversed(result.decoders), strict=True), 1):
        words = {"sweeps": "in sweeps", "steps": "step by step"}[how]
        found.append((f"{passes:,}", f"{'pass' if passes == 1 else 'passes'} of block {block}, {words}"))
    return facts(*found)
