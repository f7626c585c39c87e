"""The views that draw: a prompt or a template as it is written, and candidates for blanks with
their weights.
"""

from collections.abc import Generator, Iterator
from itertools import chain
from typing import Any
from urllib.parse import urlencode

import torch
from torch import Tensor

from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import BLANK, Reading, read_template
from tarflowlm.generation import Generation, Watch, generate
from tarflowlm.generation.writing import num_positions
from tarflowlm.model import TarFlowLM
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.studio import request
from tarflowlm.studio.catalogue import Catalogue
from tarflowlm.studio.pieces import (
    asked,
    bar,
    card,
    counted,
    facts,
    muted,
    page,
    slider,
    stage,
    took,
)
from tarflowlm.studio.request import Job
from tarflowlm.views.grid import Row, Token, pass_rows, spans, text_tokens

LEAST_CHANGE = 0.1  # a pass is shown if it changes at least this share of the tokens
TRIES, FILLING = (
    8,
    16,
)  # the most tries of one request; particles for a text with blanks in the view that writes
USUAL = (("top_p", 1.0), ("num", 1))  # values that a command leaves out


def write(
    catalogue: Catalogue,
    model: Any,
    text: Any,
    length: Any,
    temperature: Any,
    top_p: Any,
    num: Any,
    seed: Any,
) -> Iterator[str]:
    """HTML of the text while it is written, then of the samples and their passes."""
    checkpoint = catalogue.load(model)
    lm, tokenizer = checkpoint.model, checkpoint.tokenizer
    wanted = request.whole(length, "length", 1, request.TOKENS)
    num = request.whole(num, "samples", 1, request.SAMPLES)
    generator = request.generator(seed)
    temperature = request.number(temperature, "temperature", 0.1, 2.0)
    top_p = request.number(top_p, "top-p", 0.05, 1.0)
    reading = request.template(tokenizer, text) if request.text(text, "text") else None
    tokens = torch.empty(0, dtype=torch.long) if reading is None else reading.tokens
    is_prompt = bool((tokens != BLANK).all())
    size, particles = (max(wanted, len(tokens)), 1) if is_prompt else (len(tokens), FILLING)
    given = torch.full((size,), BLANK)  # BLANK where the model writes
    given[: len(tokens)] = tokens
    total = num_positions(lm, len(given), len(tokens) if is_prompt else 0)

    def work(job: Job[Generation]) -> Generation:
        return generate(
            lm,
            num_tokens=wanted if is_prompt else len(given),
            num=num,
            prompt=tokens,
            temperature=temperature,
            top_p=top_p,
            particles=particles,
            generator=generator,
            watch=Watch(job, job.tokens.append),
        )

    def show() -> str:
        written = torch.cat(job.tokens, 1)[0] if job.tokens else given[:0]
        shown = stage(
            text_tokens(written, tokenizer, given=given[: len(written)] != BLANK), is_open=True
        )
        share = min(job.advanced / max(total, 1), 1.0)
        return page(card(shown, bar(share), muted(job.doing(f"{100 * share:.0f} %"))))

    job = Job(work, num)
    result = yield from job.follow(show)
    cards = []
    for row, sample in enumerate(result.tokens):
        body = stage(text_tokens(sample, tokenizer, given=given != BLANK))
        body += muted(None if reading is None else reading.notice) + _facts(
            result, len(given), num, job.seconds
        )
        if isinstance(lm, TarFlowLM) and lm.num_blocks > 1 and result.passes:
            rows, note = _passes(lm, result, row, tokenizer, given != BLANK)
            body += slider(
                rows, "pass", summary="how it was written, block by block", is_open=row == 0
            ) + muted(note)
        cards.append(card(body))
    given_words = (
        () if reading is None else ("--prompt" if is_prompt else "--template", reading.given)
    )
    how = {"length": wanted} if is_prompt else {"particles": particles}
    values = how | {"temperature": temperature, "top_p": top_p, "num": num, "seed": int(seed)}
    options = [
        (f"--{name.replace('_', '-')}", f"{x:g}")
        for name, x in values.items()
        if (name, x) not in USUAL
    ]
    link = urlencode({"model": model, "text": text or ""} | values)
    command = asked("sample", model, *given_words, *chain.from_iterable(options), link=f"?{link}")
    yield page(command, *cards)


def _passes(
    flow: TarFlowLM, result: Generation, row: int, tokenizer: Tokenizer, given: Tensor
) -> tuple[list[Row], str | None]:
    """The rows of sample `row`, as opaque as p(x|h) under the codebook, and a note on blocks that
    are left out.
    """
    passes, probabilities = [tokens[row] for tokens in result.passes], []
    for tokens, state in zip(passes, result.states, strict=True):
        p = flow.codebook.log_components(state[row]).softmax(-1)
        probabilities.append(p.gather(-1, tokens[:, None].to(p.device))[:, 0])
    rows = pass_rows(
        passes, tokenizer, given=given, probabilities=probabilities, least_change=LEAST_CHANGE
    )
    if not (hidden := len(passes) - len(rows)):
        return rows, None
    return rows, f"Not shown: {counted(hidden, 'block')} above, which changed next to nothing."


