"""Texts beyond the trained context: a window slides, and its last half is the next prompt (docs/math.md, section 7).

A window is a text of at most the trained context, written as any other. When it is full, its last half (in whole
positions) becomes the prompt of the next window; everything before is forgotten.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tarflowlm.errors import UserError
from tarflowlm.generation.sampling import BLANK
from tarflowlm.language_model import LanguageModelConfig


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


def num_unseen(config: LanguageModelConfig, num_tokens: int, num_given: int) -> int:
    """Leading tokens of a prompt that no window sees."""
    return spans(config, num_tokens, num_given)[0][0]


def slide(
    config: LanguageModelConfig,
    given: Tensor,
    write: Callable[[Tensor, int, int], Tensor],
    enough: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """The tokens [num, T] of a text that begins with a prompt, `given` [num, T] with BLANK after it, on the CPU.

    `write` draws the blanks of one window: from its given tokens [num, whole patches], its start and its length to
    its tokens. After a window with whose text [num, t] `enough` is content, no other follows.
    """
    tokens, device = given.clone(), given.device
    for start, end in spans(config, given.shape[1], int((given[0] != BLANK).sum())):
        window = F.pad(tokens[:, start:end], (0, (start - end) % config.patch), value=BLANK)
        found = write(window, start, end - start)
        tokens[:, start:end], device = found.to(tokens.device), found.device
        if enough is not None and enough(tokens[:, :end]):
            break
    return tokens[:, :end].to(device)


def check_length(
    config: LanguageModelConfig, num_tokens: int, *, template: bool, particles: int, passes: str | None
) -> None:
    """UserError for what one window has, and a text of several has not; `passes` names what was asked for of them."""
    context = config.context
    if num_tokens <= context:
        return
    if template:
        raise UserError(
            f"length {num_tokens}: a template has to fit the trained context of {context} tokens: shorten it, or "
            f"give only its start, as a prompt"
        )
    if particles > 1:
        raise UserError(
            f"particles {particles}: beyond the trained context of {context} tokens every window has weights of its "
            f"own: choose 1, or a length of at most {context}"
        )
    if passes is not None:
        raise UserError(
            f"length {num_tokens}: beyond the trained context of {context} tokens every window has {passes} of its "
            f"own: leave them out, or choose a length of at most {context}"
        )
