"""`generate`, the entry point of sampling: either model, with or without given tokens."""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflowlm.config import Decoder
from tarflowlm.data.prompts import Gap
from tarflowlm.device import keep_freed_memory, threads_for
from tarflowlm.errors import SILENT, Progress, UserError, counted
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.generation.gaps import Allowed, GapFilter, checked_mask
from tarflowlm.generation.inversion import Decoders, finish, sampler_decoders
from tarflowlm.generation.sampling import BLANK, Samples, adjust_weights, row_generators
from tarflowlm.generation.writing import Generation, Parts, Window, exact_prompt, write
from tarflowlm.model import LanguageModel, TarFlowLM, check_generator, check_integers, check_model
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.schema import Count, Length, checked

PARTICLES = 16
"""Particles by default where given tokens follow a blank, or draws are constrained."""

Prompt = Tensor | Sequence[Tensor | Gap]
"""Given tokens with BLANK for each to draw; or pieces of them with gaps in between."""


def generate(
    model: LanguageModel | Checkpoint,
    *,
    num_tokens: int,
    num: int = 1,
    prompt: Prompt | None = None,
    particles: int | None = None,
    allowed: Allowed | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    decoder: Decoders = "auto",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    progress: Progress = SILENT,
) -> Generation:
    """Draw `num` samples of `num_tokens` tokens each, given ones included (docs/math.md, 7 and 9).

    `model` is a model, or what `load` returns. At temperature 1, without top-k, top-p or given
    tokens, the latents are exact samples; their most probable tokens are exact, too, where the
    codebook is sharp.

    `prompt` [T], or [num, T] with one row per sample, holds given tokens; BLANK (-1) marks a token
    to draw, anywhere. A prompt at the start is exact for the baseline and, given its latents, for a
    single block and for a stack without blocks from right to left. Otherwise the drawn tokens
    ignore given tokens further right and the dependence that the upper blocks describe.
    R = `particles` > 1 corrects this at R times the cost, exactly in the limit of many particles.
    By default R is 16 where given tokens follow a blank or draws are constrained, and else 1.

    A list of pieces [S] with a `Gap` between them leaves open how many tokens the gap has: every
    number is weighted by its evidence, under a uniform prior. `allowed` is a mask [V] of the tokens
    that may be drawn, or a function to it from the tokens [n] so far. Particles weigh what it
    leaves, so that it bends the choice before. Both are exact in the limit of many particles, and
    ask for weights of tokens in block 1 and one token per position (docs/math.md, eq. 23).

    `temperature` tau raises the probabilities of tokens in the baseline, or the weights of a Mix-d
    block 1 tied to the codebook, to the power 1 / tau; `top_k` and `top_p` truncate them. Other
    flows refuse. In a stack that fills in (eq. 9a), the weights of all blocks change, with several
    particles those of block 1 alone.

    `num_tokens` may exceed the trained context (eq. 18b), with one particle and no blanks between
    given tokens.

    `decoder`, for all blocks or one per block, L first: "steps" inverts position by position,
    "sweeps" in parallel, equal up to rounding, "auto" by the cheaper. "draw", for block L
    alone, draws from its mixtures instead of inverting noise, with the same distribution at every
    setting; there "auto" does so, unless sweeps cost less. Given tokens, temperature, top-k and
    top-p make block 1 take steps, or draw.

    Row b has a random stream of its own, made from `generator` and b, or the one of a list of
    `num` generators. `progress` advances `num_positions` times: once per position and block.

    UserError for a prompt or settings that the model cannot take.
    """
    steps = generate_steps(
        model,
        num_tokens=num_tokens,
        num=num,
        prompt=prompt,
        particles=particles,
        allowed=allowed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        decoder=decoder,
        generator=generator,
        progress=progress,
        every=num_tokens,
    )
    return finish(steps)


