"""Quality of samples next to real text: generative perplexity, MAUVE, entropy, repetition."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from reproduction.judges import PAPER_JUDGES, Judge, JudgedTexts
from tarflowlm import chunks
from tarflowlm.config import Decoder
from tarflowlm.data import Tokenizer
from tarflowlm.errors import SILENT, Progress, UserError
from tarflowlm.generation import generate
from tarflowlm.model import LanguageModel
from tarflowlm.requests import Sampling

MAUVE_SCALING = 5  # the paper's; everything else is mauve-text's default
PAPER_SAMPLES = 5000
REPETITION_ORDER = 4
SAMPLED_TOKENS = 16_384
"""Tokens that are drawn at once. The noise of the published numbers depends on it."""


def sequence_entropy(sequences: Sequence[Sequence[Hashable]]) -> float:
    """Entropy of a sequence's symbol counts, -sum_v p_v log p_v, in nats; mean over sequences."""
    total = 0.0
    for sequence in sequences:
        counts = torch.tensor(list(Counter(sequence).values()), dtype=torch.float64)
        p = counts / counts.sum()
        total -= (p * p.log()).sum().item()
    return total / len(sequences)


def _ngrams(sequence: Sequence[str], order: int) -> Iterator[tuple[str, ...]]:
    return zip(*(sequence[i:] for i in range(order)), strict=False)


def distinct(sequences: Sequence[Sequence[str]], order: int) -> float | None:
    """Different n-grams over all n-grams, of all sequences together (Li et al. 2016).

    None without n-grams. It falls with the amount of text, so compare equal amounts.
    """
    counts = Counter(gram for sequence in sequences for gram in _ngrams(sequence, order))
    return len(counts) / counts.total() if counts else None


def repetition(sequences: Sequence[Sequence[str]], order: int) -> float | None:
    """1 - different n-grams over n-grams of a sequence (seq-rep-n, Welleck et al. 2020).

    The mean over the sequences that have an n-gram; None if none has one.
    """
    found = [list(_ngrams(sequence, order)) for sequence in sequences]
    shares = [1 - len(set(grams)) / len(grams) for grams in found if grams]
    return sum(shares) / len(shares) if shares else None


def mauve(text: Tensor, samples: Tensor) -> float:
    """MAUVE (Pillutla et al. 2021) between features [texts, D] of real text and of samples.

    From 0 to 1, higher is closer. Computed by mauve-text with scaling factor 5 and its defaults: a
    tenth as many clusters as texts, 90 % of the variance kept, seed 25. UserError for fewer than
    two texts on a side.
    """
    if min(len(text), len(samples)) < 2:
        sizes = f"{len(text)} with {len(samples)}"
        raise UserError(f"MAUVE compares two sets of texts, not {sizes}: use more of both")
    from mauve import compute_mauve

    found = compute_mauve(
        p_features=text.numpy(),
        q_features=samples.numpy(),
        mauve_scaling_factor=MAUVE_SCALING,
        verbose=False,
    )
    return float(found.mauve)


@dataclass(frozen=True)
class TextStatistics:
    """Statistics of a set of texts of equal length."""

    texts: int
    perplexity: float
    """Generative perplexity: the judge's perplexity, per token of the judge."""
    perplexity_error: float
    """Its standard error over the texts."""
    judge_tokens: int
    entropy: float
    """Average sequence entropy over the model's tokens in nats, as in the paper."""
    word_entropy: float
    """The same over words, more informative for models of characters."""
    distinct_1: float | None
    """Different words over all words; below, the same for 2-grams and 3-grams."""
    distinct_2: float | None
    distinct_3: float | None
    repetition: float | None
    """Share of 4-grams of words that occurred before in the same text."""

    @classmethod
    def of(cls, tokens: Tensor, texts: Sequence[str], judged: JudgedTexts) -> "TextStatistics":
        words = [text.split() for text in texts]
        return cls(
            texts=len(texts),
            perplexity=judged.perplexity,
            perplexity_error=judged.perplexity_error,
            judge_tokens=judged.tokens,
            entropy=sequence_entropy(tokens.tolist()),
            word_entropy=sequence_entropy(words),
            distinct_1=distinct(words, 1),
            distinct_2=distinct(words, 2),
            distinct_3=distinct(words, 3),
            repetition=repetition(words, REPETITION_ORDER),
        )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Settings of sampling. UserError for fewer than 2 samples, and for settings out of range."""

    num: int = PAPER_SAMPLES
    length: int | None = None
    """Tokens per sample; None is the trained context."""
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
        # only to raise its errors early
        Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


@dataclass(frozen=True)
class Quality:
    """Statistics of samples and of real text, and everything needed to interpret or repeat them."""

    samples: TextStatistics
    text: TextStatistics
    mauve: float
    judge: str
    judge_kind: str
    remarks: tuple[str, ...]
    """Limits on comparisons with other numbers."""
    sampling: SamplingConfig
    """The settings of the samples; the length is set."""
    dtype: str
    """Type of the weights in sampling; maps between noise and latents use float32 or wider."""

    def to_json(self) -> dict[str, object]:
        flat = asdict(self)
        return flat | flat.pop("sampling")


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
    judge shares it. UserError for texts that the judge cannot read, and for settings that the
    model does not allow.
    """
    samples = draw_samples(model, config, progress)
    of_samples, of_text, similarity = compare_texts(samples, text, tokenizer, judge, progress)
    return Quality(
        samples=of_samples,
        text=of_text,
        mauve=similarity,
        judge=judge.name,
        judge_kind=judge.kind,
        remarks=tuple(_remarks(judge, config.num, trained_on)),
        sampling=replace(
            config,
            length=samples.shape[1],
            decoder="steps" if model.is_exact else config.decoder,
        ),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )


def compare_texts(
    samples: Tensor, text: Tensor, tokenizer: Tokenizer, judge: Judge, progress: Progress = SILENT
) -> tuple[TextStatistics, TextStatistics, float]:
    """Statistics of `samples` and of real `text`, and the MAUVE between them.

    Both are token ids [N, T] of any model.
    """
    statistics = []
    features = []
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
    generator = torch.Generator().manual_seed(config.seed)
    progress.stage("samples", config.num)
    parts = []
    for some in chunks.row_ranges(config.num, length, SAMPLED_TOKENS):
        drawn = generate(
            model,
            num_tokens=length,
            num=some.stop - some.start,
            generator=generator,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            decoder=config.decoder,
        )
        parts.append(drawn.tokens.cpu())
        progress.advance(len(drawn.tokens))
    return torch.cat(parts)


def _remarks(judge: Judge, num: int, trained_on: str | None) -> Iterator[str]:
    if judge.name not in PAPER_JUDGES:
        yield (
            f"perplexity and MAUVE by {judge.name}: "
            "published ones are GPT-2 Large's, and not comparable"
        )
    if num < PAPER_SAMPLES:
        yield (
            f"MAUVE of {num:,} samples: "
            f"not comparable with published ones, which have {PAPER_SAMPLES:,}"
        )
    if judge.source and trained_on and Path(judge.source).name == Path(trained_on).name:
        yield (
            "the judge was trained on the same text as the model: it favours what both have learned"
        )
