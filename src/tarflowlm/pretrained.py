"""A trained model with its tokenizer, and what to do with texts: write, fill, edit, score; and
training in a line.
"""

import os
import queue
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tarflowlm.checks import as_integer, check_type, checked_seed
from tarflowlm.config import RunConfig
from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import read, read_template
from tarflowlm.device import pick_device
from tarflowlm.editing import EDITS, Source, common_length, encode
from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import Scores, score
from tarflowlm.files import from_dict, to_dict
from tarflowlm.generation import generate
from tarflowlm.generation.inversion import Decoders
from tarflowlm.generation.writing import Watch
from tarflowlm.language_model import LanguageModel
from tarflowlm.model import as_flow
from tarflowlm.model_config import LanguageModelConfig
from tarflowlm.presets import preset, with_steps
from tarflowlm.runs.checkpoint import Checkpoint, load_checkpoint, read_run
from tarflowlm.runs.hub import PREFIX, REPOSITORY, is_reference
from tarflowlm.sharing import push_to_hub, save_pretrained
from tarflowlm.terminal.bars import ProgressReporter
from tarflowlm.terminal.texts import TextStream
from tarflowlm.training import train as training

_PLACES = "give a run directory, a shipped model's name, or hf:OWNER/NAME"


class _Pair(NamedTuple):
    model: LanguageModel
    tokenizer: Tokenizer


