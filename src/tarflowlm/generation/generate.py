"""Sampling from tensors to tensors: `generate`, and `generate_plainly`, which is read first."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.data.prompts import Gap
from tarflowlm.errors import SILENT, Progress, UserError
from tarflowlm.generation.plan import Allowed, Plan, plan
from tarflowlm.generation.sampling import BLANK, Generation, row_generators
from tarflowlm.generation.write import write
from tarflowlm.model import LanguageModel, as_flow, check_model
from tarflowlm.options import takes
from tarflowlm.requests import Sampling
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.schema import Length, check_generator, check_integers, check_type, checked

Prompt = Tensor | Sequence[Tensor | Gap]
"""Given tokens with BLANK for each to draw; or pieces of them with gaps in between."""


@torch.no_grad()
def generate_plainly(
    model: LanguageModel, num_tokens: int, num: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Draw `num` free texts [num, T] of whole patches by the formulas, for readers and tests.

    Noise is inverted by all blocks, and latents are decoded (docs/math.md, eqs. 2 and 5); the
    baseline draws token after token from its conditionals.
    """
    if isinstance(model, TokenLM):
        tokens = torch.zeros(num, num_tokens, dtype=torch.long)
        for t in range(num_tokens):
            probabilities = model.logits(tokens)[:, t].softmax(-1)
            tokens[:, t] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        return tokens
    flow = as_flow(model)
    noise = flow.draw_noise(torch.zeros(num, num_tokens, dtype=torch.long), generator)
    return flow.codebook.decode(flow.prior.inverse(noise))


@takes(Sampling, made=False)
def generate(
    model: LanguageModel | Checkpoint,
    *,
    num_tokens: int,
    num: int = 1,
    prompt: Prompt | None = None,
    allowed: Allowed | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    progress: Progress = SILENT,
    **options: Any,
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
    that may be drawn, a tensor or a NumPy array, or a function to it from the tokens [n] so far.
    Particles are weighted by the probability of the allowed tokens, so a ban also acts on earlier
    choices. Both are exact in the limit of many particles. They need a block 1 with weights of
    tokens, and one token per position (docs/math.md, eq. 23).

    `temperature` tau raises the probabilities of tokens in the baseline, or the weights of a Mix-d
    block 1 tied to the codebook, to the power 1 / tau; `top_k`, `top_p` and `min_p` truncate them.
    `adjust`, a function of log-weights [..., V] to log-weights, is a sampler of your own.
    Other flows refuse. In a stack that fills in (eq. 9a) they change the weights of all blocks, or
    with several particles the weights of block 1 alone.

    `num_tokens` may exceed the trained context (eq. 18b), with one particle and no blanks between
    given tokens.

    `decoder`: "auto" and "steps" draw the tokens of the baseline, and block L of a flow unless
    sweeps invert it at less cost, by numbers that belong to rows and places; the blocks below are
    inverted. "steps" goes token by token; "auto" gives the same tokens in fewer calls, where
    sweeps cost less. "sweeps" inverts noise in all blocks, in parallel.
    Given tokens, temperature, top-k and top-p make block 1 take steps, or draw.

    Row b has a random stream of its own, made from `generator` and b; a list of `num` generators
    gives one to each row. `progress` counts the tokens of all samples.

    UserError for a prompt or settings that the model cannot take.
    """
    model = model.model if isinstance(model, Checkpoint) else model
    check_model(model)
    check_type(progress, "progress", Progress, "give a tarflowlm.errors.Progress")
    streams = _row_streams(generator, num)
    plans = row_plans(
        model, prompt, len(streams), Sampling(**options), num_tokens=num_tokens, allowed=allowed
    )
    return write(model, plans, streams, progress)


def row_plans(
    model: LanguageModel,
    prompt: Prompt | None,
    num: int,
    sampling: Sampling,
    *,
    num_tokens: int,
    allowed: Allowed | None = None,
) -> list[Plan]:
    """A plan for each of `num` rows of a batch, from the one `prompt` or its row of [num, T].

    UserError for rows that cannot be written together.
    """
    rows: list[Prompt | None] = [prompt]
    if isinstance(prompt, Tensor) and prompt.dim() > 1:
        check_integers(prompt, "prompt", "[T]", "[num, T]")
        if len(prompt) not in (1, num):
            raise UserError(f"{len(prompt)} prompts for {num} samples: give one, or one per sample")
        # equal rows have one plan
        rows = list(prompt[:1] if (prompt == prompt[:1]).all() else prompt)
    found = [
        plan(model, _parts(model, row), sampling, num_tokens=num_tokens, allowed=allowed)
        for row in rows
    ]
    if len(found) == 1:
        return found * num
    particles = max(one.particles for one in found)
    lengths = [len(one.pieces[0]) for one in found]
    if found[0].way == "gaps":
        what = "gaps of unknown length and constraints take one for all samples"
        raise UserError(f"{num} prompts: {what}, call it for each")
    is_exact = model.config.continues_exactly and particles == 1
    # beyond the context the windows of a text depend on its prompt
    moves = num_tokens > model.config.context and len({one.prompt for one in found}) > 1
    if (is_exact and min(lengths) < max(lengths)) or moves:
        what = f"prompts of {min(lengths)} to {max(lengths)} tokens"
        raise UserError(
            f"{what}: this model takes prompts of one length at a time, call it for each length"
        )
    if len({one.batch_key for one in found}) > 1:
        # free rows are completed together with the others
        found = [
            replace(one, way="filter", particles=particles, most_particles=particles)
            for one in found
        ]
    return found


def _row_streams(
    generator: torch.Generator | Sequence[torch.Generator] | None, num: int
) -> list[torch.Generator]:
    """A random stream for each of `num` rows. UserError for any other value."""
    num = checked(num, Length, "num")
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


def _parts(model: LanguageModel, prompt: object) -> list[Tensor | Gap]:
    """The pieces and gaps of a `prompt` of `generate`. UserError for any other value."""
    found: list[Tensor | Gap] = []
    given: Sequence[object] = () if prompt is None else (prompt,)
    if isinstance(prompt, Sequence) and all(isinstance(x, Tensor | Gap) for x in prompt):
        given = prompt
    for part in given:
        if isinstance(part, Gap):
            if not 0 <= part.least <= part.most or part.most < 1:
                raise UserError(f"gap of {part.least} to {part.most} tokens: give least <= most")
            found.append(part)
            continue
        check_integers(part, "prompt", "[T]")
        tokens = cast(Tensor, part)
        vocab_size = model.config.vocab_size
        if ((tokens < BLANK) | (tokens >= vocab_size)).any():
            raise UserError(
                f"the prompt {tokens.tolist()} has tokens outside of 0 to {vocab_size - 1}, "
                f"or {BLANK} for a blank: encode it again"
            )
        for is_blank, run in groupby(tokens.tolist(), lambda token: token == BLANK):
            of_run = torch.tensor(list(run))
            found.append(Gap(len(of_run), least=len(of_run)) if is_blank else of_run)
    return found
