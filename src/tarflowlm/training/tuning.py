"""Training a model further on another text: the configuration of such a run."""

from dataclasses import replace

from tarflowlm.config import RunConfig
from tarflowlm.data import look
from tarflowlm.errors import UserError
from tarflowlm.presets import check_time, with_blocks, with_steps
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.runs.weights import checksum
from tarflowlm.schema import checked

TUNING_RATE = 0.5
"""Peak learning rate of tuning, as a multiple of the one of the model's own training."""
TUNING_MINUTES = 10.0
"""Length of a tuning run if nothing else is asked for."""


def tuning(
    parent: Checkpoint,
    data: str,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    lr: float | None = None,
    unwrap: bool = False,
) -> RunConfig:
    """The run that continues the training of a model on another text, for `train(..., parent=...)`.

    Shape, tokenizer, batches and stages are the parent's. The stages keep their shares of the new
    length: `minutes`, by default 10, or `steps`. The optimiser is new, with the peak rate `lr`, by
    default half of the parent's. `unwrap` joins the lines of paragraphs. UserError for a length or
    rate that is not above 0.
    """
    check_time(minutes, steps)
    lr = TUNING_RATE * parent.run.optim.lr if lr is None else checked(lr, float, "lr")
    text = replace(parent.run.data, source=data, unwrap=unwrap)
    seen = look(text)
    problem = seen.misfit(parent.tokenizer)
    if problem is not None:
        remedy = f"`tarflowlm train english-small --data {data} --out DIR`"
        raise UserError(f"{problem}: train a new model on it: {remedy}")
    seen.tell(parent.tokenizer.normalization, "english-small")
    run = with_blocks(parent.run, parent.model.num_blocks)
    weights = {name: tensor.cpu() for name, tensor in parent.model.state_dict().items()}
    train = replace(
        run.train,
        minutes=minutes or TUNING_MINUTES,
        keep="best",
        evaluate_every=100,
        test_windows=0,
        precision="auto",
    )
    run = replace(
        run,
        name=f"{run.name}-tuned",
        parent=f"{parent.directory.name}@{checksum(weights)}",
        data=text,
        optim=replace(run.optim, lr=lr),
        train=train,
        seed=seed,
    )
    return run if steps is None else with_steps(run, steps)
