"""Log-likelihoods and continuations of texts, as lm-evaluation-harness asks for them.

The harness itself is not needed here. Shape legend: B requests of n tokens each, T the trained
context, P the patch.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm import chunks
from tarflowlm.baseline import TokenLM
from tarflowlm.data.prompts import read
from tarflowlm.errors import SILENT, Progress, UserError
from tarflowlm.evaluation.likelihood import log_weights
from tarflowlm.generation.sampling import num_leading
from tarflowlm.generation.texts import Samples
from tarflowlm.objective import conditional_bound, importance_weighted
from tarflowlm.requests import Writing, as_texts
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.schema import Million, checked


class Piece(NamedTuple):
    """A window of at most T tokens; the tokens after the first `given` are scored."""

    tokens: Int[Tensor, " n"]
    given: int


class TextScorer:
    """Log-likelihoods in nats, and continuations, of texts under a model.

    `samples` posterior samples and their `seed` are for flows alone, as in `evaluate`.
    """

    def __init__(self, lm: Checkpoint, *, samples: int = 1, seed: int = 0) -> None:
        self.lm = lm
        self.model = lm.model
        self.tokenizer = lm.tokenizer
        samples = checked(samples, Million, "posterior samples")
        self.samples = 1 if self.model.is_exact else samples
        self.seed = seed
        device = self.model.device
        generator = torch.Generator(device=device).manual_seed(seed)
        whole = torch.zeros(1, self.model.config.context, dtype=torch.int64, device=device)
        self.noise = [self.model.draw_noise(whole, generator) for _ in range(self.samples)]
        """The noise of a window, for every posterior sample."""

    def encode(self, text: str, *, goes_on: bool = False) -> Int[Tensor, " n"]:
        """The tokens of a text; none where normalisation leaves nothing of it."""
        if self._reads(text):
            return read(self.tokenizer, text, goes_on=goes_on).tokens
        return torch.zeros(0, dtype=torch.int64)

    def encode_pair(self, context: str, continuation: str) -> Piece:
        """The tokens of both texts, normalised together, and how many belong to the context.

        White space at the end of the context goes to the continuation, as in the training text, and
        so does a token in which both meet.
        """
        tokens = self.encode(context + continuation)
        alone = self.encode(context.rstrip())
        shared = min(len(alone), len(tokens))
        return Piece(tokens, num_leading(alone[:shared] == tokens[:shared]))

    def rolling(self, texts: Sequence[str], progress: Progress = SILENT) -> list[float]:
        """log p of every text, or a lower bound on it: the sum over windows with fresh contexts.

        Windows and noise are the same as in `evaluate`, with a shorter window at the end.
        """
        T = self.model.config.context
        tokens = [self.encode(text) for text in texts]
        whole = [text[: len(text) // T * T].view(-1, T) for text in tokens]
        rest = [Piece(text[len(text) // T * T :], 0) for text in tokens]
        owner = [at for at, windows in enumerate(whole) for _ in windows]
        progress.stage("rolling log-likelihoods, windows", len(owner) + len(rest))
        total = [value for value, _ in self._scores(rest, progress)]
        if owner:
            windows = torch.cat(whole)
            weights = log_weights(
                self.model, windows, samples=self.samples, seed=self.seed, progress=progress
            )
            for at, nats in zip(owner, importance_weighted(weights).tolist(), strict=True):
                total[at] -= nats
        return total

    def conditional(
        self, requests: Sequence[Piece], progress: Progress = SILENT
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context), and whether it is the greedy one (docs/harness.md).

        Where both exceed the trained context, the context loses its start. A continuation that
        exceeds it alone is scored in pieces.
        """
        pieces = [self.pieces(*request) for request in requests]
        scored = iter(self._scores([piece for parts in pieces for piece in parts], progress))
        found = []
        for parts in pieces:
            some = list(islice(scored, len(parts)))
            value = math.fsum(value for value, _ in some)
            # a flow cannot tell which continuation is the greedy one
            is_greedy = self.model.is_exact and all(best for _, best in some)
            found.append((value, is_greedy))
        return found

    def complete(
        self, requests: Sequence[tuple[str, Writing]], progress: Progress = SILENT
    ) -> list[str]:
        """Text that follows each context, drawn with the scorer's seed."""
        found = []
        for context, how in requests:
            writing = replace(
                how,
                prompt=context if self._reads(context) else None,
                stop=self._stops(as_texts(how.stop, "until")),
                seed=self.seed,
            )
            (written,) = Samples(writing, self.lm).batches()
            # where the prompt ends, with a space that was left to the first new token
            found.append(written.texts[0][written.streams[0].start :])
            progress.advance()
        return found

    def _reads(self, text: str) -> bool:
        """Whether normalisation leaves anything of a text."""
        return bool(self.tokenizer.prepare(text).strip())

    def _stops(self, until: Sequence[str]) -> tuple[str, ...]:
        """The stops that the model can write; text8 drops line ends and markup."""
        found = []
        is_plain = self.tokenizer.normalization == "none"
        for stop in until:
            is_kept = self.tokenizer.prepare(stop) == stop
            if is_kept or (self._reads(stop) and (is_plain or not set(stop) & set("<>|"))):
                with suppress(UserError):  # for characters that the model does not have
                    read(self.tokenizer, stop)
                    found.append(stop)
        return tuple(found)

    def pieces(self, tokens: Int[Tensor, " n"], given: int) -> list[Piece]:
        """Windows that score the tokens after the first `given`, with as much before as fits."""
        T = self.model.config.context
        # a flow scores whole positions
        P = 1 if self.model.is_exact else self.model.config.patch
        # `data.windows.spans` gives other numbers: its last window has less context than fits
        found = []
        start = given
        while start < len(tokens):
            end = len(tokens) if len(tokens) - start <= T else start + T // 2
            before = min(start, T + (start - end) // P * P) // P * P
            found.append(Piece(tokens[start - before : end], before))
            start = end
        return found

    @torch.no_grad()
    def _scores(self, pieces: Sequence[Piece], progress: Progress) -> list[tuple[float, bool]]:
        """log p of the scored tokens of every piece, and whether they are the most probable."""
        found = [(0.0, True)] * len(pieces)
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, piece in enumerate(pieces):
            alike[len(piece.tokens), piece.given].append(place)
        for (length, given), places in alike.items():
            rows = chunks.bound_rows(length, self.model.device)
            for start in range(0, len(places), rows):
                some = places[start : start + rows]
                if length > given:
                    tokens = torch.stack([pieces[place].tokens for place in some])
                    for place, score in zip(some, self._batch(tokens, given), strict=True):
                        found[place] = score
                progress.advance(len(some))
        return found

    def _batch(self, tokens: Int[Tensor, "B n"], given: int) -> list[tuple[float, bool]]:
        """`_scores` of pieces of one shape, as tokens [B, n]."""
        model = self.model
        end = tokens.shape[1]
        # pad to whole positions: the baseline does not score them, a flow's bound holds for any
        tokens = F.pad(tokens.to(model.device), (0, -end % model.config.patch))
        if isinstance(model, TokenLM):
            scored = tokens[:, given:end]
            logits = model.logits(tokens)[:, given:end]
            parts = logits.log_softmax(-1).gather(-1, scored[..., None]).squeeze(-1)
            is_best = (logits.argmax(-1) == scored).all(-1)
            return list(zip(parts.cpu().double().sum(-1).tolist(), is_best.tolist(), strict=True))
        if given == 0 or model.num_blocks == 1:
            nats = self._bound(tokens, given)
        else:
            nats = self._bound(tokens, 0) - self._bound(tokens[:, :given], 0)
        return [(-value, False) for value in nats.cpu().double().tolist()]

    def _bound(self, tokens: Int[Tensor, "B n"], given: int) -> Float[Tensor, " B"]:
        """A bound on -log p of the tokens after the first `given`, with the common noise."""
        noise = [eps[:, : tokens.shape[1]].expand(len(tokens), -1, -1) for eps in self.noise]
        log_w = [-conditional_bound(self.model, tokens, given, eps) for eps in noise]
        return importance_weighted(torch.stack(log_w))
