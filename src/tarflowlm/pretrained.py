"""A trained model with its tokenizer: write, fill, edit and score texts, or train, in one line."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Concatenate, Literal, ParamSpec, Self, TypeVar, overload

import torch
from torch import Tensor

from tarflowlm.config import (
    OPTIMIZERS,
    SCHEDULES,
    TEXT8_ALPHABET,
    DataConfig,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
)
from tarflowlm.data import CharTokenizer, Tokenizer
from tarflowlm.data.prompts import read
from tarflowlm.data.tokenizer import check_own
from tarflowlm.device import pick_device
from tarflowlm.editing.edits import edit
from tarflowlm.errors import UserError, counted, no_attribute, system_errors
from tarflowlm.evaluation.likelihood import Likelihood
from tarflowlm.evaluation.scores import Scores, evaluate_text, read_windows, score_texts
from tarflowlm.generation.texts import Samples, write_texts
from tarflowlm.model import LanguageModel, TarFlowLM, check_model
from tarflowlm.model_config import BaselineConfig, FlowConfig, LanguageModelConfig
from tarflowlm.options import takes
from tarflowlm.presets import check_time, preset, with_fields, with_steps
from tarflowlm.requests import Edit, Evaluation, Score, Writing, as_texts
from tarflowlm.runs.checkpoint import Checkpoint, load_checkpoint
from tarflowlm.runs.hub import PREFIX, REPOSITORY, is_reference
from tarflowlm.runs.weights import check_finite, checksum
from tarflowlm.schema import check_path, check_type

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=Checkpoint)
Model = TypeVar("Model", bound=LanguageModel, covariant=True)
_PLACES = "give a run directory, a shipped model's name, or hf:OWNER/NAME"
Several = list[str] | tuple[str, ...]
OWN = Path(os.devnull, "own")
"""The directory of a model that was not loaded. It is below a file, so nothing can be there."""


@contextmanager
def in_use(model: LanguageModel) -> Iterator[None]:
    """A context with the model in eval mode, in which the system's errors are UserErrors."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with system_errors():
            yield
    finally:
        for module in in_training:
            module.training = True


