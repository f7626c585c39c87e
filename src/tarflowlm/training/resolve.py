"""Before the first step: the configuration of a run, its text, and its directory.

`resolve` turns the configuration that is asked for, in asked.json, into the one that is trained, in
config.json. Both are kept: `auto` means another precision on another device, and a run must still
recognise the same request.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from tarflowlm.config import RunConfig
from tarflowlm.data import (
    SOURCE_NAMES,
    Corpus,
    Tokenizer,
    load_tokenizer,
    look,
    prepare_corpus,
    suited,
)
from tarflowlm.data.text import HUB
from tarflowlm.errors import Progress, UserError, check_package
from tarflowlm.files import TEMPORARY, full_disk_as_user_error, read_json, write_json, writer_lock
from tarflowlm.presets import check_time, with_blocks, with_steps
from tarflowlm.processes import Processes
from tarflowlm.runs import ASKED, BEST, CONFIG, PARENT, STATE, TOKENIZER, WEIGHTS
from tarflowlm.runs.checkpoint import (
    Checkpoint,
    checksum,
    read_run,
    resume_command,
    write_run,
    write_weights,
)
from tarflowlm.schema import checked, flatten, from_dict, to_dict
from tarflowlm.training.optim import with_precision

logger = logging.getLogger("tarflowlm")


# the configuration that is asked for


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
    lr = parent.run.optim.lr / 2 if lr is None else checked(lr, float, "lr")
    text = replace(parent.run.data, source=data, unwrap=unwrap)
    seen = look(text)
    problem = seen.misfit(parent.tokenizer)
    if problem is not None:
        remedy = f"`tarflowlm train english-small --data {data} --out DIR`"
        raise UserError(f"{problem}: train a new model on it: {remedy}")
    seen.tell(parent.tokenizer.normalization, "english-small")
    run = with_blocks(parent.run, range(parent.model.num_blocks))
    # a stage that had no time in the parent's training gets as much as the shortest
    least = min(count for count in run.train.stage_steps if count)
    shares = tuple(count or least for count in run.train.stage_steps)
    weights = {name: tensor.cpu() for name, tensor in parent.model.state_dict().items()}
    train = replace(
        run.train,
        stage_steps=shares,
        minutes=minutes or 10.0,
        keep="best",
        patience=0,
        evaluate_every=100,
        test_windows=0,
        precision="auto",
        # the user's own choices, not those of whoever trained the parent
        compile=None,
        track=(),
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


def settled(asked: RunConfig) -> RunConfig:
    """`asked` with all that its names decide: absolute paths to its files, and the normalisation of
    a corpus by name instead of auto.
    """
    data = asked.data
    tokenizer = data.tokenizer
    if tokenizer.source and Path(tokenizer.source).exists():
        tokenizer = replace(tokenizer, source=str(Path(tokenizer.source).resolve()))
    source = data.source
    if source in SOURCE_NAMES:
        tokenizer = replace(tokenizer, normalize=tokenizer.normalization)
    elif not source.startswith(HUB):
        source = str(Path(source).expanduser().resolve())
    return replace(asked, data=replace(data, source=source, tokenizer=tokenizer))


# the configuration that is trained


def resolve(
    asked: RunConfig | None,
    out: Path,
    parent: Checkpoint | None,
    device: torch.device,
    processes: Processes,
    progress: Progress,
) -> tuple[RunConfig, Corpus]:
    """The configuration that is trained, with all that the text, the parent and the device decide,
    and the text in tokens. `asked` None takes the run in `out`. Nothing is written. Collective.

    UserError for a text that is missing, too short or of another tokenizer, a parent that is
    missing, and a batch that does not divide.
    """
    if asked is None:
        config = read_run(out)
    else:
        for tracker in asked.train.track:
            check_package(tracker, "track", f"train.track {tracker}")
        if asked.parent and parent is None:
            raise UserError(f"parent {asked.parent}: give that model with `train --from`")
        # the tokenizer is the parent's, or one that suits the text
        text = asked.data if asked.parent else suited(asked.data)
        config = settled(replace(asked, data=text))
    processes.rows_each(config.train)  # for its error

    # the text, by the tokenizer of the parent (a run keeps a copy)
    tokenizer: Tokenizer | None = None
    if parent is not None:
        tokenizer = parent.tokenizer
    elif config.parent or (asked is None and config.data.tokenizer.source):
        tokenizer = load_tokenizer(out / TOKENIZER)
    with processes.first_alone():
        corpus = prepare_corpus(config.data, tokenizer, progress=progress)
    context = config.model.context
    for name in ("train", "valid", "test"):
        have = corpus.num_tokens(name)
        if have < context:
            raise UserError(
                f"the {name} split of {config.data.source} has {have} tokens, "
                f"fewer than the context of {context}: use a longer text or a smaller model.context"
            )

    # the text decides the size of the vocabulary, the device the precision
    vocab_size = corpus.tokenizer.vocab_size
    if config.model.vocab_size not in (0, vocab_size):
        raise UserError(
            f"model.vocab_size {config.model.vocab_size}: the tokenizer has {vocab_size} symbols; "
            "leave it at 0"
        )
    model = replace(config.model, vocab_size=vocab_size)
    config = replace(config, model=model, train=with_precision(config.train, device))
    return processes.from_first(config), corpus


# the run directory


def is_begun(out: Path) -> bool:
    """Whether `out` holds a run that has saved something. UserError for any other content."""
    if (out / ASKED).exists():
        # a hidden folder is a state that a kill left incomplete
        return (out / WEIGHTS).exists() or any((out / STATE).glob("[!.]*"))
    # hidden files are locks, or were left by a kill
    if out.exists() and (not out.is_dir() or any(out.glob("[!.]*"))):
        raise UserError(f"{out} exists already and is no run to continue: choose another directory")
    return False


def check_same(asked: RunConfig, out: Path) -> None:
    """UserError, naming the first field that differs, unless the run in `out` was asked for so."""
    ours = flatten(settled(asked))
    theirs = flatten(from_dict(RunConfig, read_json(out / ASKED)))
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{name} {ours.get(name)}: the run in {out} has {theirs.get(name)}; "
                f"continue that with `{resume_command(out)}`, or choose another --out"
            )


@contextmanager
def only_writer(out: Path, processes: Processes, *, begun: bool) -> Iterator[None]:
    """A context in which the first process is the only writer of `out`, which was `begun` before.

    A full disk and a folder that vanishes are UserErrors, and an interrupt says how to continue.
    """

    def remedy() -> str:
        if is_begun(out):
            return f"continue with `{resume_command(out)}`"
        return "start it again"

    with full_disk_as_user_error(out, remedy), ExitStack() as stack:
        if processes.first:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(writer_lock(out))
            # remove files that a kill left incomplete
            for leftover in [*out.glob(f".*{TEMPORARY}"), *(out / BEST).glob(f".*{TEMPORARY}")]:
                leftover.unlink()
            for partial in (out / STATE).glob(".step-*"):
                shutil.rmtree(partial)
            if is_begun(out) != begun:
                raise UserError(
                    f"{out} has just been begun by another process: repeat the command to "
                    "continue it"
                )
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(remedy()) from None
        except FileNotFoundError:
            if (out / CONFIG).exists():
                raise
            what = f"{out} was moved or removed while the run was writing to it"
            raise UserError(f"{what}: continue with `tarflowlm train --resume PLACE`") from None


def write_start(
    out: Path,
    asked: RunConfig | None,
    config: RunConfig,
    corpus: Corpus,
    parent: Checkpoint | None,
) -> None:
    """Write the files that a run directory has from the beginning."""
    if asked is not None:
        # the first file: it makes the directory a run
        write_json(out / ASKED, to_dict(settled(asked)))
    (out / STATE).mkdir(exist_ok=True)
    shutil.rmtree(out / BEST, ignore_errors=True)  # a run may have been killed before it saved
    if parent is not None:
        write_weights(out / PARENT, parent.model.state_dict(), parent.info)
    write_run(out, config, corpus.tokenizer)


def announce(config: RunConfig, out: Path) -> None:
    """Log the run, its text, its length and its directory."""
    train = config.train
    minutes = f"{round(train.minutes, 2):g} minutes"
    length = minutes if train.minutes else f"{train.num_steps:,} steps"
    tokens = f"{train.batch_size * config.model.context:,} tokens a step"
    logger.info("%s on %s: %s, %s, into %s", config.name, config.data.source, length, tokens, out)
