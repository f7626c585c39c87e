"""`generate`, the entry point of sampling: either model, with or without given tokens
(docs/math.md, 7 and 9).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflowlm.checks import as_integer, check_generator, check_integers, check_model, check_option
from tarflowlm.config import Decoding
from tarflowlm.device import keep_freed_memory
from tarflowlm.errors import UserError
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.generation.inversion import Decoders, as_decoders
from tarflowlm.generation.sampling import BLANK, adjust_weights, row_generators
from tarflowlm.generation.writing import Generation, Sampler, TokenStream, Watch, write_windows
from tarflowlm.language_model import LanguageModel
from tarflowlm.runs.checkpoint import Checkpoint


@torch.no_grad()
def generate(
    model: LanguageModel | Checkpoint,
    *,
    num_tokens: int,
    num: int = 1,
    prompt: Tensor | None = None,
    particles: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    decoding: Decoding = "mode",
    decoder: Decoders = "auto",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    watch: Watch | None = None,
) -> Generation:
    """Draw `num` samples of `num_tokens` tokens each, given tokens included (docs/math.md, sections
    7 and 9).

    `model` is a model, or what `load` returns.
    At temperature 1, without top-k, top-p or given tokens, the latents are exact samples.
    `decoding` turns them into tokens: "drawn" samples p(x|z), so that the tokens are exact samples,
    too; "mode" takes the most probable token, which is the same where the codebook is sharp.

    `prompt` [T], or [num, T] with one row per sample, holds given tokens; BLANK (-1) marks a token
    to draw, anywhere. Tokens given at the start are exact for the baseline and, given their
    latents, for a flow of one block. Otherwise the drawn tokens ignore given tokens further right
    and the dependence that the upper blocks describe. R = `particles` > 1 corrects this at R times
    the cost, exactly in the limit of many particles.

    `temperature` tau raises the probabilities of tokens, given everything before in the baseline or
    in block 1, to the power 1 / tau; `top_k` and `top_p` truncate them. A Mix-d block tied to the
    codebook has these probabilities as its weights (the noise is not scaled, since Phi(u) has to
    stay uniform). Other flows have none and refuse. In a stack whose lower blocks fill in what they
    are sure of, the weights of every block change, in the noise for particles those of block 1
    alone.

    In a stack without blocks from right to left a prompt is continued exactly: the states of its
    tokens are known.

    `num_tokens` may exceed the trained context (`writing.py`) with one particle and no blanks
    between given tokens.

    `decoder`, for all blocks or one per block, L first: "steps" inverts position by position,
    "sweeps" in parallel, equal up to rounding, "auto" by the cheaper. Given tokens, temperature,
    top-k and top-p make block 1 take steps.

    Row b has a random stream of its own, made from `generator` and b, so it does not depend on
    `num`. A list of generators, one per row, replaces these streams.

    Raises UserError for a prompt or settings that the model cannot take, and for arguments of a
    wrong type.
    """
    model = model.model if isinstance(model, Checkpoint) else model
    check_model(model)
    check_option(decoding, "decoding", Decoding)
    decoder, watch = as_decoders(decoder), watch or Watch()
    num, num_tokens, particles = map(
        as_integer, (num, num_tokens, particles), ("num", "num_tokens", "particles")
    )
    given = _given(model, num, num_tokens, prompt, particles)
    adjust = _adjust(model, temperature, top_k, top_p)
    keep_freed_memory()
    rows, stream = _row_streams(generator, num), TokenStream(watch, given)
    sampler = Sampler(model, rows, particles, adjust, decoding, decoder, watch.progress, stream)
    return (
        sampler.write(given)
        if num_tokens <= model.config.context
        else write_windows(sampler, given)
    )


def _adjust(
    model: LanguageModel, temperature: float, top_k: int | None, top_p: float | None
) -> AdjustWeights | None:
    adjust = adjust_weights(temperature, top_k, top_p)
    if top_k is not None and top_k >= model.config.vocab_size:
        adjust, top_k = adjust_weights(temperature, None, top_p), None
    if adjust is not None and not model.config.has_token_weights and not model.config.fills():
        settings = [f"temperature {temperature}"] if temperature != 1.0 else []
        settings += [
            f"{name} {value}"
            for name, value in (("top-k", top_k), ("top-p", top_p))
            if value is not None
        ]
        why = f"{model.config.describe(0)} has no weights of tokens to change"
        rule = (
            "sample at temperature 1 without top-k and top-p, or use a model whose block 1 is mixd"
        )
        raise UserError(f"{', '.join(settings)}: {why}: {rule}")
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


def _given(
    model: LanguageModel, num: int, num_tokens: int, prompt: Tensor | None, particles: int
) -> Tensor:
    """The given tokens of every sample, BLANK elsewhere: [num, num_tokens] on the CPU."""
    context, vocab_size = model.config.context, model.config.vocab_size
    for name, value in (("num", num), ("length", num_tokens), ("particles", particles)):
        if value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
    given = torch.full((num, num_tokens), BLANK)
    if prompt is not None:
        check_integers(prompt, "prompt", "[T]", "[num, T]")
        length = prompt.shape[-1]
        if length > num_tokens or (particles == 1 and length == num_tokens and (prompt >= 0).all()):
            what = f"the prompt has {length} tokens, which leaves no room in {num_tokens}"
            raise UserError(f"{what}: shorten it, or raise the length")
        if ((prompt < BLANK) | (prompt >= vocab_size)).any():
            rule = f"0 to {vocab_size - 1}, or {BLANK} for a blank: encode it again"
            raise UserError(f"the prompt {prompt.tolist()} has tokens outside of {rule}")
        given = F.pad(prompt.cpu(), (0, num_tokens - length), value=BLANK).expand(num, -1)
    has_gaps = ((given[:, :-1] == BLANK) & (given[:, 1:] != BLANK)).any()
    if num_tokens > context and (particles > 1 or has_gaps):
        rule = f"beyond the trained context of {context} tokens, take 1 particle, and a prompt without blanks in it"
        raise UserError(f"length {num_tokens} with particles {particles}: {rule}")
    return given
