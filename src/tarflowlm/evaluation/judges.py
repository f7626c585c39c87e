"""Language models that judge samples: any causal one of `transformers`, or a discrete baseline
trained here.
"""

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

from tarflowlm.baseline import TokenLM
from tarflowlm.config import MODEL_TYPE
from tarflowlm.data.sources import check_hub_reachable
from tarflowlm.errors import UserError, first_line
from tarflowlm.evaluation.likelihood import windows_per_batch
from tarflowlm.flow import widen
from tarflowlm.progress import SILENT, Progress
from tarflowlm.runs.checkpoint import Checkpoint, load_checkpoint
from tarflowlm.runs.hub import is_reference, released

# tokens that a judge of `transformers` reads at once: the context of GPT-2, where MAUVE cuts texts
LONGEST = 1024
PAPER_JUDGES = ("gpt2-large", "openai-community/gpt2-large")


@dataclass(frozen=True)
class JudgedTexts:
    """Scores and features of some texts."""

    by_text: Tensor  # negative log-likelihood of the scored tokens of each text, [texts], float64
    tokens: int  # scored tokens of the judge
    # [texts, D], float32: the last state of the last layer of each text (of its first chunk)
    features: Tensor

    @property
    def nats(self) -> float:
        """Negative log-likelihood of all scored tokens."""
        return self.by_text.sum().item()

    @property
    def perplexity(self) -> float:
        """exp of the nats per scored token, over all texts together. NaN without scored tokens."""
        return math.exp(self.nats / self.tokens) if self.tokens else math.nan


class Judge(ABC):
    """A causal language model of texts. Texts longer than `context` are read in chunks with a fresh
    context each.
    """

    name: str
    kind: str  # kind of model and of tokens, to be printed
    context: int
    source: str | None = None  # its training text, if known

    @abstractmethod
    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a text. Raises UserError for characters outside the judge's alphabet."""

    @abstractmethod
    def score(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood in nats of every token [B, T], NaN where it is not scored; last
        states [B, T, D]. Both depend only on the token and those before it, so padding on the right
        does no harm.
        """

    def read(
        self,
        texts: Sequence[str],
        progress: Progress = SILENT,
        *,
        after: Sequence[str] | None = None,
    ) -> JudgedTexts:
        """Score all texts and take the features of each. `progress` advances by texts. The judge
        reads what a text comes `after` first, without scoring it. Raises UserError for texts
        without tokens or with unknown characters.
        """
        # index of the text, tokens of a chunk, and how many of them are not scored
        chunks, first = list[tuple[int, list[int], int]](), list[int]()
        for index, text in enumerate(texts):
            before, ids = (
                list(self.encode(after[index])) if after and after[index] else [],
                list(self.encode(text)),
            )
            if not ids:
                raise UserError(
                    f"the judge {self.name} has no tokens for the text {text!r}: choose another judge"
                )
            first.append(len(chunks))
            ids, places = before + ids, range(0, len(before + ids), self.context)
            chunks += [(index, ids[i : i + self.context], max(len(before) - i, 0)) for i in places]
        nats, count, features = torch.zeros(len(texts), dtype=torch.float64), 0, []
        batch = windows_per_batch(self.context)
        for start in range(0, len(chunks), batch):
            owners, tokens, unscored = zip(*chunks[start : start + batch], strict=True)
            lengths = torch.tensor([len(ids) for ids in tokens])
            padded = torch.nn.utils.rnn.pad_sequence(
                list(map(torch.tensor, tokens)), batch_first=True
            )
            losses, states = self.score(padded)
            losses, place = losses.cpu().double(), torch.arange(padded.shape[1])
            is_scored = (
                (place < lengths[:, None])
                & (place >= torch.tensor(unscored)[:, None])
                & ~losses.isnan()
            )
            nats.index_add_(0, torch.tensor(owners), losses.where(is_scored, 0.0).sum(1))
            count += int(is_scored.sum())
            features.append(states.cpu()[torch.arange(len(tokens)), lengths - 1].float())
            progress.advance(sum(start <= index < start + batch for index in first))
        return JudgedTexts(nats, count, torch.cat(features)[first])


class BaselineJudge(Judge):
    """A discrete baseline trained here. It scores every token, the first one from its learned
    start.
    """

    def __init__(self, name: str, checkpoint: Checkpoint) -> None:
        model = checkpoint.model
        if not isinstance(model, TokenLM) or model.config.patch > 1:
            flaw = (
                "predicts several tokens at once"
                if model.is_exact
                else "is a flow, whose likelihood is a bound"
            )
            raise UserError(
                f"the judge {name} {flaw}: give a run of the baseline with one token at a time (mini-ar)"
            )
        self.name, self.model, self.tokenizer = name, model, checkpoint.tokenizer
        self.kind = f"baseline trained here, {self.tokenizer.kind} tokens"
        self.context, self.source = model.config.context, checkpoint.run.data.source

    def encode(self, text: str) -> Sequence[int]:
        try:
            return self.tokenizer.encode(text).tolist()
        except UserError as error:
            raise UserError(f"the judge {self.name} cannot read the samples: {error}") from None

    @torch.no_grad()
    def score(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens.to(self.model.start.device)
        states = self.model.states(tokens)
        logits = widen(self.model.head(states[:, :-1]))
        losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(
            tokens.shape
        )
        return losses, states[:, 1:]


class HubJudge(Judge):
    """A causal language model of `transformers`, by hub name or directory. A first token without
    context is not scored, as in the literature. A start token of its tokenizer is context.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.kind = f"{type(model).__name__} of transformers, {model.config.vocab_size:,} tokens"
        self.context = min(
            LONGEST, getattr(model.config, "max_position_embeddings", None) or LONGEST
        )

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
    """The judge `name`: a baseline (run directory, shipped model or hf:OWNER/NAME), or a model of
    `transformers` (directory or hub name). Raises UserError for one that cannot be found, is not
    autoregressive, or needs a package that is missing.
    """
    path = Path(name).expanduser()
    is_dir = name != "" and os.path.isdir(path)
    if not _is_transformers(path) if is_dir else is_reference(name) or name in released():
        return BaselineJudge(name, load_checkpoint(path, device))
    if not is_dir and (name.startswith((".", "/", "~")) or not name or len(path.parts) > 2):
        raise UserError(
            f"the judge {name!r} is no directory: give a run of the baseline, or a hub name"
        )
    model, tokenizer = _from_transformers(str(path) if is_dir else name, is_dir)
    return HubJudge(name, model.float().to(device).eval(), tokenizer)


def _is_transformers(path: Path) -> bool:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # `load_checkpoint` reports the error
    return isinstance(config, dict) and config.get("model_type", MODEL_TYPE) != MODEL_TYPE


def _from_transformers(name: str, local: bool) -> tuple[Any, Any]:
    """Model and tokenizer, from the local cache if possible, else from the hub."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "judging samples needs transformers: pip install 'tarflowlm[quality]'"
        ) from None

    def get(only_local: bool) -> tuple[Any, Any]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=only_local)
        # safetensors only: nothing is unpickled
        options = {"use_safetensors": True, "local_files_only": only_local}
        return transformers.AutoModelForCausalLM.from_pretrained(name, **options), tokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        try:
            return get(True)
        except (OSError, ValueError):
            if local:
                raise
        check_hub_reachable()
        return get(False)
    except Exception as error:  # hub, network and library errors share no base class
        advice = "give a run of the baseline, a directory of transformers, or a hub name that can be reached"
        raise UserError(f"cannot load the judge {name!r} ({first_line(error)}): {advice}") from None
