"""The bound over the validation and the test split, which all processes compute together."""

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from tarflowlm import chunks
from tarflowlm.data import eval_windows
from tarflowlm.evaluation.likelihood import Likelihood, summarise, windows_per_batch
from tarflowlm.progress import SILENT, Progress
from tarflowlm.training.checkpoint import averaged, save_best, stop
from tarflowlm.training.pace import stop_requested
from tarflowlm.training.parallel import reshard
from tarflowlm.training.state import Job, State, seconds


def validate(job: Job, state: State) -> Likelihood:
    """Evaluate on the validation windows, log the bound, and save the weights if they are the best
    of the stage. Collective.
    """
    counters, start = state.counters, seconds(job, state)
    windows = eval_windows(
        job.corpus.split("valid"),
        job.config.model.context,
        job.config.train.evaluate_windows,
    )
    state.model.eval()
    result = evaluate(job, state, windows)  # with the same noise at every call
    state.model.train()
    job.log.write(
        {
            "split": "valid",
            **counters.place(),
            "nats_per_token": result.nats_per_token,
            "bpc": result.bpc,
            "stderr": result.stderr,
        }
    )
    counters.stalled += 1
    if result.nats_per_token < counters.lowest:
        counters.lowest = result.nats_per_token
        counters.lowest_at = counters.stage_step
        counters.stalled = 0
        save_best(job, state, result)
    counters.evaluation_is_due = False
    counters.evaluation = seconds(job, state) - start
    counters.per_window = counters.evaluation / len(windows)
    return result


def evaluate(
    job: Job, state: State, windows: Int[Tensor, "W T"], progress: Progress = SILENT
) -> Likelihood:
    """The bound over `windows`, as `evaluation.likelihood.evaluate` computes it with one sample;
    the processes share the rows of every batch. Stops in between if the run was asked to.
    Collective.
    """
    size = windows_per_batch(windows.shape[1])
    generator = Generator(device=job.device).manual_seed(0)
    nats = list[Tensor]()
    why: str | None = None
    with averaged(state):
        for batch in windows.split(job.processes.world * size):
            nats.append(divided_bound(job, state, batch.to(job.device), size, generator))
            why = stop_requested(job)
            if why is not None:
                break
            progress.advance(len(batch))
    if why is not None:  # out here, so that the weights in training are saved
        stop(job, state, why)
    characters = torch.from_numpy(job.corpus.tokenizer.characters_per_token)
    log_weights = -torch.cat(nats)[None].cpu().double()
    return summarise(state.model, log_weights, windows, characters)


@torch.no_grad()
def divided_bound(
    job: Job, state: State, tokens: Int[Tensor, "B T"], size: int, generator: Generator
) -> Float[Tensor, " B"]:
    """The negative bound of every row of a batch, in nats, from all processes; each computes its
    own rows. Collective.
    """
    # in the parts that a single process would draw
    noise = torch.cat([state.model.draw_noise(part, generator) for part in tokens.split(size)])
    # in the last batch, processes without rows of their own repeat one: all must take part
    each = -(-len(tokens) // job.processes.world)
    own = job.processes.rank * each + torch.arange(each, device=tokens.device)
    own = own.clamp(max=len(tokens) - 1)
    rows = each
    if tokens.device.type == "cpu":  # where the activations should stay in the cache
        rows = chunks.rows_at_once(tokens.shape[1], chunks.BOUND_TOKENS_CPU)
    bound = state.bound if job.is_sharded else state.model.bound
    nats = [bound(tokens[some], noise[some]) for some in own.split(rows)]
    reshard(state.bound)
    return job.processes.gather(torch.cat(nats))[: len(tokens)]