def generate_steps(
    model: LanguageModel | Checkpoint,
    *,
    num_tokens: int,
    num: int = 1,
    prompt: Prompt | None = None,
    particles: int | None = None,
    allowed: Allowed | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    decoder: Decoders = "auto",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    progress: Progress = SILENT,
    every: int = 1,
    without: int | None = None,
    end: int | None = None,
    goes_on: bool = True,
) -> Parts:
    """Write as `generate`, and yield the tokens as they become final.

    Each time these are the next tokens [num, n] of all samples, int64 on the CPU, given tokens
    included: at least `every` of them, except for given tokens at the start and the end of a
    window. With particles, and where block 1 is inverted by sweeps, a text comes at the end of its
    window. The generator returns the `Generation`; to stop a text, close it. The token `without` is
    not drawn where the weights of tokens may change.

    A sample that draws the token `end` goes on as that token. Once a quarter of the samples have
    ended they are left out of the work on block 1, and there are no `states`. Samples with several
    particles do not end. `allowed` holds behind the last piece, too, if the text `goes_on` there.
    """
    model = model.model if isinstance(model, Checkpoint) else model
    check_model(model)
    checked(decoder, Decoder | Sequence[Decoder], "decoder")
    decoders = sampler_decoders(model, decoder) if isinstance(model, TarFlowLM) else ()
    if model.is_exact and decoder not in ("auto", "steps", ()):
        raise UserError(f"decoder {decoder!r}: a baseline has no blocks to invert, leave it out")
    num = checked(num, Length, "num")
    num_tokens = checked(num_tokens, Length, "length")
    generators = _row_streams(generator, num)
    adjust = _adjust(model, temperature, top_k, top_p, without)
    keep_freed_memory()
    has_parts = isinstance(prompt, Sequence) and all(isinstance(x, Tensor | Gap) for x in prompt)
    if allowed is not None or has_parts:
        particles = checked(PARTICLES if particles is None else particles, Count, "particles")
        pieces, gaps = _template(model, num_tokens, prompt)
        if allowed is not None and not callable(allowed):
            allowed = checked_mask(allowed, model)
        samples = Samples(model, generators, particles, adjust, progress)
        text = GapFilter(samples, pieces, gaps, num_tokens, allowed, goes_on=goes_on, end=end)
        return _undisturbed(text.write(), num * particles)
    given = _given(model, num, num_tokens, prompt)
    particles = _num_particles(model, given, particles)
    window = Window(
        model,
        generators,
        particles,
        adjust,
        progress,
        decoders=decoders,
        given=given,
        every=every,
        end=-1 if end is None else end,
        ended=None if end is None or particles > 1 else torch.zeros(num, dtype=torch.bool),
    )
    return _undisturbed(write(window), num * particles)


def _undisturbed(steps: Parts, rows: int) -> Parts:
    """Write a text; between two parts, the reader has its own settings of PyTorch."""
    while True:
        with torch.no_grad(), threads_for(rows):
            try:
                part = next(steps)
            except StopIteration as end:
                result: Generation = end.value
                return result
        yield part


def _adjust(
    model: LanguageModel,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    without: int | None,
) -> AdjustWeights | None:
    adjust = adjust_weights(temperature, top_k, top_p)
    if top_k is not None and top_k >= model.config.vocab_size:
        adjust, top_k = adjust_weights(temperature, None, top_p), None
    may_adjust = model.config.has_token_weights or model.config.fills_in
    if adjust is not None and not may_adjust:
        given = {
            "temperature": None if temperature == 1.0 else temperature,
            "top-k": top_k,
            "top-p": top_p,
        }
        asked = [f"{name} {value}" for name, value in given.items() if value is not None]
        raise UserError(
            f"{', '.join(asked)}: {model.config.describe(0)} has no weights of tokens to change: "
            "leave this out, or use a model whose block 1 is mixd"
        )
    if without is None or not may_adjust:
        return adjust
    banned = torch.tensor([without])

    def adjust_others(log_w: Tensor) -> Tensor:
        log_w = log_w.index_fill(-1, banned.to(log_w.device), torch.finfo(log_w.dtype).min)
        return log_w if adjust is None else adjust(log_w)

    return adjust_others


def _row_streams(
    generator: torch.Generator | Sequence[torch.Generator] | None, num: int
) -> list[torch.Generator]:
    if isinstance(generator, Sequence):
        if len(generator) != num:
            raise UserError(f"{len(generator)} generators for {num} samples: give one per sample")
        for one in generator:
            check_generator(one)
        return list(generator)
    check_generator(generator)
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return row_generators(range(num), generator)


def _given(model: LanguageModel, num: int, num_tokens: int, prompt: Prompt | None) -> Tensor:
    """The given tokens of every sample, BLANK elsewhere: [num, num_tokens] on the CPU."""
    given = torch.full((num, num_tokens), BLANK)
    if prompt is None:
        return given
    prompt = _checked_prompt(model, prompt, "[T]", "[num, T]")
    length = prompt.shape[-1]
    if length > num_tokens:
        raise no_room(length, num_tokens)
    if prompt.dim() == 2 and len(prompt) not in (1, num):
        raise UserError(f"{len(prompt)} prompts for {num} samples: give one, or one per sample")
    return F.pad(prompt.cpu(), (0, num_tokens - length), value=BLANK).expand(num, -1)


