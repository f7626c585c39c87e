"""Texts beyond the trained context: a window slides, and its last half is the next prompt (docs/math.md, section 7).

A window is a text of at most the trained context, written as any other. When it is full, its last half (in whole
positions) becomes the prompt of the next window; everything before is forgotten.
"""

from dataclasses import replace

from torch import Tensor

from tarflowlm.generation.sampling import BLANK
from tarflowlm.generation.writing import Generation, Sampler
from tarflowlm.language_model import LanguageModel, LanguageModelConfig


def spans(config: LanguageModelConfig, num_tokens: int, num_given: int = 0) -> list[tuple[int, int]]:
    """(start, end) of every window, in tokens, for a text of `num_tokens` that begins with a prompt of `num_given`.

    A prompt that leaves no room in a window enters the first one with its last half window.
    """
    kept = config.context // config.patch // 2 * config.patch
    start = num_given - kept if num_given >= config.context else 0
    found = [(start, min(start + config.context, num_tokens))]
    while found[-1][1] < num_tokens:
        start = found[-1][1] - kept
        found.append((start, min(start + config.context, num_tokens)))
    return found


def num_positions(model: LanguageModel, num_tokens: int, num_given: int = 0) -> int:
    """How often `generate` advances `Watch.progress`: over the positions of all windows and blocks.

    `num_given` tokens of a prompt are among the `num_tokens`; that matters only where they exceed the context.
    """
    windows = spans(model.config, num_tokens, num_given)
    return sum(-(-(end - start) // model.config.patch) for start, end in windows) * model.num_blocks


def write_windows(sampler: Sampler, given: Tensor) -> Generation:
    """A text beyond the context that begins with a prompt: `given` [num, T], BLANK after it."""
    tokens, windows, end = given.clone(), list[Generation](), 0
    # with prompts of different lengths, the windows of the shortest
    bounds = spans(sampler.model.config, given.shape[1], int((given != BLANK).sum(1).min()))
    for start, end in bounds:
        sampler.stream.start = start
        windows.append(sampler.write(tokens[:, start:end]))
        tokens[:, start:end] = windows[-1].tokens.cpu()
        if sampler.stream.has_ended:
            break
    first = windows[0]
    if bounds[0][0] > 0:
        # part of the prompt is in no window
        first = replace(first, log_evidence=None, ess=None, pareto_k=None, draws=None)
    sweeps = tuple(map(sum, zip(*(window.sweeps for window in windows), strict=True)))
    return replace(first, tokens=tokens[:, :end].to(first.tokens.device), sweeps=sweeps, _flow=None, _latents=())
