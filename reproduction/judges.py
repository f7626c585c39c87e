"""Language models that judge samples: a baseline trained here, or one of `transformers`."""

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tarflowlm.baseline import TokenLM
from tarflowlm.chunks import EVALUATED_TOKENS, rows_at_once
from tarflowlm.config import MODEL_TYPE
from tarflowlm.errors import SILENT, Progress, UserError, first_line
from tarflowlm.flow import widen
from tarflowlm.runs.checkpoint import Checkpoint, load_checkpoint
from tarflowlm.runs.hub import is_reference, released

# transformers is optional, so its classes cannot be named in annotations that tests check
HubModel = Any

LONGEST = 1024
"""Tokens that a judge of `transformers` reads at once: GPT-2's context, where MAUVE cuts texts."""
PAPER_JUDGES = ("gpt2-large", "openai-community/gpt2-large")


@dataclass(frozen=True)
class JudgedTexts:
    """Scores and features of some texts."""

    by_text: Tensor
    """Negative log-likelihood of the scored tokens of each text, [texts], float64."""
    tokens: int
    """Scored tokens of the judge."""
    features: Tensor
    """[texts, D], float32: the last state of the last layer of each text (of its first chunk)."""

    @property
    def nats(self) -> float:
        """Negative log-likelihood of all scored tokens."""
        return self.by_text.sum().item()

    @property
    def perplexity(self) -> float:
        """exp of the nats per scored token, over all texts together. NaN without scored tokens."""
        return math.exp(self.nats / self.tokens) if self.tokens else math.nan

    @property
    def perplexity_error(self) -> float:
        """Standard error of the perplexity over texts of equal length. NaN for a single text."""
        texts = len(self.by_text)
        of_mean = self.by_text.std().item() / texts**0.5  # nats per text
        return self.perplexity * of_mean * texts / self.tokens


@dataclass(frozen=True)
class _Chunk:
    """Tokens of a text that are read at once; the first `unscored` of them are only context."""

    text: int
    tokens: list[int]
    unscored: int