def _template(
    model: LanguageModel, num_tokens: int, prompt: Prompt | None
) -> tuple[list[Tensor], list[Gap]]:
    """Pieces, and gaps between them. UserError where the model does not take them."""
    config = model.config
    rule = "gaps of unknown length and constraints take"
    if config.patch > 1 or not config.has_token_weights:
        found = f"patch {config.patch}" if config.patch > 1 else config.describe(0)
        needed = "one token per position and weights of tokens in block 1"
        raise UserError(f"{found}: {rule} {needed}; use another model, such as english-small")
    if num_tokens > config.context:
        most = f"at most the context of {config.context} tokens"
        raise UserError(f"length {num_tokens}: {rule} {most}; shorten the text or its gaps")
    if isinstance(prompt, Tensor) and prompt.dim() == 2:
        if (prompt != prompt[:1]).any():
            raise UserError(f"{len(prompt)} prompts: {rule} one for all samples, call it for each")
        prompt = prompt[0]
    empty = torch.zeros(0, dtype=torch.long)
    pieces = [empty]
    gaps: list[Gap] = []
    for part in [prompt] if isinstance(prompt, Tensor) else prompt or []:
        if isinstance(part, Gap):
            if not 0 <= part.least <= part.most or part.most < 1:
                raise UserError(f"gap of {part.least} to {part.most} tokens: give least <= most")
            gaps.append(part)
            pieces.append(empty)
            continue
        _checked_prompt(model, part, "[T]")
        for is_blank, run in groupby(part.tolist(), lambda token: token == BLANK):
            tokens = torch.tensor(list(run))
            if is_blank:
                gaps.append(Gap(most=len(tokens), least=len(tokens)))
                pieces.append(empty)
            else:
                pieces[-1] = torch.cat((pieces[-1], tokens))
    longest = sum(gap.most for gap in gaps) + sum(map(len, pieces))
    if longest > num_tokens or (not gaps and longest == num_tokens):
        raise no_room(longest, num_tokens)
    return pieces, gaps


def _checked_prompt(model: LanguageModel, prompt: object, *shapes: str) -> Tensor:
    check_integers(prompt, "prompt", *shapes)
    assert isinstance(prompt, Tensor)
    vocab_size = model.config.vocab_size
    if ((prompt < BLANK) | (prompt >= vocab_size)).any():
        raise UserError(
            f"the prompt {prompt.tolist()} has tokens outside of 0 to {vocab_size - 1}, "
            f"or {BLANK} for a blank: encode it again"
        )
    return prompt


def no_room(length: int, num_tokens: int) -> UserError:
    """The error for a prompt that fills the length."""
    return UserError(
        f"the prompt has {counted(length, 'token')}, which leaves no room in {num_tokens}: "
        "shorten it, or raise the length"
    )


def usual_particles(given: Tensor) -> int:
    """Particles by default for given tokens [..., T]: PARTICLES where some follow a BLANK."""
    is_given = given != BLANK
    return PARTICLES if (~is_given[..., :-1] & is_given[..., 1:]).any() else 1


def _num_particles(model: LanguageModel, given: Tensor, particles: int | None) -> int:
    num_tokens = given.shape[1]
    context = model.config.context
    usual = usual_particles(given)
    particles = checked(usual if particles is None else particles, Count, "particles")
    if num_tokens > context and max(particles, usual) > 1:
        raise UserError(
            f"length {num_tokens}, particles {particles}: beyond the trained context of {context} "
            "tokens, take 1 particle, and a prompt without blanks in it"
        )
    if particles == 1 and (given != BLANK).all():
        raise no_room(num_tokens, num_tokens)
    lengths = (given != BLANK).sum(1)
    if model.config.continues_exactly and usual == 1 and (lengths != lengths[0]).any():
        raise UserError(
            f"prompts of {lengths.min()} to {lengths.max()} tokens: this model continues those of "
            "one length exactly, call it for each"
        )
    if particles > 1 and exact_prompt(model, given):
        raise UserError(
            f"particles {particles}: this model continues a prompt exactly, leave them out"
        )
    return particles
