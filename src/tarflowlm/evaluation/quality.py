"""Quality of samples beside real text, and baselines without a neural network: n-grams."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tarflowlm import chunks
from tarflowlm.config import Decoder
from tarflowlm.data import Tokenizer
from tarflowlm.errors import UserError
from tarflowlm.evaluation.judges import PAPER_JUDGES, Judge, JudgedTexts
from tarflowlm.generation import generate
from tarflowlm.generation.sampling import adjust_weights
from tarflowlm.language_model import LanguageModel
from tarflowlm.progress import SILENT, Progress

MAUVE_SCALING = 5  # the paper's; everything else is mauve-text's default
PAPER_SAMPLES = 5000
REPETITION_ORDER = 4


def sequence_entropy(sequences: Sequence[Sequence[Any]]) -> float:
    """Mean over the sequences of the entropy of their own symbol counts, in nats: -sum_v p_v log
    p_v.
    """
    total = 0.0
    for sequence in sequences:
        counts = torch.tensor(list(Counter(sequence).values()), dtype=torch.float64)
        p = counts / counts.sum()
        total -= (p * p.log()).sum().item()
    return total / len(sequences)


def _ngrams(sequence: Sequence[str], order: int) -> Iterator[tuple[str, ...]]:
    return zip(*(sequence[i:] for i in range(order)), strict=False)


def distinct(sequences: Sequence[Sequence[str]], order: int) -> float | None:
    """Different n-grams over all n-grams, of all sequences together (Li et al. 2016). None without
    n-grams. It falls with the amount of text, so compare equal amounts.
    """
    counts = Counter(gram for sequence in sequences for gram in _ngrams(sequence, order))
    return len(counts) / counts.total() if counts else None


def repetition(sequences: Sequence[Sequence[str]], order: int) -> float | None:
    """1 - different n-grams over n-grams of a sequence, mean over the sequences (seq-rep-n, Welleck
    et al. 2020). Sequences without an n-gram are left out. None if no sequence has one.
    """
    found = [list(_ngrams(sequence, order)) for sequence in sequences]
    shares = [1 - len(set(grams)) / len(grams) for grams in found if grams]
    return sum(shares) / len(shares) if shares else None


def mauve(text: Tensor, samples: Tensor) -> float:
    """MAUVE (Pillutla et al. 2021) between features [texts, D] of real text and of samples: 0 to 1,
    higher is closer. Computed by mauve-text with scaling factor 5 and its defaults: a tenth as many
    clusters as texts, 90 % of the variance kept, seed 25. Raises UserError if the package is
    missing, or for fewer than two texts on a side.
    """
    if min(len(text), len(samples)) < 2:
        raise UserError(
            f"MAUVE compares two sets of texts, not {len(text)} with {len(samples)}: use more of both"
        )
    sides = {"p_features": text.numpy(), "q_features": samples.numpy()}
    return float(mauve_function()(**sides, mauve_scaling_factor=MAUVE_SCALING, verbose=False).mauve)


def mauve_function() -> Callable[..., Any]:
    """`compute_mauve` of mauve-text. UserError if the package is missing."""
    try:
        from mauve import compute_mauve
    except ImportError:
        raise UserError("MAUVE needs mauve-text: pip install 'tarflowlm[quality]'") from None
    return compute_mauve


@dataclass(frozen=True)
class TextStatistics:
    """Statistics of a set of texts of equal length."""

    texts: int
    perplexity: float  # generative perplexity: that of the judge, per token of the judge
    judge_tokens: int
    entropy: float  # average sequence entropy over the model's tokens, nats (the paper's)
    word_entropy: float  # the same over words, more informative for models of characters
    distinct_1: (
        float | None
    )  # different words over all words; below, the same of 2-grams and 3-grams
    distinct_2: float | None
    distinct_3: float | None
    repetition: float | None  # share of 4-grams of words that occurred before in the same text

    @classmethod
    def of(cls, tokens: Tensor, texts: Sequence[str], judged: JudgedTexts) -> "TextStatistics":
        words = [text.split() for text in texts]
        return cls(
            texts=len(texts),
            perplexity=judged.perplexity,
            judge_tokens=judged.tokens,
            entropy=sequence_entropy(tokens.tolist()),
            word_entropy=sequence_entropy(words),
            distinct_1=distinct(words, 1),
            distinct_2=distinct(words, 2),
            distinct_3=distinct(words, 3),
            repetition=repetition(words, REPETITION_ORDER),
        )


@dataclass(frozen=True)
class Quality:
    """Statistics of samples and of real text, and everything needed to interpret or repeat them."""

    samples: TextStatistics
    text: TextStatistics
    mauve: float
    judge: str
    judge_kind: str
    remarks: tuple[str, ...]  # limits on what the numbers can be compared with
    length: int  # tokens of the model per sample
    decoder: str
    dtype: (
        str  # type of the weights in sampling; maps between noise and latents use float32 or wider
    )
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Settings of sampling. Raises UserError for fewer than 2 samples, and for settings out of
    range.
    """

    num: int = PAPER_SAMPLES
    length: int | None = None  # tokens per sample; None is the trained context
    decoder: Decoder = "auto"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num < 2:
            raise UserError(
                f"num {self.num}: MAUVE needs at least 2 samples, and hundreds to mean anything"
            )
        adjust_weights(self.temperature, self.top_k, self.top_p)  # only to raise its errors early


