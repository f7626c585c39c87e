"""The configuration of a run: asked for in asked.json, completed in config.json.

Both are kept: `auto` means another precision on another device, and a run must still recognise the
same request.
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from tarflowlm.config import Precision, RunConfig, TrainConfig
from tarflowlm.data import (
    SOURCE_NAMES,
    Corpus,
    Tokenizer,
    infer_tokenizer,
    load_tokenizer,
    misfit,
    prepare_corpus,
)
from tarflowlm.data.sources import HUB
from tarflowlm.errors import Progress, UserError, check_package
from tarflowlm.model import LanguageModel
from tarflowlm.presets import check_time, with_blocks, with_steps
from tarflowlm.processes import Processes
from tarflowlm.runs import TOKENIZER
from tarflowlm.runs.checkpoint import Checkpoint, read_run
from tarflowlm.runs.weights import checksum
from tarflowlm.schema import checked

logger = logging.getLogger("tarflowlm")


def complete(
    asked: RunConfig | None,
    out: Path,
    parent: Checkpoint | None,
    model: LanguageModel | None,
    device: torch.device,
    processes: Processes,
    progress: Progress,
) -> tuple[RunConfig, Corpus]:
    """The configuration that is trained, with nothing left open, and its text in tokens.

    The text decides the tokenizer, unless a `parent` brings it, and the size of the vocabulary;
    names decide what `settled` says; the device decides the precision. `asked` None takes the run
    in `out`, where all this was decided before.

    Nothing is written. UserError for a text that is missing, too short or of another tokenizer, a
    parent that is missing, and a batch that does not divide. Collective.
    """
    if asked is None:
        config = read_run(out)
    else:
        for tracker in asked.train.track:
            check_package(tracker, "track", f"train.track {tracker}")
        if asked.parent and parent is None and model is None:
            raise UserError(f"parent {asked.parent}: give that model with `train --from`")
        text = asked.data if parent is not None else infer_tokenizer(asked.data)
        config = settled(replace(asked, data=text))
    processes.rows_each(config.train)  # for its error
    tokenizer: Tokenizer | None = None
    if parent is not None:
        tokenizer = parent.tokenizer
    elif asked is None and (config.parent or config.data.tokenizer.source):
        tokenizer = load_tokenizer(out / TOKENIZER)  # a run keeps a copy
    with processes.first_alone():
        corpus = prepare_corpus(config.data, tokenizer, progress=progress)
    if not corpus.tokenizer.is_lossless:
        what = f"the tokenizer {corpus.tokenizer.kind} loses some of a text"
        logger.info("%s: there are no bits per character", what)
    context = config.model.context
    for name in ("train", "valid", "test"):
        have = corpus.num_tokens(name)
        if have < context:
            raise UserError(
                f"the {name} split of {config.data.source} has {have} tokens, "
                f"fewer than the context of {context}: use a longer text or a smaller model.context"
            )
    vocab_size = corpus.tokenizer.vocab_size
    if config.model.vocab_size not in (0, vocab_size):
        raise UserError(
            f"model.vocab_size {config.model.vocab_size}: the tokenizer has {vocab_size} symbols; "
            "leave it at 0, or give a model of as many"
        )
    shape = replace(config.model, vocab_size=vocab_size)
    config = replace(config, model=shape, train=with_precision(config.train, device))
    return processes.from_first(config), corpus


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


def with_precision(train: TrainConfig, device: torch.device) -> TrainConfig:
    """`train` with the precision that is native to `device` instead of auto."""
    if train.precision != "auto":
        return train
    return replace(train, precision=native_precision(device))


def native_precision(device: torch.device) -> Precision:
    """bfloat16 if the device multiplies matrices in it natively; others emulate that slowly."""
    if device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_it = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        is_native = device.type == "cpu" and has_it and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if is_native else "float32"


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
    problem = misfit(text, parent.tokenizer, for_training=True)
    if problem is not None:
        remedy = f"`tarflowlm train english-small --data {data} --out DIR`"
        raise UserError(f"{problem}: train a new model on it: {remedy}")
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
