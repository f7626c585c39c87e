"""`generate`, the entry point of sampling: either model, with or without given tokens
(docs/math.md, 7 and 9).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflowlm.checks import as_integer, check_generator, check_integers, check_model
from tarflowlm.device import keep_freed_memory, threads_for
from tarflowlm.errors import UserError
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.generation.inversion import Decoders, check_decoders, finish
from tarflowlm.generation.sampling import BLANK, adjust_weights, row_generators
from tarflowlm.generation.writing import Generation, Parts, Window, exact_prompt, write
from tarflowlm.language_model import LanguageModel
from tarflowlm.progress import SILENT, Progress
from tarflowlm.runs.checkpoint import Checkpoint

PARTICLES = 16
"""Particles by default where given tokens follow a blank."""


def generate(
    model: LanguageModel | Checkpoint,
    *,
    num_tokens: int,
    num: int = 1,
    prompt: Tensor | None = None,
    particles: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    decoder: Decoders = "auto",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    progress: Progress = SILENT,
) -> Generation:
    """Draw `num` samples of `num_tokens` tokens each, given tokens included (docs/math.md, sections
    7 and 9).

    `model` is a model, or what `load` returns. At temperature 1, without top-k, top-p or given
    tokens, the latents are exact samples; their most probable tokens are exact, too, where the
    codebook is sharp.

    `prompt` [T], or [num, T] with one row per sample, holds given tokens; BLANK (-1) marks a token
    to draw, anywhere. Tokens given at the start are exact for the baseline and, given their
    latents, for a flow of one block and for a stack without blocks from right to left, in which the
    states of its tokens are known. Otherwise the drawn tokens ignore given tokens further right and
    the dependence that the upper blocks describe. R = `particles` > 1 corrects this at R times the
    cost, exactly in the limit of many particles. By default R is 16 where given tokens follow a
    blank, and else 1.

    `temperature` tau raises the probabilities of tokens, given everything before in the baseline or
    in block 1, to the power 1 / tau; `top_k` and `top_p` truncate them. A Mix-d block tied to the
    codebook has these probabilities as its weights (the noise is not scaled, since Phi(u) has to
    stay uniform). Other flows have none and refuse. In a stack whose lower blocks fill in what they
    are sure of, the weights of every block change, in the noise for particles those of block 1
    alone.

    `num_tokens` may exceed the trained context (`writing.py`) with one particle and no blanks
    between given tokens.

    `decoder`, for all blocks or one per block, L first: "steps" inverts position by position,
    "sweeps" in parallel, equal up to rounding, "auto" by the cheaper. Given tokens, temperature,
    top-k and top-p make block 1 take steps.

    Row b has a random stream of its own, made from `generator` and b, so it does not depend on
    `num`. A list of generators, one per row, replaces these streams.

    `progress` advances once per position and block: `num_positions` times in all.

    Raises UserError for a prompt or settings that the model cannot take, for particles where a
    prompt is continued exactly, and for arguments of a wrong type.
    """
    steps = generate_steps(
        model,
        num_tokens=num_tokens,
        num=num,
        prompt=prompt,
        particles=particles,
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
    prompt: Tensor | None = None,
    particles: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    decoder: Decoders = "auto",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    progress: Progress = SILENT,
    every: int = 1,
) -> Parts:
    """Write as `generate`, and yield the tokens as they become final.

    Each time these are the next tokens [num, n] of all samples, int64 on the CPU: in order, each
    once, given tokens included; at least `every` of them, except for given tokens at the start and
    the end of a window. The generator returns the `Generation`; to stop a text, close it. With
    particles, and where block 1 is inverted by sweeps, a text comes at the end of its window.
    """
    model = model.model if isinstance(model, Checkpoint) else model
    check_model(model)
    check_decoders(decoder)
    num = as_integer(num, "num", least=1)
    given = _given(model, num, as_integer(num_tokens, "length", least=1), prompt)
    text = Window(
        model,
        _row_streams(generator, num),
        _num_particles(model, given, particles),
        _adjust(model, temperature, top_k, top_p),
        decoder,
        progress,
        given,
        every,
    )
    keep_freed_memory()
    return _undisturbed(text)


def _undisturbed(text: Window) -> Parts:
    """Write a text; between two parts, the reader has its own settings of PyTorch."""
    steps = write(text)
    while True:
        with torch.no_grad(), threads_for(text.rows):
            try:
                part = next(steps)
            except StopIteration as end:
                result: Generation = end.value
                return result
        yield part


def _adjust(
    model: LanguageModel, temperature: float, top_k: int | None, top_p: float | None
) -> AdjustWeights | None:
    adjust = adjust_weights(temperature, top_k, top_p)
    if top_k is not None and top_k >= model.config.vocab_size:
        adjust, top_k = adjust_weights(temperature, None, top_p), None
    if adjust is not None and not model.config.has_token_weights and not model.config.fills_in:
        asked = [f"temperature {temperature}"] if temperature != 1.0 else []
        asked += [] if top_k is None else [f"top-k {top_k}"]
        asked += [] if top_p is None else [f"top-p {top_p}"]
        raise UserError(
            f"{', '.join(asked)}: {model.config.describe(0)} has no weights of tokens to change: "
            "sample at temperature 1 without top-k and top-p, or use a model whose block 1 is mixd"
        )
    return adjust


def _row_streams(
    generator: torch.Generator | Sequence[torch.Generator] | None, num: int
) -> list[torch.Generator]:
    if isinstance(generator, Sequence):
        if len(generator) != num:
            raise UserError(f"{len(generator)} generators for {num} samples: give one per sample")
        return list(generator)
    check_generator(generator)
    if generator is None:
        (generator := torch.Generator()).seed()
    return row_generators(range(num), generator)


def _given(model: LanguageModel, num: int, num_tokens: int, prompt: Tensor | None) -> Tensor:
    """The given tokens of every sample, BLANK elsewhere: [num, num_tokens] on the CPU."""
    vocab_size = model.config.vocab_size
    given = torch.full((num, num_tokens), BLANK)
    if prompt is None:
        return given
    check_integers(prompt, "prompt", "[T]", "[num, T]")
    length = prompt.shape[-1]
    if length > num_tokens:
        what = f"the prompt has {length} tokens, which leaves no room in {num_tokens}"
        raise UserError(f"{what}: shorten it, or raise the length")
    if ((prompt < BLANK) | (prompt >= vocab_size)).any():
        rule = f"0 to {vocab_size - 1}, or {BLANK} for a blank: encode it again"
        raise UserError(f"the prompt {prompt.tolist()} has tokens outside of {rule}")
    return F.pad(prompt.cpu(), (0, num_tokens - length), value=BLANK).expand(num, -1)


def usual_particles(given: Tensor) -> int:
    """Particles for given tokens [..., T] unless a number is asked for: 16 where some follow a
    BLANK, else 1.
    """
    is_given = given != BLANK
    return PARTICLES if (~is_given[..., :-1] & is_given[..., 1:]).any() else 1


def _num_particles(model: LanguageModel, given: Tensor, particles: int | None) -> int:
    """The number of particles, as asked for or as usual."""
    num_tokens, context = given.shape[1], model.config.context
    usual = usual_particles(given)
    asked = particles is not None
    particles = as_integer(particles, "particles", least=1) if particles is not None else usual
    if num_tokens > context and max(particles, usual) > 1:
        raise UserError(
            f"length {num_tokens}, particles {particles}: beyond the trained context of {context} "
            "tokens, take 1 particle, and a prompt without blanks in it"
        )
    if particles == 1 and (given != BLANK).all():
        raise UserError(
            f"the prompt has {num_tokens} tokens, which leaves no room in {num_tokens}: "
            "shorten it, or raise the length"
        )
    if asked and particles > 1 and exact_prompt(model, given):
        raise UserError(
            f"particles {particles}: this model continues a prompt exactly, leave them out"
        )
    return particles