def using_model(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Let a method of `Pretrained` run within `in_use`."""

    @wraps(method)
    def called(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with in_use(self.model):
            return method(self, *args, **kwargs)

    return called


class Pretrained(Checkpoint, tuple[Model, Tokenizer]):
    """A model with its tokenizer, as `load` returns it: a pair of both.

        model, tokenizer = tarflowlm.load("stories")
        lm = Pretrained(model, tokenizer)  # also a model from a training loop of your own

    Texts are read as the model's training text was (`data.prompts.read`): a model of the 27 letters
    of TEXT8 gets lower case and spelled digits. A model of your own keeps its mode, training or
    not; methods use it in eval mode.
    """

    model: Model

    def __new__(cls, model: Model, tokenizer: Tokenizer, *_rest: object, **_more: object) -> Self:
        return super().__new__(cls, (model, tokenizer))

    def __getnewargs__(self) -> tuple[Model, Tokenizer]:
        return self.model, self.tokenizer  # of which `copy` makes another

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        run: RunConfig | None = None,
        info: dict[str, str] | None = None,
        directory: Path = OWN,
    ) -> None:
        """`run` is the configuration of its training; a model of your own gets one of its shape."""
        check_type(model, "model", LanguageModel, "give a module of tarflowlm")
        check_type(tokenizer, "tokenizer", Tokenizer, "give a tokenizer of tarflowlm.data")
        ours, theirs = model.config.vocab_size, tokenizer.vocab_size
        if ours != theirs:
            raise UserError(f"model of {ours} symbols, tokenizer of {theirs}: give the model's own")
        if run is None:
            check_finite(model.state_dict(), "model")
            check_own(tokenizer)
            run, info = _own_run(model, tokenizer), {"blocks": str(model.num_blocks)}
        check_type(run, "run", RunConfig, "leave it out")
        super().__init__(model, tokenizer, run, info or {}, directory)

    def __getattr__(self, name: str) -> Any:
        """AttributeError with the attribute that was meant."""
        own = {*vars(type(self)), *vars(Checkpoint)} if not name.startswith("_") else set()
        raise no_attribute(type(self).__name__, name, own)

    @property
    def config(self) -> LanguageModelConfig:
        """The shape of the model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @takes(Writing)
    @using_model
    def write(self, request: Writing) -> str | Any:
        """A text that begins with `prompt`; with `num`, a list of that many texts.

        A list of prompts gives a list with the texts of each. `length` counts tokens with the
        prompt, `max_new_tokens` without it; the default is the trained context. A text
        ends with its document, unless `stop_at_end` is False, or before the first of the texts
        `stop`, or after a number of `sentences` or `words`. It has none of the letters and words
        `without`, all of the words `contains` after the prompt, and after the prompt it `matches` a
        regular expression.
        `temperature` and, without it, `top_p` are by default the model's own. They,
        `top_k`, `particles`, `allowed` and `decoder` are described at `generate`. The same `seed`
        gives the same text.
        """
        is_one = request.num is None and isinstance(request.prompt, str | None)
        texts = write_texts(request, self)
        return texts[0] if is_one else texts

    @takes(Writing, made=False)
    @using_model
    def fill(self, /, template: str | Sequence[str], **options: Any) -> str | Any:
        """`template` with each of its blanks, marked by `blank`, filled with one token.

        A list of templates gives a list with the texts of each. [...] stands for 1 to 8 tokens,
        [...12] for 1 to 12: as many as suit the text around them.
        Options as in `write`; the template sets the length. By default the text after a blank
        weights 16 `particles`.
        """
        check_type(template, "template", (str, Sequence), "give a text, or a list of texts")
        texts = write_texts(Writing(template=template, **options), self)
        return texts[0] if isinstance(template, str) and options.get("num") is None else texts

    @takes(Writing)
    @using_model
    def stream(self, request: Writing) -> Iterator[str]:
        """The text of `write`, with its options, piece by piece as its tokens become final."""
        for name in ("prompt", "template"):
            given = getattr(request, name)
            check_type(given, name, (str, type(None)), "give one text, a str")
        if request.num is not None:
            raise UserError(f"num {request.num}: a stream is one text, leave it out")
        return self._step_by_step(Samples(request, self).pieces())

    def _step_by_step(self, pieces: Iterator[str]) -> Iterator[str]:
        # the caller has the model between two pieces
        while True:
            with in_use(self.model):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    @takes(Edit)
    @using_model
    def edit(self, request: Edit) -> str | Any:
        """The text with some words resampled given all others; with `num`, a list of edits.

        `strength` is the share of the words, `words` their number. `rewrite`, `replace` and `level`
        ask for another edit. `tarflowlm edit --help` lists all options. UserError for options that
        have no effect, and for a `level` of a baseline, which has no states.
        """
        texts = edit(request, self).texts
        return texts[0] if request.num is None else texts

    @takes(Score)
    @using_model
    def score(self, request: Score) -> Scores | Any:
        """The bits of every token of a text of any length (`tarflowlm.score`); a list for several.

        `notice` of the result tells how the text was read, if that differs from how it was given.
        """
        found = score_texts(request, self)
        return found[0] if isinstance(request.text, str) else found

    @takes(Evaluation)
    @using_model
    def evaluate(self, request: Evaluation) -> Likelihood:
        """The likelihood of a text in windows, as `tarflowlm eval` measures it.

        `data` is a file or a corpus, a text itself if it has a line end, or a list of texts. By
        default it is the test split of the run's own text. `.bpc` are bits per character.
        """
        return evaluate_text(request, self, read_windows(request, self))

    @overload
    def encode(self, text: str) -> Tensor: ...

    @overload
    def encode(self, text: Several) -> list[Tensor]: ...

    def encode(self, text: str | Several) -> Tensor | list[Tensor]:
        """Token ids [T] of a text; for a list of texts, a list of them."""
        found = [read(self.tokenizer, one).tokens for one in as_texts(text, "text")]
        return found[0] if isinstance(text, str) else found

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of token ids [T]."""
        if isinstance(tokens, str):
            raise UserError(f"tokens {tokens!r:.40}: give token ids; `encode` makes them of a text")
        return self.tokenizer.decode(tokens.tolist() if isinstance(tokens, Tensor) else tokens)

    def tune(
        self,
        data: str | Path,
        out: str | Path,
        *,
        minutes: float | None = None,
        steps: int | None = None,
        lr: float | None = None,
        seed: int = 0,
        unwrap: bool = False,
        device: str = "auto",
    ) -> "Pretrained[LanguageModel]":
        """Train the model further on a text, and return the result.

        This takes 10 minutes unless `minutes` or `steps` say otherwise. `unwrap` makes one line of
        each paragraph of the text. The run is written to `out`; repeated, the call continues it.
        """
        from tarflowlm.training.configure import tuning

        run = tuning(self, str(data), minutes=minutes, steps=steps, lr=lr, seed=seed, unwrap=unwrap)
        return _trained(run, out, device, parent=self)

    @using_model
    def save_pretrained(
        self,
        folder: str | Path,
        *,
        half: bool = False,
        licence: str | None = None,
        repository: str | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the model with its tokenizer, configuration and a card into the new `folder`.

        A README.md next to the weights becomes the card. Weights that have changed since they were
        loaded get neither the card nor the figures of their directory. `half` as in `export`,
        `licence` an identifier of the hub (apache-2.0), `repository` the OWNER/NAME that the card
        is to name. `overwrite` replaces a saved model in the folder, but never a run with the log
        of its training.
        """
        options = {"half": half, "licence": licence, "repository": repository}
        return _sharing().save_pretrained(self, folder, overwrite=overwrite, **options)

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = False,
        half: bool = False,
        licence: str | None = None,
    ) -> str:
        """Upload the files of `save_pretrained` to OWNER/NAME; returns the address of the model."""
        options = {"half": half, "licence": licence}
        return _sharing().push_to_hub(self, repository, private=private, **options)

    def __repr__(self) -> str:
        kind = f"TarFlowLM of {counted(self.model.num_blocks, 'block')}"
        if self.model.is_exact:
            kind = "discrete autoregressive model"
        return (
            f"<{kind}: {self.model.num_parameters:,} parameters, context {self.config.context}, "
            f"{self.config.vocab_size:,} symbols; .write(prompt), .fill(template), .edit(text), "
            ".score(text), .evaluate(data), .stream(prompt), .tune(data, out); or "
            "model, tokenizer = ...>"
        )


