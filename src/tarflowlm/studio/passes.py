"""The passes of a text: a slider over its states, from the noise to the latents."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from tarflowlm.data.tokenizer import Tokenizer
from tarflowlm.model import TarFlowLM
from tarflowlm.studio.pieces import slider
from tarflowlm.views.grid import pass_rows

SEEN = 0.005
"""The share of tokens that a pass has to change for anyone to see it."""


def passes(
    model: TarFlowLM,
    tokenizer: Tokenizer,
    tokens: Tensor,
    states: Sequence[Tensor],
    *,
    given: Tensor | None = None,
    may_open: bool = True,
    always: bool = True,
) -> str:
    """The passes of a text of `tokens` [T], each token as opaque as p(x|h).

    `states` are h^(L), ..., h^(0), each [T, d]. Where more than one pass changes something, the
    slider is open, if it may be; elsewhere there is little to watch, and nothing unless `always`.
    """
    book = model.codebook
    texts = [*(book.decode(state).cpu() for state in states[:-1]), tokens.cpu()]
    probabilities = []
    for text, state in zip(texts, states, strict=True):
        p = book.log_posterior(state).exp()
        probabilities.append(p.gather(-1, text[:, None].to(p.device))[:, 0])
    shares = [(after != before).double().mean().item() for before, after in pairwise(texts)]
    is_seen = sum(share > SEEN for share in shares) > 1
    if not is_seen and not always:
        return ""
    rows = pass_rows(texts, tokenizer, given=given, probabilities=probabilities)
    return slider(rows, is_open=may_open and is_seen)
