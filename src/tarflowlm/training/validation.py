"""The bound over the validation and the test split, which all processes compute together."""

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from tarflowlm import chunks
from tarflowlm.data import eval_windows
from tarflowlm.errors import SILENT, Progress
from tarflowlm.evaluation.likelihood import Likelihood, summarise
from tarflowlm.training.checkpoint import averaged, save_best, stop
from tarflowlm.training.parallel import reshard
from tarflowlm.training.state import Run, State, seconds, update_pace


def validate(run: Run, state: State) -> Likelihood:
    """Evaluate on the validation windows, log the bound, and save the weights if they are the best
    of the stage. Collective.
    """
    counters, start = state.counters, seconds(run, state)
    config = state.config
    windows = eval_windows(
        run.corpus.split("valid"), config.model.context, config.train.evaluate_windows
    )
    result = evaluate(run, state, windows)
    run.log.write(
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
        save_best(run, state)
    counters.evaluation_is_due = False
    counters.evaluation = seconds(run, state) - start
    counters.per_window = counters.evaluation / len(windows)
    update_pace(run, state)
    return result


@torch.no_grad()
def evaluate(
    run: Run, state: State, windows: Int[Tensor, "W T"], progress: Progress = SILENT
) -> Likelihood:
    """The bound over `windows`, with the noise of `evaluation.likelihood.evaluate`.

    Each process computes its own rows of every batch. Stops in between if the run was asked to.
    Collective.
    """
    model, processes = state.model, run.processes
    size = chunks.evaluated_rows(windows.shape[1])
    generator = Generator(device=run.device).manual_seed(0)
    bound = state.bound if processes.shards(state.config.train) else model.bound
    nats = list[Tensor]()
    why: str | None = None
    model.eval()
    with averaged(state):
        for batch in windows.split(processes.world * size):
            tokens = batch.to(run.device)
            # in the parts that a single process would draw
            noise = torch.cat([model.draw_noise(part, generator) for part in tokens.split(size)])
            # in the last batch, processes without rows of their own repeat one: all must take part
            each = -(-len(tokens) // processes.world)
            own = processes.rank * each + torch.arange(each, device=run.device)
            rows = own.clamp(max=len(tokens) - 1).split(
                chunks.bound_rows(tokens.shape[1], run.device)
            )
            parts = [bound(tokens[some], noise[some]) for some in rows]
            nats.append(processes.gather(torch.cat(parts))[: len(tokens)])
            reshard(state.bound)
            progress.advance(len(batch))
            why = run.stop_requested()
            if why is not None:
                break
    model.train()
    if why is not None:  # out here, so that the weights in training are saved
        stop(run, state, why)
    characters = torch.from_numpy(run.corpus.tokenizer.characters_per_token)
    log_weights = -torch.cat(nats)[None].cpu().double()
    return summarise(model, log_weights, windows, characters)