@overload
def load(
    directory: Literal["stories", "english-small", "english-mini", "english-passes"],
    device: str | torch.device = ...,
) -> Pretrained[TarFlowLM]: ...


@overload
def load(directory: str | Path, device: str | torch.device = ...) -> Pretrained[LanguageModel]: ...


def load(
    directory: str | Path, device: str | torch.device = "cpu"
) -> Pretrained[TarFlowLM] | Pretrained[LanguageModel]:
    """The model, in eval mode, with its tokenizer.

    `directory` is a run directory, the name of a shipped model, or hf:OWNER/NAME; `device` one of
    PyTorch, or auto.
    """
    check_type(directory, "model", (str, os.PathLike), _PLACES)
    with system_errors():
        return Pretrained(**vars(load_checkpoint(directory, pick_device(device))))


def from_pretrained(
    name: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu"
) -> Pretrained[LanguageModel]:
    """Load as `load` does; OWNER/NAME alone names a model of the hub if there is no such folder.

    `revision` is a branch, tag or commit of a model on the hub.
    """
    check_type(name, "model", (str, os.PathLike), _PLACES)
    text = Path(name).as_posix()
    # os.path: False, not OSError, for impossible names
    if not os.path.exists(name) and re.fullmatch(REPOSITORY, text):
        name = PREFIX + text
    if revision is not None:
        if not is_reference(name):
            raise UserError(f"revision {revision!r}: {text} is not on the hub; leave it out")
        name = f"{Path(name).as_posix()}@{revision}"
    return load(name, device)