class Pretrained(_Pair):
    """A model in eval mode with its tokenizer, as `load` returns it: `model, tokenizer = load(...)`
    works as well.

    Texts are read as the model's training text was (`data.prompts.read`): a model of the 27 letters
    of TEXT8 gets lower case and spelled digits.
    """

    checkpoint: Checkpoint
    """The loaded run directory, with the configuration of its training."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Pretrained":
        """The model and tokenizer of a checkpoint."""
        pretrained = cls(checkpoint.model, checkpoint.tokenizer)
        pretrained.checkpoint = checkpoint
        return pretrained

    @property
    def config(self) -> LanguageModelConfig:
        """The shape of the model."""
        return self.model.config

    def write(
        self,
        prompt: str | None = None,
        *,
        num_tokens: int | None = None,
        template: str | None = None,
        blank: str = "_",
        num: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        particles: int = 1,
        seed: int = 0,
        decoder: Decoders = "auto",
        watch: Watch | None = None,
    ) -> str | list[str]:
        """A text that begins with `prompt` or fills the blanks of `template`; with `num`, a list of
        so many texts.

        `num_tokens` is the length in tokens, given ones included; by default that of the trained
        context, or of the template. `temperature` is by default the one in the model's
        configuration. The other arguments are those of `generate`. UserError for what the tokenizer
        cannot read, and as `generate`.
        """
        if prompt and template is not None:
            raise UserError(
                "both a prompt and a template: put the prompt at the start of the template"
            )
        given = (
            read(self.tokenizer, prompt, name="prompt", goes_on=True).tokens
            if prompt not in (None, "")
            else None
        )
        if template is not None:
            given = read_template(self.tokenizer, template, blank).tokens
        if num_tokens is None:
            num_tokens = self.config.context if template is None or given is None else len(given)
        generator = torch.Generator().manual_seed(checked_seed(as_integer(seed, "seed")))
        tau = self.checkpoint.run.temperature if temperature is None else temperature
        how: dict[str, Any] = {
            "particles": particles,
            "temperature": tau,
            "top_k": top_k,
            "top_p": top_p,
        }
        how |= {
            "num": 1 if num is None else num,
            "generator": generator,
            "decoder": decoder,
            "watch": watch,
        }
        drawn = generate(self.model, num_tokens=num_tokens, prompt=given, **how)
        texts = [self.decode(row) for row in drawn.tokens]
        return texts[0] if num is None else texts

    def fill(self, template: str, **options: Any) -> str | list[str]:
        """`template` with its blanks filled: `write(template=template)`, with its options."""
        return self.write(template=template, **options)

    def stream(
        self, prompt: str | None = None, *, stop: Sequence[str] = (), **options: Any
    ) -> Iterator[str]:
        """The text of `write`, with its options, piece by piece as its tokens become final; up to
        the first `stop`.

        The pieces are written while they are read, in a thread of their own, which ends with the
        iterator.
        """
        pieces, ended = queue.Queue[str | BaseException | None](), threading.Event()
        given: Any = (
            read(self.tokenizer, prompt, name="prompt", goes_on=True).tokens if prompt else []
        )
        stops = [stop] if isinstance(stop, str) else stop  # after the prompt
        text = TextStream(pieces.put, self.tokenizer, stops, start=len(self.decode(given)))

        def show(tokens: Tensor) -> None:
            text.add(tokens[0])
            if text.has_stopped or ended.is_set():
                raise StopIteration

        def work() -> None:
            try:
                self.write(prompt, watch=Watch(on_tokens=show), **options)
                text.close()
            except StopIteration:
                pass
            except BaseException as error:
                pieces.put(error)
            pieces.put(None)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            ended.set()

    def edit(
        self,
        text: str,
        *,
        rewrite: str | Sequence[str] | None = None,
        replace: tuple[str, str] | None = None,
        toward: str | None = None,
        level: int | None = None,
        num: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> str | list[str]:
        """The text with some words resampled given all others; with `num`, a list of so many edits.

        Instead: `rewrite` these pieces of it, `replace=(old, new)` and regenerate what follows,
        move `toward` another text, or change the state `level` (0 is the latents, the number of
        blocks the noise). The `options` are the fields of these kinds in `tarflowlm.editing.EDITS`:
        strength, words, pick, candidates, temperature, weight. UserError for a baseline, and for
        options that have no effect.
        """
        flow = as_flow(self.model, "a discrete baseline has no latents to edit: load a flow")
        generator = torch.Generator().manual_seed(checked_seed(as_integer(seed, "seed")))
        tokens, given, kind = self.encode(text), dict(options), "words"
        if level is not None:
            given["level"], kind = level, "level"
        if toward is not None:
            other, kind = self.encode(toward, name="other text"), "toward"
            tokens = tokens[: common_length(tokens, other)]
            given["other"] = encode(flow, other[None, : len(tokens)], generator)
        if replace is not None:
            (given["old"], given["new"]), kind = replace, "replace"
        if rewrite is not None:
            given["pieces"], kind = (
                [rewrite] if isinstance(rewrite, str) else list(rewrite),
                "rewrite",
            )
        known = {field.name for field in fields(EDITS[kind])}
        if unknown := sorted(given.keys() - known):
            raise UserError(
                f"{unknown[0]}: has no effect on this edit ({kind}); it takes {', '.join(sorted(known))}"
            )
        source = Source(
            flow,
            self.tokenizer,
            encode(flow, tokens[None], generator).repeated(num or 1),
            generator,
        )
        texts = [self.decode(row) for row in EDITS[kind](**given).apply(source).tokens]
        return texts[0] if num is None else texts

    def tune(
        self,
        data: str | Path,
        out: str | Path,
        *,
        minutes: float | None = None,
        steps: int | None = None,
        lr: float | None = None,
        seed: int = 0,
        device: str = "auto",
    ) -> "Pretrained":
        """Train the model further on a text, for 10 minutes unless `minutes` or `steps` say else;
        returns the result.

        The run is written to `out`; repeated, the call goes on with it. See
        `training.train.tuning`.
        """
        run = training.tuning(
            self.checkpoint, str(data), minutes=minutes, steps=steps, lr=lr, seed=seed
        )
        return _trained(run, out, device, self.checkpoint)

    def score(self, text: str, *, samples: int = 8, seed: int = 0) -> Scores:
        """The bits of every token of a text of any length; see `tarflowlm.score`."""
        tokens = self.encode(text)
        symbols = [self.tokenizer.symbols[token] for token in tokens.tolist()]
        return replace(score(self.model, tokens, samples=samples, seed=seed), symbols=symbols)

    def save_pretrained(
        self, folder: str | Path, *, half: bool = False, licence: str | None = None
    ) -> Path:
        """Write the model with its tokenizer and a model card to a new folder
        (`sharing.save_pretrained`).
        """
        return save_pretrained(self.checkpoint, folder, half=half, licence=licence)

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = False,
        half: bool = False,
        licence: str | None = None,
    ) -> str:
        """Upload the model to OWNER/NAME on the Hugging Face hub (`sharing.push_to_hub`); returns
        its address.
        """
        return push_to_hub(self.checkpoint, repository, private=private, half=half, licence=licence)

    def encode(self, text: str, *, name: str = "text") -> Tensor:
        """Token ids [T] of a text. UserError, calling it `name`, for characters that the tokenizer
        lacks.
        """
        return read(self.tokenizer, text, name=name).tokens

    def decode(self, tokens: Any) -> str:
        """The text of token ids [T], a tensor, array or list. UserError for ids that the tokenizer
        does not have.
        """
        return self.tokenizer.decode(tokens.tolist() if isinstance(tokens, Tensor) else tokens)

    def __repr__(self) -> str:
        """The kind and size of the model, and its methods."""
        model = self.model
        kind = (
            "discrete autoregressive model"
            if model.is_exact
            else f"TarFlowLM of {model.num_blocks} blocks"
        )
        size = f"{sum(p.numel() for p in model.parameters()):,} parameters, context {self.config.context}"
        names = ".write(prompt), .fill(template), .edit(text), .score(text), .stream(prompt), .tune(data, out)"
        return f"<{kind}: {size}, {self.tokenizer.vocab_size:,} symbols; {names}; or model, tokenizer = ...>"


def load(directory: str | Path, device: str | torch.device = "cpu") -> Pretrained:
    """The model, in eval mode, and the tokenizer of a run directory, a shipped model's name, or
    hf:OWNER/NAME.

    `device` is one of PyTorch, or auto. UserError if it is not available, and as in
    `load_checkpoint`.
    """
    check_type(directory, "model", (str, os.PathLike), _PLACES)
    return Pretrained.of(load_checkpoint(directory, pick_device(device)))


def from_pretrained(
    name: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu"
) -> Pretrained:
    """Load as `load` does; OWNER/NAME alone names a model of the hub where there is no such folder.

    `revision` is a branch, tag or commit of a model on the hub. UserError for a revision of
    anything else.
    """
    check_type(name, "model", (str, os.PathLike), _PLACES)
    text = Path(name).as_posix()
    if not Path(name).exists() and re.fullmatch(REPOSITORY, text):
        text = PREFIX + text
    if revision is not None:
        if not is_reference(text):
            raise UserError(
                f"revision {revision!r}: {text} is not on the hub, and has none; leave it out"
            )
        text += f"@{revision}"
    return load(text if is_reference(text) else name, device)


def train(
    run: str | RunConfig,
    out: str | Path,
    *,
    data: str | Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    **values: Any,
) -> Pretrained:
    """Train a preset, or a configuration, in the directory `out`; returns the model as `load` does.

    Repeated, the call goes on with a run that was stopped. `minutes` or `steps` set the length,
    `data` the text (a corpus or a file), `values` any field by its dotted name, as in
    train("mini-ar", "runs/a", **{"model.layers": 8}). UserError for names and values that are
    wrong, before anything is written.
    """
    check_type(run, "run", (str, RunConfig), "give the name of a preset, or a RunConfig")
    config = preset(run) if isinstance(run, str) else run
    given = {"data.source": data and str(data), "train.minutes": minutes, "seed": seed}
    config = _changed(
        config, {name: value for name, value in given.items() if value is not None} | values
    )
    if steps is not None:
        if minutes is not None:
            raise UserError(f"steps {steps} and minutes {minutes}: give one of them")
        config = with_steps(config, as_integer(steps, "steps"))
    return _trained(config, out, device, None)


def resume(out: str | Path, *, device: str = "auto") -> Pretrained:
    """Go on with the run in `out`, or load it if it is finished."""
    check_type(out, "out", (str, os.PathLike), "give a run directory")
    return _trained(read_run(Path(out)), out, device, None)


def _trained(run: RunConfig, out: str | Path, device: str, parent: Checkpoint | None) -> Pretrained:
    check_type(out, "out", (str, os.PathLike), "give the directory to write")
    with (reporter := ProgressReporter()):
        training.train(run, Path(out), device=pick_device(device), reporter=reporter, parent=parent)
    return load(out, device)


def _changed(run: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The run with fields set by their dotted names, such as "model.blocks.0.layers"."""
    changed = to_dict(run)
    for name, value in values.items():
        place, (*parents, last) = changed, name.split(".")
        try:
            for parent in parents:
                place = place[int(parent) if isinstance(place, list) else parent]
            place[int(last) if isinstance(place, list) else last] = to_dict(value)
        except (KeyError, IndexError, TypeError, ValueError):
            raise UserError(
                f"{name}: is no field of a run; `tarflowlm train PRESET --help` lists them"
            ) from None
    return from_dict(RunConfig, changed, "run")