class Judge(ABC):
    """A causal language model of texts.

    Texts longer than `context` are read in chunks with a fresh context each.
    """

    name: str
    kind: str
    """Kind of model and of tokens, to be printed."""
    context: int
    source: str | None = None
    """Its training text, if known."""

    @abstractmethod
    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a text. UserError for characters outside the judge's alphabet."""

    @abstractmethod
    def score(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood in nats of every token [B, T], and the last states [B, T, D].

        The likelihood is NaN where a token is not scored. Both depend only on the token and the
        tokens before it, so padding on the right does no harm.
        """

    def read(
        self,
        texts: Sequence[str],
        progress: Progress = SILENT,
        *,
        before: Sequence[str] | None = None,
    ) -> JudgedTexts:
        """Score all texts and take the features of each. `progress` advances by texts.

        `before` has a context for each text, which the judge reads without scoring it. UserError
        for texts without tokens or with unknown characters.
        """
        chunks: list[_Chunk] = []
        first: list[int] = []  # index of the first chunk of every text
        for index, text in enumerate(texts):
            first.append(len(chunks))
            chunks += self._cut(index, text, before[index] if before else "")
        nats = torch.zeros(len(texts), dtype=torch.float64)
        count = 0
        features = []
        batch = rows_at_once(self.context, EVALUATED_TOKENS)
        for start in range(0, len(chunks), batch):
            some = chunks[start : start + batch]
            lengths = torch.tensor([len(chunk.tokens) for chunk in some])
            unscored = torch.tensor([chunk.unscored for chunk in some])
            padded = pad_sequence([torch.tensor(chunk.tokens) for chunk in some], batch_first=True)
            losses, states = self.score(padded)
            losses = losses.cpu().double()
            place = torch.arange(padded.shape[1])
            is_inside = (place < lengths[:, None]) & (place >= unscored[:, None])
            is_scored = is_inside & ~losses.isnan()
            owners = torch.tensor([chunk.text for chunk in some])
            nats.index_add_(0, owners, losses.where(is_scored, 0.0).sum(1))
            count += int(is_scored.sum())
            features.append(states.cpu()[torch.arange(len(some)), lengths - 1].float())
            progress.advance(sum(start <= index < start + batch for index in first))
        return JudgedTexts(nats, count, torch.cat(features)[first])

    def _cut(self, index: int, text: str, context: str) -> list[_Chunk]:
        """The chunks of a text and the context before it."""
        before = list(self.encode(context)) if context else []
        ids = list(self.encode(text))
        if not ids:
            raise UserError(
                f"the judge {self.name} has no tokens for the text {text!r}: choose another judge"
            )
        whole = before + ids
        return [
            _Chunk(index, whole[start : start + self.context], max(len(before) - start, 0))
            for start in range(0, len(whole), self.context)
        ]


class BaselineJudge(Judge):
    """A discrete baseline trained here. It scores every token, the first from its learned start."""

    def __init__(self, name: str, checkpoint: Checkpoint) -> None:
        model = checkpoint.model
        if not isinstance(model, TokenLM) or model.config.patch > 1:
            flaw = "is a flow, whose likelihood is a bound"
            if model.is_exact:
                flaw = "predicts several tokens at once"
            remedy = "give a run of the baseline with one token at a time (mini-ar)"
            raise UserError(f"the judge {name} {flaw}: {remedy}")
        self.name = name
        self.model = model
        self.tokenizer = checkpoint.tokenizer
        self.kind = f"baseline trained here, {self.tokenizer.kind} tokens"
        self.context = model.config.context
        self.source = checkpoint.run.data.source

    def encode(self, text: str) -> Sequence[int]:
        try:
            return self.tokenizer.encode(text).tolist()
        except UserError as error:
            raise UserError(f"the judge {self.name} cannot read the samples: {error}") from None

    @torch.no_grad()
    def score(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens.to(self.model.start.device)
        states = self.model.features_of_all(tokens)
        logits = widen(self.model.head(states[:, :-1]))
        losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        return losses.view(tokens.shape), states[:, 1:]


class HubJudge(Judge):
    """A causal language model of `transformers`, by hub name or directory.

    A first token without context is not scored, as in the literature. A start token of its
    tokenizer is context.
    """

    def __init__(self, name: str, model: HubModel, tokenizer: HubModel) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.kind = f"{type(model).__name__} of transformers, {model.config.vocab_size:,} tokens"
        positions = getattr(model.config, "max_position_embeddings", None)
        self.context = min(LONGEST, positions or LONGEST)

    def encode(self, text: str) -> Sequence[int]:
        # not verbose: it would warn of texts longer than the context, which are read in chunks
        return self.tokenizer(text, verbose=False)["input_ids"]

    @torch.no_grad()
    def score(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens.to(self.model.device)
        out = self.model(input_ids=tokens, output_hidden_states=True)
        logits = out.logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return F.pad(losses.view(len(tokens), -1), (1, 0), value=math.nan), out.hidden_states[-1]


def load_judge(name: str, device: str | torch.device = "cpu") -> Judge:
    """The judge `name`, a baseline or a model of `transformers`.

    A baseline is named by its run directory, as a shipped model, or as hf:OWNER/NAME; a model of
    `transformers` by its directory or hub name. UserError for one that cannot be found, is not
    autoregressive, or needs a package that is missing.
    """
    path = Path(name).expanduser()
    is_directory = name != "" and os.path.isdir(path)
    if is_directory:
        is_ours = not _is_transformers(path)
    else:
        is_ours = is_reference(name) or name in released()
    if is_ours:
        return BaselineJudge(name, load_checkpoint(path, device))
    is_path = not name or name.startswith((".", "/", "~")) or len(path.parts) > 2
    if is_path and not is_directory:
        raise UserError(
            f"the judge {name!r} is no directory: give a run of the baseline, or a hub name"
        )
    model, tokenizer = _from_transformers(str(path) if is_directory else name, is_directory)
    return HubJudge(name, model.float().to(device).eval(), tokenizer)


def _is_transformers(path: Path) -> bool:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # `load_checkpoint` reports the error
    return isinstance(config, dict) and config.get("model_type", MODEL_TYPE) != MODEL_TYPE


def _from_transformers(name: str, is_directory: bool) -> tuple[HubModel, HubModel]:
    """Model and tokenizer, from the local cache if possible, else from the hub."""
    try:
        import huggingface_hub
        import transformers
    except ImportError:
        raise UserError("judging samples needs transformers: pip install -e '.[quality]'") from None

    def get(only_local: bool) -> tuple[HubModel, HubModel]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=only_local)
        # safetensors only: nothing is unpickled
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, use_safetensors=True, local_files_only=only_local
        )
        return model, tokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        try:
            return get(True)
        except (OSError, ValueError):
            if is_directory:
                raise
        # offline this fails at once, but `transformers` tries again for half a minute
        huggingface_hub.snapshot_download(name, allow_patterns="config.json")
        return get(False)
    except Exception as error:  # hub, network and library errors share no base class
        advice = (
            "give a run of the baseline, a directory of transformers, or the name of a hub model"
        )
        raise UserError(f"cannot load the judge {name!r} ({first_line(error)}): {advice}") from None