def train(
    run: str | RunConfig,
    out: str | Path,
    *,
    data: str | Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    model: LanguageModel | Checkpoint | None = None,
    optimizer: str | Callable[..., Any] | None = None,
    schedule: str | Callable[..., Any] | None = None,
    **values: Any,
) -> Pretrained[LanguageModel]:
    """Train a preset or a configuration in the directory `out`, and load the model.

    Repeated, the call continues a run that was stopped. `minutes` or `steps` set the length, `data`
    the text (a corpus or a file), `values` any field by its dotted name, as in train("mini-ar",
    "runs/a", **{"model.layers": 8}).

    A `model` of your own gives the shape and the first weights, in place of the preset's; its
    frozen parameters stay as they are, and it does not change itself. `optimizer` and `schedule`
    are names, or what `tarflowlm.optimizer` and `tarflowlm.schedule` have given one.
    """
    check_type(run, "run", (str, RunConfig), "give the name of a preset, or a RunConfig")
    config = preset(run) if isinstance(run, str) else run
    check_time(minutes, steps)
    given = {"data.source": data and str(data), "train.minutes": minutes, "seed": seed}
    if optimizer is not None:
        given["optim.optimizer"] = OPTIMIZERS.name_of(optimizer)
    if schedule is not None:
        given["optim.schedule"] = SCHEDULES.name_of(schedule)
    given = {name: value for name, value in given.items() if value is not None}
    first = model.model if isinstance(model, Checkpoint) else model
    if first is not None:
        config = _beginning_with(first, config, values)
    config = with_fields(config, given | values)
    if steps is not None:
        config = with_steps(config, steps)
    return _trained(config, out, device, model=first)


def _beginning_with(model: LanguageModel, run: RunConfig, values: dict[str, object]) -> RunConfig:
    """The run of a model of the caller's own."""
    check_model(model)
    for name in values:
        if name.startswith("model."):
            raise UserError(f"{name} with a model: it brings its own shape, leave that out")
    check_finite(model.state_dict(), "model")
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    assert isinstance(model.config, FlowConfig | BaselineConfig)
    stages = model.num_blocks if run.train.mode == "progressive" else 1
    steps = run.train.stage_steps
    if len(steps) != stages:
        # block 1 has the steps of the first stage
        steps = (*steps, *(steps[-1],) * stages)[:stages]
    return replace(
        run,
        model=model.config,
        parent=f"model@{checksum(weights)}",
        train=replace(run.train, stage_steps=steps),
    )


def resume(
    out: str | Path,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    device: str = "auto",
) -> Pretrained[LanguageModel]:
    """Continue the run in `out`, or load it if it is finished.

    With `steps` or `minutes`, so many in all, it is made longer first, from before its learning
    rate fell.
    """
    from tarflowlm.training.extend import extend

    check_path(out, "out", "give the directory of a run")
    with system_errors():
        extend(Path(out), steps=steps, minutes=minutes)
    return _trained(None, out, device)


def _trained(
    run: RunConfig | None,
    out: str | Path,
    device: str,
    *,
    parent: Checkpoint | None = None,
    model: LanguageModel | None = None,
) -> Pretrained[LanguageModel]:
    from tarflowlm.terminal.bars import Bars
    from tarflowlm.training import train as training

    check_path(out, "out", "give the directory to write")
    with system_errors(), Bars(keep=True) as reporter:
        training.train(
            run,
            Path(out),
            device=pick_device(device),
            reporter=reporter,
            parent=parent,
            model=model,
        )
    return load(out, device)


def _sharing() -> ModuleType:
    # the core starts an application by name
    return import_module("tarflowlm_apps.hub.share")


def _own_run(model: LanguageModel, tokenizer: Tokenizer) -> RunConfig:
    """The configuration with which a model of the caller's own is saved and tuned."""
    assert isinstance(model.config, FlowConfig | BaselineConfig)
    how = TokenizerConfig(
        kind=tokenizer.kind,
        alphabet=tokenizer.alphabet if isinstance(tokenizer, CharTokenizer) else TEXT8_ALPHABET,
        source="" if tokenizer.kind in ("char", "byte") else "own",
        normalize=tokenizer.normalization,
    )
    train = TrainConfig(stage_steps=(1000,) * model.num_blocks)
    if isinstance(model.config, FlowConfig) and model.config.starts == "last":
        train = TrainConfig(mode="joint")
    data = DataConfig(source="own", tokenizer=how)
    return RunConfig(name="own", model=model.config, data=data, train=train)