def _facts(result: Generation, length: int, num: int, seconds: float) -> str:
    found = [
        (f"{length:,}", "tokens"),
        took(seconds),
        (f"{num * length / seconds:,.0f}", "tokens per second"),
    ]
    for block, (passes, how) in enumerate(
        zip(reversed(result.sweeps), reversed(result.decoders), strict=True), 1
    ):
        words = {"sweeps": "in sweeps", "steps": "step by step"}[how]
        found.append(
            (f"{passes:,}", f"{'pass' if passes == 1 else 'passes'} of block {block}, {words}")
        )
    return facts(*found)


def infill(
    catalogue: Catalogue,
    model: Any,
    text: Any,
    tries: Any,
    particles: Any,
    temperature: Any,
    seed: Any,
) -> Iterator[str]:
    """HTML of candidates for the blanks of `text`."""
    checkpoint = catalogue.load(model)
    template = read_template(checkpoint.tokenizer, request.text(text, "text"), request.MARK)
    yield page(
        (yield from fill(str(model), checkpoint, template, tries, particles, temperature, seed))
    )


def fill(
    name: str,
    checkpoint: Checkpoint,
    reading: Reading,
    tries: Any,
    particles: Any,
    tau: Any,
    seed: Any,
) -> Generator[str, None, str]:
    """Pages of the progress; returns HTML of candidates for a template at temperature `tau`, the
    likeliest first. Every try runs its own particles. Its evidence, the mean weight of its
    particles, is unbiased for p(given), so a draw from the tries by evidence is a draw by all of
    their particles; that is the weight of its text.
    """
    num = request.whole(tries, "tries", 1, TRIES)
    each = request.whole(particles, "particles", 1, request.PARTICLES)
    temperature = request.number(tau, "temperature", 0.1, 2.0)
    generator = request.generator(seed)
    tokenizer, template, given = checkpoint.tokenizer, reading.tokens, reading.tokens != BLANK

    def work(job: Job[Generation]) -> Generation:
        return generate(
            checkpoint.model,
            num_tokens=len(template),
            num=num,
            prompt=template,
            generator=generator,
            particles=each,
            temperature=temperature,
            decoder="auto",
            watch=Watch(job),
        )

    job = Job(work, num * each)
    total = num_positions(checkpoint.model, len(template))
    shown = text_tokens(template.clamp_min(0), tokenizer, given=given)
    waiting = stage(
        [t if t.kind == "given" else Token(request.MARK, "noise") for t in shown], is_open=True
    )
    result = yield from job.follow(
        lambda: page(card(waiting, bar(job.advanced / total), muted(job.doing("trying"))))
    )
    # equal weights where nothing is given, and where all evidence is zero
    weights = (torch.zeros(num) if result.log_evidence is None else result.log_evidence).softmax(0)
    weights = weights.nan_to_num(1 / num)
    shares: dict[tuple[int, ...], float] = {}  # equal texts are one candidate
    for row, weight in zip(result.tokens.tolist(), weights.tolist(), strict=True):
        shares[tuple(row)] = shares.get(tuple(row), 0.0) + weight
    choices = ""
    for row, share in sorted(shares.items(), key=lambda pair: -pair[1]):
        text = spans(text_tokens(torch.tensor(row), tokenizer, before=template, given=given))
        head = f'<div class="st-share"><b>{100 * share:.0f} %</b>{bar(share)}</div>'
        choices += f'<div class="st-choice">{head}<div class="st-stage">{text}</div></div>'
    numbers = facts((f"{each:,}", "particles per try"), took(job.seconds))
    options = (
        "--num",
        num,
        "--particles",
        each,
        "--temperature",
        f"{temperature:g}",
        "--seed",
        int(seed),
    )
    command = asked("sample", name, "--template", reading.given, *options)
    trust = card(_trust(1 / (weights**2).sum().item(), num), numbers)
    return command + card(choices, muted(reading.notice)) + trust


def _trust(effective: float, tries: int) -> str:
    """How far the weights can be trusted; `effective` tries count, from 1 to `tries`."""
    share = effective / tries
    if tries == 1:
        words = "One try has nothing to be compared with: ask for more."
    elif share >= 0.5:
        words = "The tries fit the given text about equally well."
    else:
        words = "A few tries fit the given text far better than the others. More particles find more such texts."
    return f"<b>About {effective:.1f} of {counted(tries, 'try', 'tries')} count.</b> {words}{bar(share)}"
