"""What a run measures with its weights: in validations, and at its end."""

import math
import platform
from contextlib import suppress
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from tarflowlm import chunks
from tarflowlm.data import eval_windows
from tarflowlm.errors import SILENT, Progress, Record, UserError
from tarflowlm.evaluation.likelihood import Likelihood, summarise
from tarflowlm.files import for_json, write_json
from tarflowlm.generation.texts import Samples
from tarflowlm.requests import Writing
from tarflowlm.runs import BEST, SUMMARY
from tarflowlm.runs.checkpoint import Checkpoint, Summary, write_run
from tarflowlm.training.checkpoint import save_best, stop
from tarflowlm.training.optim import averaged
from tarflowlm.training.pace import num_test_windows, seconds, update_pace
from tarflowlm.training.parallel import reshard
from tarflowlm.training.run import Run

SHOWN = 160
"""Characters of a text, in the mean."""


def validate(run: Run) -> Likelihood:
    """Evaluate on the validation windows, log the bound and a text, and save the weights if they
    are the best of the stage. Collective.
    """
    counters, config = run.counters, run.config
    windows = eval_windows(
        run.corpus.split("valid"), config.model.context, config.train.evaluate_windows
    )
    start = seconds(run)
    if run.compiles and run.validated is not run.bound:
        # the first evaluation compiles layers, which is not training time
        evaluate(run, windows)
        run.began += seconds(run) - start
        run.validated = run.bound
    result = evaluate(run, windows)
    evaluated = seconds(run)
    record: Record = {
        "split": "valid",
        **counters.place(),
        "nats_per_token": result.nats_per_token,
        "bpc": result.bpc,
        "stderr": result.stderr,
    }
    if text := text_so_far(run):
        record["text"] = text
    run.log.write(record)
    counters.stalled += 1
    if result.nats_per_token < counters.lowest:
        counters.lowest = result.nats_per_token
        counters.lowest_at = counters.stage_step
        counters.stalled = 0
        save_best(run)
    counters.evaluation_is_due = False
    counters.evaluated = seconds(run)
    counters.evaluation = counters.evaluated - start
    counters.per_window = (evaluated - start) / len(windows)
    update_pace(run)
    return result


def finish(run: Run) -> Summary:
    """Evaluate the test split, and write the summary. Collective."""
    config, counters = run.config, run.counters
    minutes = config.train.minutes
    if minutes:
        # take the steps of the run instead, and the test windows that the time left allows, at
        # least 32
        left = 60 * minutes - seconds(run)
        fitting = max(32, int(left / max(counters.per_window, 1e-9)))
        lengths = replace(
            config.train,
            minutes=0.0,
            stage_steps=tuple(counters.stage_steps),
            test_windows=min(
                num_test_windows(run.corpus, config), run.processes.from_first(fitting)
            ),
        )
        config = replace(config, train=lengths)
    windows = eval_windows(
        run.corpus.split("test"), config.model.context, config.train.test_windows or None
    )
    run.log.reporter.stage("evaluating the test split", len(windows))
    test = evaluate(run, windows, run.log.reporter)
    sizes = {name: p.numel() for name, p in run.model.named_parameters()}
    summary = {
        "preset": config.name,
        "seed": config.seed,
        "steps": counters.step,
        "tokens": counters.tokens,
        "stage_valid_bpc": counters.valid_bpc,
        "seconds": round(counters.training, 2),
        "wall_seconds": round(seconds(run), 2),
        "minutes": minutes,
        "parameters": sum(sizes.values()),
        "trunk_parameters": sum(n for name, n in sizes.items() if "transformer." in name),
        "test": for_json(test.to_json()),
        "source": config.data.source,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": run.processes.world,
        "device": str(run.device),
        "machine": platform.machine(),
    }
    if run.processes.first:
        for directory in (run.out, run.out / BEST) if minutes else ():
            write_run(directory, config, run.corpus.tokenizer)
        write_json(run.out / SUMMARY, summary)  # last: it says that the run is finished
    return summary


@torch.no_grad()
def evaluate(run: Run, windows: Int[Tensor, "W T"], progress: Progress = SILENT) -> Likelihood:
    """The bound over `windows`, with the noise of `evaluation.likelihood.evaluate`.

    Each process computes its own rows of every batch. Stops in between if the run was asked to.
    Collective.
    """
    model, processes = run.model, run.processes
    size = chunks.rows_at_once(windows.shape[1], chunks.EVALUATED_TOKENS)
    generator = Generator(device=run.device).manual_seed(0)
    bound = run.bound if run.is_sharded else model.bound
    nats = list[Tensor]()
    why: str | None = None
    model.eval()
    with averaged(run.copies, model):
        for batch in windows.split(processes.world * size):
            tokens = batch.to(run.device)
            # draw noise in the same parts as a single process
            noise = torch.cat([model.draw_noise(part, generator) for part in tokens.split(size)])
            # in the last batch, processes without own rows repeat one, because all must take part
            each = -(-len(tokens) // processes.world)
            own = processes.rank * each + torch.arange(each, device=run.device)
            rows = own.clamp(max=len(tokens) - 1).split(
                chunks.bound_rows(tokens.shape[1], run.device)
            )
            parts = [bound(tokens[some], noise[some]) for some in rows]
            nats.append(processes.gather(torch.cat(parts))[: len(tokens)])
            reshard(run.bound)
            progress.advance(len(batch))
            why = run.stop_requested()
            if why is not None:
                break
    model.train()
    if why is not None:  # out here, so that the weights in training are saved
        stop(run, why)
    characters = torch.from_numpy(run.corpus.tokenizer.characters_per_token)
    log_weights = -torch.cat(nats)[None].cpu().double()
    return summarise(model, log_weights, windows, characters)


def text_so_far(run: Run) -> str:
    """The beginning of a text by the present weights, always from the same random numbers.

    Empty in other processes than the first, for weights that are sharded or not finite, and for
    models that cannot write so little.
    """
    config, model, corpus = run.config, run.model, run.corpus
    if not run.processes.first or run.is_sharded:
        return ""
    # a tokenizer that loses characters counts none
    characters = corpus.num_characters("train") or corpus.num_tokens("train")
    wanted = math.ceil(SHOWN * corpus.num_tokens("train") / characters)
    patch = config.model.patch
    request = Writing(num=1, length=min(wanted, config.model.context) // patch * patch, seed=0)
    lm = Checkpoint(model, corpus.tokenizer, config, {}, run.out)
    text = ""
    model.eval()
    with averaged(run.copies, model), suppress(UserError):
        text = next(iter(Samples(request, lm).batches())).texts[0]
    model.train()
    return text
