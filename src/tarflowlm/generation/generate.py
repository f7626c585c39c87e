"""`generate`, the entry point of sampling: either model, with or without given tokens (docs/math.md, 7 and 9)."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tarflowlm.config import Decoding
from tarflowlm.device import keep_freed_memory
from tarflowlm.errors import UserError
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.generation.choice import check_choice
from tarflowlm.generation.inversion import Decoders, Tick, check_decoders
from tarflowlm.generation.sampling import BLANK, adjust_weights, row_generators
from tarflowlm.generation.telling import OnTokens, Telling
from tarflowlm.generation.window import check_length, num_unseen, slide, spans
from tarflowlm.generation.writing import Generation, Request, write_window
from tarflowlm.language_model import LanguageModel, as_integer, check_generator, check_model, check_option
from tarflowlm.model import as_flow
from tarflowlm.objective import check_integers


@torch.no_grad()
def generate(
    model: LanguageModel,
    *,
    num_tokens: int,
    num: int = 1,
    prompt: Tensor | None = None,
    template: Tensor | None = None,
    particles: int = 1,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    decoding: Decoding = "mode",
    return_passes: bool = False,
    decoder: Decoders = "steps",
    tick: Tick | None = None,
    rows: Sequence[int] | None = None,
    on_tokens: OnTokens | None = None,
    enough: Callable[[Tensor], bool] | None = None,
) -> Generation:
    """Draw `num` samples of `num_tokens` tokens each, given tokens included (docs/math.md, sections 7 and 9).

    At temperature 1, without top-k, top-p or given tokens, the latents are exact samples. `decoding` makes them
    tokens: drawn takes one from p(x|z), which makes the tokens exact samples, too; mode takes the most probable one,
    which is the same where the codebook is sharp.

    `temperature` tau raises probabilities of tokens to the power 1 / tau, `top_k` and `top_p` truncate them: those of
    the baseline, or those of block 1 given everything before. A Mix-d block tied to the codebook has them as its
    weights; the noise is not scaled, since Phi(u) has to stay uniform. For Mix-1, or Mix-d with components of its
    own, they are estimated for all V tokens (`TokenChoice`): a token is chosen, whatever `decoding` says, together
    with latents of its own, and the noise that the blocks above drew for it is not used. UserError for this with more
    than 1,024 tokens, for an affine block 1, and where the blocks above know more than a nat a token.

    `prompt` [tokens] comes first, or [num, tokens] with one prompt per sample, where -1 (BLANK) fills the ends of
    shorter ones; these must be shorter than the context. `template` [tokens], or [num, tokens] with one template per
    sample, gives tokens anywhere: -1 marks a token to be drawn, and tokens after its end are drawn too. A prompt is
    exact for the baseline and, given its latents, for a single left-to-right block. Otherwise drawn tokens ignore the
    given tokens further right and the dependence that the blocks above describe. R = `particles` > 1 corrects this
    (`particles.py`) at R times the cost, and is exact in the limit of many. Temperature, top-k and top-p apply to
    drawn tokens, not to the weights of particles.

    `num_tokens` may exceed the trained context: the window then slides, and its last half, encoded anew, is the
    prompt of the next one (`window.py`). What holds for a prompt holds for every window: it is exact for the baseline
    and a single left-to-right block, and approximate in a stack, whose upper blocks draw the noise of a window
    without regard to the tokens kept. Of a prompt that fills the context the last half window counts; there is no
    evidence then, and else that of the prompt. Not with a template, passes or several particles.

    Row b has its own random stream, seeded from `generator`, so rows do not depend on `num`. `rows` numbers them, in
    place of 0 to `num` - 1: a part of many samples, drawn alone, is what it is among all of them.

    `decoder`: steps inverts every block position by position; sweeps by parallel sweeps, with the same result up to
    rounding (`inversion.py`); auto takes the cheaper of the two. Block 1 is swept only if no tokens are given and no
    probabilities adjusted. `tick` is called `num_ticks` times, once per position and block.

    `on_tokens` is told the tokens as they become final, given ones included: the next ones of all rows, [num, n] on
    the CPU, until all have been told. With the baseline, or block 1 inverted by steps, they come one by one; else,
    and with particles or drawn tokens, at the end of a window.
    Beyond the context `enough` is called with the tokens [num, t] after every window; once it is true, the text ends
    there, shorter than `num_tokens`.

    UserError for sizes that the model cannot generate, for settings out of range and for unknown given tokens, and
    for arguments of a wrong type.
    """
    check_model(model)
    check_generator(generator)
    check_option(decoding, "decoding", Decoding)
    check_decoders(decoder)
    num, num_tokens = as_integer(num, "num"), as_integer(num_tokens, "num_tokens")
    particles = as_integer(particles, "particles")
    keep_freed_memory()
    given = _given(model, num, num_tokens, prompt, template, particles)
    passes = "passes and states" if return_passes else None
    check_length(model.config, num_tokens, template=template is not None, particles=particles, passes=passes)
    adjust = _adjustment(model, temperature, top_k, top_p)
    streams = row_generators(
        range(num) if rows is None else rows, generator or torch.Generator().manual_seed(torch.seed())
    )
    tell = None if on_tokens is None else Telling(on_tokens, given[:, :num_tokens])
    request = Request(streams, particles, adjust, decoding, decoder, return_passes, tick, tell)
    if num_tokens <= model.config.context:
        return write_window(model, given, num_tokens, request)
    return _in_windows(model, given[:, :num_tokens], request, enough)


def _in_windows(
    model: LanguageModel, given: Tensor, request: Request, enough: Callable[[Tensor], bool] | None
) -> Generation:
    """A text beyond the context, which begins with a prompt: given [num, T], BLANK after it."""
    windows: list[Generation] = []

    def write(window: Tensor, start: int, length: int) -> Tensor:
        if request.tell is not None:
            request.tell.start = start
        # the second window tries the decoders, and the others repeat its choice: a prompt may fill the first one
        again = request.decoder == "auto" and len(windows) > 1
        chosen = (windows[1].decoders or request.decoder) if again else request.decoder
        windows.append(write_window(model, window, length, replace(request, decoder=chosen)))
        return windows[-1].tokens

    tokens = slide(model.config, given, write, enough)
    sweeps = tuple(sum(block) for block in zip(*(w.sweeps for w in windows), strict=True))
    found = replace(windows[0], tokens=tokens, sweeps=sweeps)
    seen = num_unseen(model.config, given.shape[1], int((given[0] != BLANK).sum())) == 0
    return found if seen else replace(found, log_evidence=None, ess=None, pareto_k=None, draws=None)


def _adjustment(
    model: LanguageModel, temperature: float, top_k: int | None, top_p: float | None
) -> AdjustWeights | None:
    """`adjust_weights` for the tokens of this model. UserError where its block 1 does not allow for it."""
    adjust = adjust_weights(temperature, top_k, top_p)
    if top_k is not None and top_k >= model.config.vocab_size:
        adjust, top_k = adjust_weights(temperature, None, top_p), None
    if adjust is not None and not model.config.has_token_weights:
        settings = [f"temperature {temperature}"] if temperature != 1.0 else []
        settings += [f"{name} {value}" for name, value in (("top-k", top_k), ("top-p", top_p)) if value is not None]
        check_choice(as_flow(model), ", ".join(settings))
    return adjust


def num_ticks(model: LanguageModel, num_tokens: int, num_given: int = 0) -> int:
    """How often `generate` calls `tick` for `num_tokens` tokens: once per position and block of every window.

    `num_given` tokens of a prompt are among them; that matters only where they exceed the context.
    """
    windows = spans(model.config, num_tokens, num_given)
    return sum(-(-(end - start) // model.config.patch) for start, end in windows) * model.num_blocks


def _given(
    model: LanguageModel, num: int, num_tokens: int, prompt: Tensor | None, template: Tensor | None, particles: int
) -> Tensor:
    """The given tokens of every sample, BLANK elsewhere: [num, T] on the CPU, padded to whole patches."""
    context, vocab_size, patch = model.config.context, model.config.vocab_size, model.config.patch
    for name, value in (("num", num), ("length", num_tokens), ("particles", particles)):
        if value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
    for name, tokens in (("prompt", prompt), ("template", template)):
        if tokens is not None:
            check_integers(tokens, name, "[T]", "[num, T]")
    given = torch.full((num, -(-num_tokens // patch) * patch), BLANK)
    if prompt is not None and template is not None:
        raise UserError("both a prompt and a template: put the prompt at the start of the template")
    if prompt is not None and prompt.shape[-1] >= num_tokens:
        raise UserError(
            f"the prompt has {prompt.shape[-1]} tokens, which leaves no room in {num_tokens}: "
            f"shorten it, or raise the length"
        )
    tokens = prompt if template is None else template
    if tokens is None:
        return given
    if tokens.shape[-1] > num_tokens:
        raise UserError(
            f"the template has {tokens.shape[-1]} tokens, more than the length of {num_tokens}: "
            f"shorten it, or raise the length (at most {context})"
        )
    least = 0 if template is None and tokens.dim() == 1 else BLANK
    if ((tokens < least) | (tokens >= vocab_size)).any():
        name = "prompt" if template is None else "template"
        raise UserError(f"the {name} {tokens.tolist()} has tokens outside of 0 to {vocab_size - 1}: encode it again")
    given[:, : tokens.shape[-1]] = tokens.cpu()
    return given