def measure_quality(
    model: LanguageModel,
    tokenizer: Tokenizer,
    judge: Judge,
    text: Tensor,
    config: SamplingConfig,
    *,
    trained_on: str | None = None,
    progress: Progress = SILENT,
) -> Quality:
    """Samples of `model` against real `text` [W, T]: windows of token ids, as long as the samples.
    Same configuration, same samples. `trained_on` names the model's corpus; a remark warns if the
    judge shares it. Raises UserError for a missing package, for texts that the judge cannot read,
    and for settings that the model does not allow.
    """
    mauve_function()  # a missing package is reported before the samples are drawn
    samples = draw_samples(model, config, progress)
    of_samples, of_text, similarity = compare_texts(samples, text, tokenizer, judge, progress)
    return Quality(
        samples=of_samples,
        text=of_text,
        mauve=similarity,
        judge=judge.name,
        judge_kind=judge.kind,
        remarks=_remarks(judge, config.num, trained_on),
        length=samples.shape[1],
        decoder="steps" if model.is_exact else config.decoder,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        **{name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "seed")},
    )


def compare_texts(
    samples: Tensor, text: Tensor, tokenizer: Tokenizer, judge: Judge, progress: Progress = SILENT
) -> tuple[TextStatistics, TextStatistics, float]:
    """Statistics of `samples` and of real `text`, token ids [N, T] of any model, and the MAUVE
    between them.
    """
    statistics, features = [], []
    for name, tokens in (("samples", samples), ("text", text)):
        texts = [tokenizer.decode(row.tolist()) for row in tokens]
        progress.stage(f"judge, {name}", len(texts))
        judged = judge.read(texts, progress)
        statistics.append(TextStatistics.of(tokens, texts, judged))
        features.append(judged.features)
    return statistics[0], statistics[1], mauve(features[1], features[0])


def draw_samples(
    model: LanguageModel, config: SamplingConfig, progress: Progress = SILENT
) -> Tensor:
    """Token ids [num, length] on the CPU. The batch size depends only on the length."""
    length = model.config.context if config.length is None else config.length
    batch, generator = (
        chunks.rows_at_once(length, chunks.COMPARED_TOKENS),
        torch.Generator().manual_seed(config.seed),
    )
    progress.stage("samples", config.num)
    parts = []
    settings = {
        name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "decoder")
    }
    for start in range(0, config.num, batch):
        num = min(batch, config.num - start)
        parts.append(
            generate(
                model, num_tokens=length, num=num, generator=generator, **settings
            ).tokens.cpu()
        )
        progress.advance(num)
    return torch.cat(parts)


def _remarks(judge: Judge, num: int, trained_on: str | None) -> tuple[str, ...]:
    remarks = []
    if judge.name not in PAPER_JUDGES:
        remarks.append(
            f"perplexity and MAUVE by {judge.name}: published ones are GPT-2 Large's, and not comparable"
        )
    if num < PAPER_SAMPLES:
        remarks.append(
            f"MAUVE of {num:,} samples: not comparable with published ones, which have {PAPER_SAMPLES:,}"
        )
    if (
        judge.source is not None
        and trained_on is not None
        and Path(judge.source).name == Path(trained_on).name
    ):
        remarks.append(
            "the judge was trained on the same text as the model: it favours what both have learned"
        )
    return tuple(remarks)


def ngram_entropy(ids_or_text: str | npt.NDArray[Any], order: int) -> float:
    r"""Entropy of a symbol given the `order - 1` symbols before it, from the counts of this text;
    bits per symbol.

        H_n = - 1/M  sum_{w, a}  c(w a)  log2( c(w a) / c(w) ),      c(w) = sum_a c(w a),   M = T -
        n + 1

    over the contexts w of n - 1 symbols and the next symbol a. c counts the M n-grams of the text
    of T symbols: characters of a string, or integers [T]. T must be at least the `order` n. No
    n-gram model of this order does better on this text. A model fitted to other text does worse,
    much worse if M is small.
    """
    if isinstance(ids_or_text, str):
        ids_or_text = np.frombuffer(
            ids_or_text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4"
        )
    ids = _ranks(ids_or_text)
    num_kinds, num_ngrams = int(ids.max()) + 1, len(ids) - order + 1
    contexts = np.zeros(num_ngrams, dtype=np.int64)
    for k in range(order - 1):
        contexts = _ranks(contexts * num_kinds + ids[k : k + num_ngrams])
    total = _sum_c_log_c(contexts * num_kinds + ids[order - 1 :]) - _sum_c_log_c(contexts)
    return max(0.0, -total / num_ngrams)


def _ranks(codes: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Codes replaced by their ranks 0, 1, ..., which keeps products of codes small."""
    return np.unique(codes, return_inverse=True)[1].astype(np.int64)


def _sum_c_log_c(codes: npt.NDArray[np.int64]) -> float:
    """Sum of c log2 c over the counts c of all codes."""
    counts = np.unique(codes, return_counts=True)[1].astype(np.float64)
    return float((counts * np.log2(counts)).sum())
