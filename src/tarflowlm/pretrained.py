"""A trained model with its tokenizer, and what to do with texts: write, score, encode, decode."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tarflowlm.config import checked_seed
from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import read, read_template
from tarflowlm.device import pick_device
from tarflowlm.errors import UserError
from tarflowlm.evaluation.likelihood import Scores, score
from tarflowlm.generation import generate
from tarflowlm.generation.inversion import Decoders
from tarflowlm.language_model import LanguageModel, LanguageModelConfig, as_integer, check_type
from tarflowlm.runs.checkpoint import Checkpoint, load_checkpoint
from tarflowlm.runs.hub import PREFIX, REPOSITORY, is_reference
from tarflowlm.sharing import push_to_hub, save_pretrained

_PLACES = "give a run directory, a shipped model's name, or hf:OWNER/NAME"


class _Pair(NamedTuple):
    model: LanguageModel
    tokenizer: Tokenizer


class Pretrained(_Pair):
    """A model in eval mode with its tokenizer, as `load` returns it: `model, tokenizer = load(...)` works as well.

    Texts are read as the model's training text was (`data.prompts.read`): a model of the 27 letters of TEXT8 gets
    lower case and spelled digits.
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
        self, prompt: str | None = None, *, num_tokens: int | None = None, template: str | None = None,
        blank: str = "_", num: int | None = None, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, particles: int = 1, seed: int = 0, decoder: Decoders = "auto",
    ) -> str | list[str]:  # fmt: skip
        """A text that begins with `prompt` or fills the blanks of `template`; with `num`, a list of so many texts.

        `num_tokens` is the length in tokens, given ones included; by default that of the trained context, or of the
        template. The other arguments are those of `generate`. UserError for what the tokenizer cannot read, and as
        `generate`.
        """
        if prompt and template is not None:
            raise UserError("both a prompt and a template: put the prompt at the start of the template")
        given = read(self.tokenizer, prompt, name="prompt", goes_on=True).tokens if prompt not in (None, "") else None
        if template is not None:
            given = read_template(self.tokenizer, template, blank).tokens
        if num_tokens is None:
            num_tokens = self.config.context if template is None or given is None else len(given)
        generator = torch.Generator().manual_seed(checked_seed(as_integer(seed, "seed")))
        how: dict[str, Any] = {"particles": particles, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        how |= {"num": 1 if num is None else num, "generator": generator, "decoder": decoder}
        drawn = generate(self.model, num_tokens=num_tokens, prompt=given, **how)
        texts = [self.decode(row) for row in drawn.tokens]
        return texts[0] if num is None else texts

    def score(self, text: str, *, samples: int = 8, seed: int = 0) -> Scores:
        """The bits of every token of a text of any length; see `tarflowlm.score`."""
        return score(self.model, self.encode(text), samples=samples, seed=seed)

    def save_pretrained(self, folder: str | Path, *, half: bool = False, licence: str | None = None) -> Path:
        """Write the model with its tokenizer and a model card to a new folder (`sharing.save_pretrained`)."""
        return save_pretrained(self.checkpoint, folder, half=half, licence=licence)

    def push_to_hub(
        self, repository: str, *, private: bool = False, half: bool = False, licence: str | None = None
    ) -> str:
        """Upload the model to OWNER/NAME on the Hugging Face hub (`sharing.push_to_hub`); returns its address."""
        return push_to_hub(self.checkpoint, repository, private=private, half=half, licence=licence)

    def encode(self, text: str, *, name: str = "text") -> Tensor:
        """Token ids [T] of a text. UserError, calling it `name`, for characters that the tokenizer lacks."""
        return read(self.tokenizer, text, name=name).tokens

    def decode(self, tokens: Any) -> str:
        """The text of token ids [T], a tensor, array or list. UserError for ids that the tokenizer does not have."""
        return self.tokenizer.decode(tokens.tolist() if isinstance(tokens, Tensor) else tokens)

    def __repr__(self) -> str:
        """The kind and size of the model, and its methods."""
        model = self.model
        kind = "discrete autoregressive model" if model.is_exact else f"TarFlowLM of {model.num_blocks} blocks"
        size = f"{sum(p.numel() for p in model.parameters()):,} parameters, context {self.config.context}"
        names = ".write(prompt), .score(text), .encode, .decode, .config, .save_pretrained(folder)"
        return f"<{kind}: {size}, {self.tokenizer.vocab_size:,} symbols; {names}; or model, tokenizer = ...>"


def load(directory: str | Path, device: str | torch.device = "cpu") -> Pretrained:
    """The model, in eval mode, and the tokenizer of a run directory, a shipped model's name, or hf:OWNER/NAME.

    `device` is one of PyTorch, or auto. UserError if it is not available, and as in `load_checkpoint`.
    """
    check_type(directory, "model", (str, os.PathLike), _PLACES)
    return Pretrained.of(load_checkpoint(directory, pick_device(device)))


def from_pretrained(
    name: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu"
) -> Pretrained:
    """Load as `load` does; OWNER/NAME alone names a model of the hub where there is no such folder.

    `revision` is a branch, tag or commit of a model on the hub. UserError for a revision of anything else.
    """
    check_type(name, "model", (str, os.PathLike), _PLACES)
    text = Path(name).as_posix()
    if not Path(name).exists() and re.fullmatch(REPOSITORY, text):
        text = PREFIX + text
    if revision is not None:
        if not is_reference(text):
            raise UserError(f"revision {revision!r}: {text} is not on the hub, and has none; leave it out")
        text += f"@{revision}"
    return load(text if is_reference(text) else name, device)
