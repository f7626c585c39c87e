"""One entry to sampling: unconditional or after a prompt, TarFlowLM or baseline, every pass on request."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflowlm.baseline import TokenLM
from tarflowlm.checkpoint import Model
from tarflowlm.errors import UserError
from tarflowlm.generation.noise import row_generators, row_normal, row_uniform
from tarflowlm.generation.sequential import sample_baseline
from tarflowlm.generation.stack import Decoder, invert_stack
from tarflowlm.generation.weights import adjust_weights


@dataclass(frozen=True)
class Generation:
    """Samples, and on request the tokens and latents after every pass.

    `tokens` [B, T]. `passes`: decoded tokens of the noise u = h^(L) and of every state down to h^(0) = z, L + 1
    tensors [B, T], coarse to fine; `states`: those states [B, T, d]. Empty for the baseline, which has one pass.
    """

    tokens: Tensor
    passes: tuple[Tensor, ...] = ()
    states: tuple[Tensor, ...] = ()
    sweeps: tuple[int, ...] = ()
    """Passes over the positions that each block took, block L first; as many as positions where sequential."""


@torch.no_grad()
def generate(
    model: Model,
    *,
    num_tokens: int,
    num: int = 1,
    prompt: Tensor | None = None,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    return_passes: bool = False,
    decoder: Decoder = "sequential",
    tick: Callable[[], None] | None = None,
) -> Generation:
    """`num` samples of `num_tokens` tokens, the `prompt` [n] included.

    Exact samples of the model at temperature 1 without a prompt. `temperature` is the power 1 / temperature on the
    mixture weights of block 1, or on the baseline's probabilities. The noise is not scaled: Phi(u) must stay uniform,
    or components would be chosen by their place on the axis. In a stack of affine blocks alone, which has no weights,
    it scales the standard deviation of the noise. A prompt is exact for a single left-to-right block and
    for the baseline; with more blocks the states above block 1 are sampled without knowing it, an approximation.
    Row b draws its noise from a stream of its own, seeded from `generator`, so rows do not depend on `num`.
    `decoder`: sequential inverts every block position by position; parallel by Jacobi sweeps, with the same result
    up to rounding; auto chooses per block (`generation/parallel.py`).
    `tick` is called once per position and block (`num_ticks` says how often).

    Raises UserError for sizes that the model cannot generate and for a prompt of tokens it does not know.
    """
    prompt = _check(model, num, num_tokens, prompt)
    adjust = adjust_weights(temperature, top_k, top_p)
    rows = row_generators(num, generator or torch.Generator().manual_seed(torch.seed()))
    padded = -(-num_tokens // model.config.patch) * model.config.patch
    if isinstance(model, TokenLM):
        tokens = sample_baseline(model, row_uniform(rows, padded), prompt=prompt, adjust=adjust, tick=tick)
        return Generation(tokens=tokens[:, :num_tokens])
    book, dim = model.codebook, model.config.latent_dim
    noise = row_normal(rows, padded, dim).to(book.mean)
    if set(model.config.couplings) == {"affine"}:
        noise = noise * temperature
    known = None
    if prompt is not None and len(prompt):
        eps = row_normal(rows, len(prompt), dim).to(book.mean)
        known = book.encode(prompt.expand(num, -1).to(book.mean.device), eps)
    padded_states, sweeps = invert_stack(model, noise, decoder=decoder, known=known, adjust=adjust, tick=tick)
    states = [h[:, :num_tokens] for h in padded_states]
    tokens = book.decode(states[-1])
    if prompt is not None:
        tokens[:, : len(prompt)] = prompt.to(tokens.device)
    if not return_passes:
        return Generation(tokens=tokens, sweeps=sweeps)
    passes = tuple(book.decode(h) for h in states)
    return Generation(tokens, passes=passes, states=tuple(states), sweeps=sweeps)


def num_ticks(model: Model, num_tokens: int) -> int:
    """How often `generate` calls `tick`."""
    positions = -(-num_tokens // model.config.patch)
    return positions * (1 if isinstance(model, TokenLM) else model.num_blocks)


def _check(model: Model, num: int, num_tokens: int, prompt: Tensor | None) -> Tensor | None:
    if num < 1:
        raise UserError(f"num {num}: ask for at least 1 sample")
    if num_tokens < 1:
        raise UserError(f"length {num_tokens}: ask for at least 1 token")
    if num_tokens > model.config.context:
        raise UserError(
            f"length {num_tokens}: the model was trained on {model.config.context} tokens; ask for no more"
        )
    if prompt is not None and len(prompt) >= num_tokens:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, which leaves no room in {num_tokens}: "
            f"shorten it, or raise the length (at most {model.config.context})"
        )
    vocab_size = model.config.vocab_size
    if prompt is not None and ((prompt < 0) | (prompt >= vocab_size)).any():
        raise UserError(f"the prompt {prompt.tolist()} has tokens outside of 0 to {vocab_size - 1}: encode it anew")
    return prompt
