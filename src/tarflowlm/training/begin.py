"""Before the first step: the run directory, the text, and the final configuration."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from tarflowlm.config import RunConfig
from tarflowlm.data import SOURCE_NAMES, Corpus, Tokenizer, load_tokenizer, prepare_corpus, suited
from tarflowlm.data.sources import HUB
from tarflowlm.errors import Progress, UserError, check_package
from tarflowlm.files import (
    full_disk_as_user_error,
    read_json,
    remove_leftovers,
    write_json,
    writer_lock,
)
from tarflowlm.processes import Processes
from tarflowlm.runs.checkpoint import (
    BEST,
    PARENT,
    STATE,
    TOKENIZER,
    WEIGHTS,
    Checkpoint,
    read_run,
    resume_command,
    write_run,
)
from tarflowlm.runs.weights import write_weights
from tarflowlm.schema import flatten, from_dict, to_dict
from tarflowlm.training.optim import with_precision

ASKED = "asked.json"
"""The configuration that a run was asked for; config.json has what was decided since."""


def is_begun(out: Path) -> bool:
    """Whether `out` holds a run that has saved something. UserError for any other content."""
    if (out / ASKED).exists():
        # a hidden folder is a state that a kill left incomplete
        return (out / WEIGHTS).exists() or any((out / STATE).glob("[!.]*"))
    # hidden files are locks, or were left by a kill
    if out.exists() and (not out.is_dir() or any(out.glob("[!.]*"))):
        raise UserError(f"{out} exists already and is not a run to continue: choose another --out")
    return False


def check_same(asked: RunConfig, out: Path) -> None:
    """UserError, naming the first field that differs, unless the run in `out` was asked for so."""
    ours = flatten(located(asked))
    theirs = flatten(from_dict(RunConfig, read_json(out / ASKED)))
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{name} {ours.get(name)}: the run in {out} has {theirs.get(name)}; "
                f"continue that with `{resume_command(out)}`, or choose another --out"
            )


def configured(
    asked: RunConfig | None, out: Path, parent: Checkpoint | None, *, begun: bool
) -> RunConfig:
    """The configuration with which `train` continues the run in `out`, or begins a new one."""
    if begun or asked is None:
        return read_run(out)
    for name in asked.train.track:
        check_package(name, "track", f"train.track {name}")
    if not asked.parent:
        asked = replace(asked, data=suited(asked.data))
    elif parent is None:
        raise UserError(f"parent {asked.parent}: give that model with `train --from`")
    return located(asked)


def settled(config: RunConfig) -> RunConfig:
    """`config` with the normalisation of a corpus by name instead of auto."""
    data = config.data
    if data.source not in SOURCE_NAMES:
        return config
    tokenizer = replace(data.tokenizer, normalize=data.tokenizer.normalization)
    return replace(config, data=replace(data, tokenizer=tokenizer))


def located(config: RunConfig) -> RunConfig:
    """`config`, settled, with absolute paths to its files."""
    config = settled(config)
    data = config.data
    path = data.tokenizer.source
    if path and Path(path).exists():
        data = replace(data, tokenizer=replace(data.tokenizer, source=str(Path(path).resolve())))
    if data.source not in SOURCE_NAMES and not data.source.startswith(HUB):
        data = replace(data, source=str(Path(data.source).expanduser().resolve()))
    return replace(config, data=data)


def corpus_of(
    config: RunConfig,
    out: Path,
    parent: Checkpoint | None,
    progress: Progress,
    processes: Processes,
) -> Corpus:
    """The text in tokens. UserError if it is too short, or its tokenizer does not suit `config`."""
    tokenizer: Tokenizer | None = None
    if parent is not None:
        tokenizer = parent.tokenizer
    elif config.parent:
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
    return corpus


def decided(config: RunConfig, corpus: Corpus, device: torch.device) -> RunConfig:
    """`config` with what the text and the device decide: the vocabulary's size, the precision."""
    vocab_size = corpus.tokenizer.vocab_size
    if config.model.vocab_size not in (0, vocab_size):
        raise UserError(
            f"model.vocab_size {config.model.vocab_size}: the tokenizer has {vocab_size} symbols; "
            "leave it at 0"
        )
    model = replace(config.model, vocab_size=vocab_size)
    return replace(config, model=model, train=with_precision(config.train, device))


@contextmanager
def writing(out: Path, processes: Processes) -> Iterator[None]:
    """A context in which the first process is the only writer of `out`.

    A full disk is a UserError, and an interrupt says how to continue.
    """

    def remedy() -> str:
        if (out / ASKED).exists():
            return f"continue with `{resume_command(out)}`"
        return "start it again"

    with full_disk_as_user_error(out, remedy), ExitStack() as stack:
        if processes.first:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(writer_lock(out))
            # what a kill left incomplete
            for folder in (out, out / BEST):
                remove_leftovers(folder)
            for partial in (out / STATE).glob(".step-*"):
                shutil.rmtree(partial)
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(remedy()) from None


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
        write_json(out / ASKED, to_dict(located(asked)))
    (out / STATE).mkdir(exist_ok=True)
    shutil.rmtree(out / BEST, ignore_errors=True)  # a run may have been killed before it saved
    if parent is not None:
        write_weights(out / PARENT, parent.model.state_dict(), parent.info)
    write_run(out, config, corpus.tokenizer)
