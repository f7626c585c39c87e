"""The view that writes: a prompt or a template with blanks, the text as it comes, and its passes."""

from collections.abc import Iterator
from typing import Any

import torch

from tarflowlm.data.prompts import BLANK
from tarflowlm.device import threads_for
from tarflowlm.generation import Generation, Watch, generate
from tarflowlm.generation.window import num_positions
from tarflowlm.model import TarFlowLM
from tarflowlm.report.grid import Row, pass_rows, text_tokens
from tarflowlm.studio import request
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.job import Job
from tarflowlm.studio.pieces import bar, card, counted, facts, muted, page, slider, stage, took

LEAST_CHANGE = 0.1
"""A pass is shown if it changes at least this share of the tokens."""


def write(
    catalogue: Catalogue, model: Any, text: Any, length: Any, temperature: Any, top_p: Any, num: Any, seed: Any
) -> Iterator[str]:
    """HTML of the text while it is written, then of the samples and their passes."""
    checkpoint = catalogue.load(model)
    lm, tokenizer = checkpoint.model, checkpoint.tokenizer
    wanted = request.whole(length, "length", 1, request.TOKENS)
    num = request.whole(num, "samples", 1, request.SAMPLES)
    seed = request.whole(seed, "seed", 0, 2**31)
    temperature = request.number(temperature, "temperature", 0.1, 2.0)
    top_p = request.number(top_p, "top-p", 0.05, 1.0)
    reading = request.template(tokenizer, text) if request.text(text, "text") else None
    tokens = torch.empty(0, dtype=torch.long) if reading is None else reading.tokens
    is_prompt = bool((tokens != BLANK).all())
    # BLANK where the model writes
    given = torch.full((max(wanted, len(tokens)),), BLANK)
    given[: len(tokens)] = tokens
    total = num_positions(lm, len(given), len(tokens) if is_prompt else 0)

    def work(job: Job[Generation]) -> Generation:
        with threads_for(num):
            return generate(
                lm,
                num_tokens=wanted if is_prompt else len(given),
                num=num,
                prompt=tokens,
                temperature=temperature,
                top_p=top_p,
                decoder="auto",
                generator=torch.Generator().manual_seed(seed),
                watch=Watch(job, job.tokens.append),
            )

    job = Job(work)
    for _ in job.follow():
        written = torch.cat(job.tokens, 1)[0] if job.tokens else given[:0]
        shown = stage(text_tokens(written, tokenizer, given=given[: len(written)] != BLANK), is_open=True)
        share = min(job.advanced / max(total, 1), 1.0)
        yield page(card(shown, bar(share), muted(f"{100 * share:.0f} %" if job.advanced else "waiting for its turn")))
    result = job.result
    assert result is not None
    cards = []
    for row, sample in enumerate(result.tokens):
        body = stage(text_tokens(sample, tokenizer, given=given != BLANK)) + muted(
            None if reading is None else reading.notice
        )
        body += _facts(result, len(given), num, job.seconds)
        if isinstance(lm, TarFlowLM) and lm.num_blocks > 1 and result.passes:
            rows, note = _passes(lm, result, row, tokenizer, given != BLANK)
            body += slider(rows, "pass", summary="how it was written, block by block", is_open=row == 0) + muted(note)
        cards.append(card(body))
    yield page(*cards)


def _passes(
    flow: TarFlowLM, result: Generation, row: int, tokenizer: Any, given: torch.Tensor
) -> tuple[list[Row], str | None]:
    """The rows of sample `row`, as opaque as p(x|h) under the codebook, and a note on blocks that are left out."""
    passes, probabilities = [tokens[row] for tokens in result.passes], []
    for tokens, state in zip(passes, result.states, strict=True):
        p = flow.codebook.log_components(state[row]).softmax(-1)
        probabilities.append(p.gather(-1, tokens[:, None].to(p.device))[:, 0])
    rows = pass_rows(passes, tokenizer, given=given, probabilities=probabilities, least_change=LEAST_CHANGE)
    hidden = len(passes) - len(rows)
    changed = (
        f"{counted(hidden, 'block')} above changed next to nothing and {'is' if hidden == 1 else 'are'} not shown."
    )
    return rows, changed if hidden else None


def _facts(result: Generation, length: int, num: int, seconds: float) -> str:
    found = [(f"{length:,}", "tokens"), took(seconds), (f"{num * length / seconds:,.0f}", "tokens per second")]
    for block, (passes, how) in enumerate(zip(reversed(result.sweeps), reversed(result.decoders), strict=True), 1):
        words = {"sweeps": "in sweeps", "steps": "step by step"}[how]
        found.append((f"{passes:,}", f"{'pass' if passes == 1 else 'passes'} of block {block}, {words}"))
    return facts(*found)
