"""A text that a run writes while it learns."""

from contextlib import suppress

from tarflowlm.errors import UserError
from tarflowlm.generation.texts import Samples
from tarflowlm.requests import Writing
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.training.checkpoint import averaged
from tarflowlm.training.state import Run, State

SHOWN = 40
"""Tokens of a text."""


def text_so_far(run: Run, state: State) -> str:
    """The beginning of a text by the present weights, always from the same random numbers.

    Empty in other processes than the first, for weights that are sharded or not finite, and for
    models that cannot write so little.
    """
    config, model = state.config, state.model
    if not run.processes.first or run.processes.shards(config.train):
        return ""
    patch = config.model.patch
    request = Writing(num=1, num_tokens=min(SHOWN, config.model.context) // patch * patch, seed=0)
    lm = Checkpoint(model, run.corpus.tokenizer, config, {}, run.out)
    text = ""
    model.eval()
    with averaged(state), suppress(UserError):
        text = next(iter(Samples(request, lm).batches())).texts[0]
    model.train()
    return text
