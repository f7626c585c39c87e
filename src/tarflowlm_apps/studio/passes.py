"""The passes of a text, from the noise to the latents, as rows for a slider."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from tarflowlm.data.tokenizer import Tokenizer
from tarflowlm.model import TarFlowLM
from tarflowlm.terminal.grid import Row, pass_rows

SEEN = 0.005
"""The share of tokens that a pass has to change for anyone to see it."""


def passes(
    model: TarFlowLM,
    tokenizer: Tokenizer,
    texts: Sequence[Tensor],
    states: Sequence[Tensor],
    *,
    given: Tensor | None = None,
) -> tuple[list[Row], bool]:
    """The rows of a text, each token as opaque as p(x|h), and whether there is much to watch.

    `states` are h^(L), ..., h^(0), each [T, d], and `texts` what they decode to, each [T]. Where
    one block writes all, there is nothing to watch.
    """
    probabilities = []
    for text, state in zip(texts, states, strict=True):
        p = model.codebook.log_posterior(state).exp()
        probabilities.append(p.gather(-1, text[:, None].to(p.device))[:, 0])
    shares = [(after != before).double().mean().item() for before, after in pairwise(texts)]
    is_watched = sum(share > SEEN for share in shares) > 1
    return pass_rows(texts, tokenizer, given=given, probabilities=probabilities), is_watched
