"""Texts under a model: the bits of every token, and the likelihood of a whole text.

A text is a request's: a corpus or a file, or a text itself.
"""

import logging
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from tarflowlm import chunks
from tarflowlm.baseline import TokenLM
from tarflowlm.data import SOURCE_NAMES, Tokenizer, encode_text, misfit, prepare_corpus
from tarflowlm.data.prompts import characters, check_text, read
from tarflowlm.data.sources import HUB, split_field
from tarflowlm.data.windows import Array, sliding_windows, spans
from tarflowlm.errors import SILENT, Progress, UserError, counted
from tarflowlm.evaluation.likelihood import Likelihood, bits, evaluate, finite
from tarflowlm.model import LanguageModel, as_flow, check_tokens
from tarflowlm.processes import ALONE, Processes
from tarflowlm.requests import Evaluation, Score, Split, as_texts
from tarflowlm.runs.checkpoint import Checkpoint, corpus_digest
from tarflowlm.runs.weights import check_finite
from tarflowlm.schema import Million, Seed, checked

log = logging.getLogger("tarflowlm")


@dataclass(frozen=True, repr=False)
class Scores:
    """Bits of the T tokens of a text, on the CPU in float64."""

    bits: Tensor
    """[T]: -log2 p(x_t | x_<t) of the baseline; of a flow, the part of token t in its bound."""
    blocks: Tensor | None
    """[L, T]: log2|det J| of every block at every token, block 1 first; None for the baseline."""
    text: str = ""
    """The text as the model read it. Empty for tokens alone."""
    symbols: Sequence[str] = ()
    """[T]: the tokens of this text, as strings to show. A character of several tokens is in the
    last of them; the others may be empty.
    """
    notice: str | None = None
    """A line if the model reads the text differently from how it was given."""
    is_lossless: bool = True
    """Whether the tokens restore the text."""

    @property
    def exact(self) -> bool:
        """Whether the bits are exact; else only their sum is an upper bound."""
        return self.blocks is None

    @property
    def total(self) -> float:
        """Bits of the whole text."""
        return self.bits.sum().item()

    @property
    def per_token(self) -> float:
        """Mean bits per token."""
        return self.bits.mean().item()

    @property
    def bits_per_character(self) -> float:
        """Bits per character of `text`; NaN for tokens alone, or those that do not restore it."""
        return self.total / len(self.text) if self.text and self.is_lossless else math.nan

    @property
    def sign(self) -> str:
        """The sign before the bits of the whole text: = or <=."""
        return "=" if self.exact else "<="

    def heat(self, bits: Tensor, most: float, hot: str = "#d55e00", cold: str = "#0072b2") -> str:
        """The text in HTML, on a ground that is hot for many bits [T] and cold below 0.

        `most` bits have the full colour. A character of several tokens has the bits of all.
        """
        shown = ""
        value = 0.0
        for text, bits_of_token in zip(self.symbols, bits.tolist(), strict=True):
            value += bits_of_token
            if not text:
                continue
            share = min(abs(value) / max(most, 1e-9), 1.0)
            ground = f"{hot if value >= 0 else cold} {75 * share:.0f}%,transparent"
            style = f'style="background:color-mix(in srgb,{ground})" title="{value:.2f} bits"'
            shown += f"<span {style}>{escape(text)}</span>"
            value = 0.0
        return shown

    @property
    def rare(self) -> str:
        """The characters of several tokens, each once: the text of the model hardly had them."""
        parts = zip(self.symbols, ("x", *self.symbols), strict=False)
        return "".join(dict.fromkeys(text[0] for text, before in parts if text and not before))

    def __repr__(self) -> str:
        return f"<Scores of {len(self.bits)} tokens: {self.sign} {self.total:.1f} bits>"

    def _repr_html_(self) -> str | None:
        if not self.symbols:
            return None
        shown = self.heat(self.bits, most=12.0)
        return f"<pre>{shown}\n{self.sign} {self.total:.1f} bits</pre>"


def score_texts(request: Score, lm: Checkpoint, progress: Progress = SILENT) -> list[Scores]:
    """The bits of every text of a request, read like the model's training text."""
    check_finite(lm.model.state_dict(), "model")
    texts = as_texts(request.text, "text")
    readings = [read(lm.tokenizer, text, normalize=request.normalize) for text in texts]
    tokens = [reading.tokens for reading in readings]
    found = scores(lm.model, tokens, samples=request.samples, seed=request.seed, progress=progress)
    scored = []
    for reading, one in zip(readings, found, strict=True):
        tokenizer = lm.tokenizer
        parts = zip(reading.tokens.tolist(), characters(reading.tokens, tokenizer), strict=True)
        symbols = [
            tokenizer.symbols[token] if text.encode() == tokenizer.token_bytes[token] else text
            for token, text in parts
        ]
        told = replace(one, text=reading.text, symbols=symbols, notice=reading.notice)
        scored.append(replace(told, is_lossless=tokenizer.is_lossless))
    return scored


def score(
    model: LanguageModel,
    tokens: Tensor,
    *,
    samples: int = 8,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Scores:
    r"""The bits of each of the `tokens` [T] of a text; one token is enough.

    For a flow these are the terms of the negative ELBO (docs/math.md, eq. 11a) at token t, in the
    mean over `samples` posterior samples:

        log q(z_t | x_t) - log p(x_t | z_t) - log N(u_t; 0, I) - sum_l log|det J_l|_t

    The blocks of a flow read in both directions, so a token's share depends on tokens on both sides
    of it. With P > 1 the log-determinant of a position is spread evenly over its P tokens.

    An incomplete last patch of a flow is filled up with the first tokens y of the text. Their bits
    count with the last token, so that the sum stays a bound: -log p(x) <= -log p(x, y) for any y.

    A text beyond the trained context is scored in windows. The baseline and flows of one block see
    half a window as context. Flows of several blocks begin every window with no context, because no
    other bound is known for them. Same seed, same result, with the noise of `evaluate`. `progress`
    advances by windows, each counted once per sample.
    """
    return scores(model, [tokens], samples=samples, seed=seed, progress=progress)[0]


@torch.no_grad()
def scores(
    model: LanguageModel,
    texts: Sequence[Tensor],
    *,
    samples: int = 8,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[Scores]:
    """`score` of each of many texts; texts of equal length share a batch.

    The results are the same as one text after the other, since each draws the noise of `seed`.
    """
    samples = checked(samples, Million, "samples")
    seed = checked(seed, Seed, "seed")
    for tokens in texts:
        check_tokens(model, tokens, shape="[T]")
    draws = 1 if model.is_exact else samples
    context, patch = model.config.context, model.config.patch
    of_length: dict[int, list[int]] = defaultdict(list)
    for index, tokens in enumerate(texts):
        of_length[len(tokens)].append(index)
    overlap = model.num_blocks == 1
    bounds = {n: spans(n + -n % patch, context, patch=patch, overlap=overlap) for n in of_length}
    windows = sum(len(indices) * len(bounds[n]) for n, indices in of_length.items())
    progress.stage("scoring, windows", draws * windows)
    found: dict[int, Scores] = {}
    for length, indices in of_length.items():
        for some in chunks.row_ranges(len(indices), length, chunks.EVALUATED_TOKENS):
            rows = torch.stack([texts[index] for index in indices[some]])
            nats = _mean_nats(model, rows, bounds[length], draws, seed, progress)
            for index, of_text in zip(indices[some], nats, strict=True):
                shares, beyond = bits(of_text).tensor_split([length], dim=1)
                blocks = None
                if not model.is_exact:
                    # tokens that fill the last patch of a flow count with the last token
                    shares[:, -1] += beyond.sum(1)
                    blocks = shares[1:]
                found[index] = Scores(shares[0], blocks)
    return [found[index] for index in range(len(texts))]


def _mean_nats(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    windows: list[tuple[int, int]],
    draws: int,
    seed: int,
    progress: Progress,
) -> Float[Tensor, "B rows T_filled"]:
    """Nats of every token, and for a flow every block's log-determinant at it.

    In windows, and in the mean over `draws` posterior samples. UserError where one is not finite.
    """
    patch = model.config.patch
    filler = tokens.repeat(1, patch)[:, : -tokens.shape[1] % patch]
    whole = torch.cat((tokens, filler), dim=1).to(model.device)
    givens = [0, *(end - start for (_, end), (start, _) in pairwise(windows))]
    shapes = [(end - start, given) for (start, end), given in zip(windows, givens, strict=True)]
    generators = [Generator(device=model.device).manual_seed(seed) for _ in tokens]
    found = []
    for some in chunks.equal_ranges(
        shapes, chunks.rows_at_once(shapes[0][0], chunks.EVALUATED_TOKENS)
    ):
        # [B, windows, T]
        rows = torch.stack([whole[:, start:end] for start, end in windows[some]], dim=1)
        nats = torch.zeros(())
        for _ in range(draws):
            noise = torch.cat(list(map(model.draw_noise, rows, generators)))
            if isinstance(model, TokenLM):
                shares = -model.token_log_prob(rows.flatten(0, 1))[None]
            else:
                terms, _ = as_flow(model).terms(rows.flatten(0, 1), noise)
                shares = torch.stack([terms.nelbo, *terms.log_dets])
            nats = nats + shares.cpu().double() / draws
            progress.advance(rows.shape[0] * rows.shape[1])
        scored = nats.unflatten(1, rows.shape[:2])[..., givens[some.start] :]
        found.append(scored.flatten(2))
    return finite(torch.cat(found, dim=2)).transpose(0, 1)


# the likelihood of a text in windows


@dataclass(frozen=True)
class Windows:
    """A text in windows, as it is evaluated."""

    source: str
    """Its name."""
    split: Split
    tokens: Array
    """All tokens of the split."""
    windows: Tensor
    """[W, T]."""
    given: Tensor
    """Tokens at the start of each that are context only, [W]."""
    stride: int


def evaluate_text(
    request: Evaluation,
    lm: Checkpoint,
    text: Windows,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
) -> Likelihood:
    """The likelihood of the text that `read_windows` has read for a request."""
    narrow = request.precision == "bfloat16"
    with torch.autocast(lm.model.device.type, torch.bfloat16, enabled=narrow):
        return evaluate(
            lm.model,
            text.windows,
            torch.from_numpy(lm.tokenizer.characters_per_token),
            bytes_per_token=torch.from_numpy(lm.tokenizer.bytes_per_token),
            given=text.given,
            samples=request.samples,
            seed=request.seed,
            progress=progress,
            processes=processes,
        )


def read_windows(request: Evaluation, lm: Checkpoint, progress: Progress = SILENT) -> Windows:
    """The text to measure, the request's or the run's own, in windows.

    A corpus keeps the split of training. UserError for the text of a shipped model, and for windows
    that the model cannot take.
    """
    check_finite(lm.model.state_dict(), "model")
    tokenizer = lm.tokenizer.with_normalization(request.normalize)
    data = str(request.data) if isinstance(request.data, Path) else request.data
    if data is None or (isinstance(data, str) and "\n" not in data):
        source, split, tokens = read_source(data, request.split, lm, tokenizer, progress)
    else:
        texts = as_texts(data, "data")
        for text in texts:
            check_text(text, "text")
        if not texts or request.split not in (None, "all"):
            what = f"data of {counted(len(texts), 'text')}, split {request.split}"
            raise UserError(f"{what}: give at least one text, and no split")
        source, split = counted(len(texts), "text"), "all"
        tokens = encode_text(texts, tokenizer, split, progress=progress)
        if not len(tokens):
            raise UserError("nothing is left of the text once normalised: give some letters a-z")
    context = lm.model.config.context
    patch = lm.model.config.patch
    if len(tokens) < context and split == "all":
        context = len(tokens) - len(tokens) % patch
        if not context:
            what = f"the text has {counted(len(tokens), 'token')}, fewer than a patch of {patch}"
            raise UserError(f"{what}: use a longer text")
        what = f"one window of {counted(context, 'token')}"
        log.info("the text is shorter than the context: %s", what)
    stride = context if request.stride is None else request.stride
    windows, given = sliding_windows(tokens, context, stride, request.windows)
    if stride % patch:
        raise UserError(f"stride {stride}: must be a multiple of the patch of {patch} tokens")
    if stride < context and lm.model.num_blocks > 1:
        rule = f"windows slide for one block, and this model has {lm.model.num_blocks} blocks"
        raise UserError(f"stride {stride}: {rule}; leave --stride out")
    return Windows(source, split, tokens, windows, given, stride)


def read_source(
    data: str | None,
    split: Split | None,
    lm: Checkpoint,
    tokenizer: Tokenizer,
    progress: Progress,
) -> tuple[str, Split, Array]:
    """The source `data`, or the run's own, its split, and the tokens of that.

    By default this is all of a file that the model was not trained on, else the test split.
    """
    ours = lm.run.data
    source = ours.source if data is None else data
    path, own = (split_field(one)[0] for one in (source, ours.source))
    # os.path: False, not an error, for impossible names
    has_both = os.path.exists(path) and os.path.exists(own)
    is_own = source == ours.source or (has_both and os.path.samefile(path, own))
    is_named = source in SOURCE_NAMES or source.startswith(HUB)
    if split is None:
        split = "all" if not is_named and os.path.isfile(path) and not is_own else "test"
    if data is None and not is_named and not os.path.exists(path):
        what = f"cannot find the training text {source} of {lm.directory.name}"
        raise UserError(f"{what}: pass --data tales or --data FILE")
    text = replace(ours, source=source, unwrap=ours.unwrap and is_own)
    # a corpus is kept with the tokenizer of a model, as it is
    is_plain = tokenizer.normalization == lm.tokenizer.normalization
    is_corpus = (data is None or is_named or os.path.isdir(path)) and is_plain
    if split == "all" or not is_corpus:
        tokens = encode_text(text, tokenizer, split, progress=progress)
        # before the work, so that an unreadable text costs one line
        problem = misfit(text, tokenizer)
        if problem is not None:
            log.info("%s", problem)
        return source, split, tokens
    corpus = prepare_corpus(text, tokenizer, progress=progress)
    if data is None and corpus_digest(lm.directory) not in (None, corpus.fingerprint):
        what = f"{source} has changed since training: its {split} split may hold text of that"
        log.info("%s", what)
    return source, split, corpus.split(split)
