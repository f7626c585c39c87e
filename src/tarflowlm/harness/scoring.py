"""Log-likelihoods and continuations of texts, as lm-evaluation-harness asks for them, without the
harness itself.

Shape legend: B requests of n tokens each, S posterior samples, d channels, T the trained context, P
the patch.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tarflowlm import chunks
from tarflowlm.baseline import TokenLM
from tarflowlm.checks import as_integer
from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import BLANK, read
from tarflowlm.evaluation.likelihood import log_weights
from tarflowlm.generation import generate
from tarflowlm.generation.sampling import row_generators
from tarflowlm.language_model import LanguageModel
from tarflowlm.objective import conditional_bound, importance_weighted
from tarflowlm.progress import SILENT, Progress


class Piece(NamedTuple):
    """A window of at most T tokens, of which those after the first `given` are scored."""

    tokens: Int[Tensor, " n"]
    given: int


@dataclass(frozen=True)
class Continuation:
    """How to continue a text: greedily by default, until the first of the strings `until`, which is
    left out.
    """

    until: tuple[str, ...] = ()
    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = 1
    top_p: float | None = None

    def cut(self, text: str) -> str:
        """`text` up to the first of the strings that end it."""
        return text[
            : min(
                (at for stop in self.until if stop and (at := text.find(stop)) >= 0),
                default=len(text),
            )
        ]


class TextScorer:
    """Log-likelihoods and continuations of texts under a model, all in nats. `samples` posterior
    samples and their `seed` are for flows alone, as in `evaluate`. All continuations see the same
    noise at the same position of their window, so no log-likelihood depends on the other
    requests.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, *, samples: int = 1, seed: int = 0
    ) -> None:
        samples = as_integer(samples, "posterior samples", least=1)
        self.model, self.tokenizer = model, tokenizer
        self.samples, self.seed = 1 if model.is_exact else samples, seed
        generator = torch.Generator(device=model.device).manual_seed(seed)
        whole = torch.zeros(1, model.config.context, dtype=torch.int64, device=model.device)
        self._noise = [model.draw_noise(whole, generator) for _ in range(self.samples)]

    def encode(self, text: str) -> Int[Tensor, " n"]:
        """The tokens of a text (`data.prompts.read`); none where normalisation leaves nothing of
        it.
        """
        if not text or not self.tokenizer.prepare(text).strip():
            return torch.zeros(0, dtype=torch.int64)
        return read(self.tokenizer, text).tokens

    def encode_pair(self, context: str, continuation: str) -> Piece:
        """The tokens of both texts, normalised together since words may meet, and how many belong
        to the context. White space at the end of the context goes to the continuation, as in the
        training text.
        """
        ending = context[len(context.rstrip()) :]
        context, continuation = (
            context.removesuffix(ending) if ending else context,
            ending + continuation,
        )
        tokens, given = self.encode(context + continuation), len(self.encode(context))
        return Piece(tokens, min(given, len(tokens)))

    def rolling(self, texts: Sequence[str], progress: Progress = SILENT) -> list[float]:
        """log p of every text, or a lower bound on it, in nats: the sum over windows with fresh
        contexts. Windows and noise are those of `evaluate`, but an incomplete last window counts as
        a shorter one.
        """
        T = self.model.config.context
        tokens = [self.encode(text) for text in texts]
        whole = [t[: len(t) // T * T].view(-1, T) for t in tokens]
        owner = torch.repeat_interleave(torch.tensor([len(w) for w in whole], dtype=torch.int64))
        total = torch.zeros(len(texts), dtype=torch.float64)
        if len(owner):
            x, zeros = torch.cat(whole), torch.zeros_like(owner)
            weights = log_weights(
                self.model, x, zeros, samples=self.samples, seed=self.seed, progress=progress
            )
            total.index_add_(0, owner, -importance_weighted(weights))
        values, _ = self._scores(
            [Piece(t[len(w) * T :], 0) for t, w in zip(tokens, whole, strict=True)], progress
        )
        return (total + torch.tensor(values, dtype=torch.float64)).tolist()

    def num_windows(self, texts: Sequence[str]) -> int:
        """The parts that `rolling` counts: complete windows, and one for the rest of every text."""
        return sum(len(self.encode(text)) // self.model.config.context + 1 for text in texts)

    def conditional(
        self, requests: Sequence[Piece], progress: Progress = SILENT
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context), in nats, and whether it holds the most probable tokens;
        for each request. Exact for the baseline. For a flow of one block a lower bound on log p~
        (`objective.conditional_bound`); for more blocks a difference of two bounds with the same
        noise, which is no bound, and never "most probable". Beyond the trained context the start of
        the context is cut, and a longer continuation is scored in pieces.
        """
        pieces = [self._pieces(*request) for request in requests]
        values, greedy = self._scores([piece for parts in pieces for piece in parts], progress)
        scored = iter(zip(values, greedy, strict=True))
        taken = ([*islice(scored, len(parts))] for parts in pieces)
        return [
            (math.fsum(value for value, _ in part), all(best for _, best in part)) for part in taken
        ]

    def complete(
        self, requests: Sequence[tuple[str, Continuation]], progress: Progress = SILENT
    ) -> list[str]:
        """Text that follows each context. Contexts of one length are continued together. Every text
        is drawn with the scorer's seed, whatever the others are. top-k = 1 needs probabilities to
        change.
        """
        prompts = [self.encode(context) for context, _ in requests]
        kinds = [
            (len(prompt) + how.max_tokens, how)
            for prompt, (_, how) in zip(prompts, requests, strict=True)
        ]
        found = [""] * len(requests)
        for (length, how), whole in self._alike(kinds):
            options = {name: getattr(how, name) for name in ("temperature", "top_k", "top_p")}
            # beyond the context `generate` takes one prompt at a time
            for part in (
                [whole] if length <= self.model.config.context else [[index] for index in whole]
            ):
                prompt = F.pad(
                    torch.stack([prompts[i] for i in part]), (0, how.max_tokens), value=BLANK
                )
                # the noise of a first row, which a text alone would get
                seeds = (torch.Generator().manual_seed(self.seed) for _ in part)
                options["generator"] = [row_generators([0], seed)[0] for seed in seeds]
                drawn = generate(
                    self.model, num_tokens=length, num=len(part), prompt=prompt, **options
                )
                for index, tokens in zip(part, drawn.tokens.cpu(), strict=True):
                    found[index] = how.cut(self.tokenizer.decode(tokens[length - how.max_tokens :]))
                progress.advance(len(part))
        return found

    def _alike(
        self, kinds: Sequence[tuple[int, Any]]
    ) -> Iterator[tuple[tuple[int, Any], list[int]]]:
        """The places of equal `kinds`, whose first entry is a length, in batches of a size for that
        length.
        """
        groups: dict[tuple[int, Any], list[int]] = defaultdict(list)
        for place, kind in enumerate(kinds):
            groups[kind].append(place)
        for (length, rest), places in groups.items():
            on_cpu = self.model.device.type == "cpu"
            budget = chunks.BOUND_TOKENS_CPU if on_cpu else chunks.EVALUATED_TOKENS
            rows = chunks.rows_at_once(length, budget)
            yield from (((length, rest), places[i : i + rows]) for i in range(0, len(places), rows))

    def _pieces(self, tokens: Tensor, given: int) -> list[Piece]:
        """Windows that score the tokens after the first `given`, once each, with as much before
        them as fits.
        """
        T = self.model.config.context
        # a flow scores whole positions: its context is cut at the start, the last position padded
        P = 1 if self.model.is_exact else self.model.config.patch
        pieces, start = [], given
        while start < len(tokens):
            end = len(tokens) if len(tokens) - start <= T else start + T // 2
            before = min(start, T + (start - end) // P * P) // P * P
            pieces.append(Piece(tokens[start - before : end], before))
            start = end
        return pieces

    @torch.no_grad()
    def _scores(
        self, pieces: Sequence[Piece], progress: Progress
    ) -> tuple[list[float], list[bool]]:
        values, greedy = [0.0] * len(pieces), [True] * len(pieces)
        for (length, given), part in self._alike(
            [(len(piece.tokens), piece.given) for piece in pieces]
        ):
            if length > given:
                log_p, best = self._batch(torch.stack([pieces[i].tokens for i in part]), given)
                for index, value, is_best in zip(part, log_p.tolist(), best.tolist(), strict=True):
                    values[index], greedy[index] = value, is_best
            progress.advance(len(part))
        return values, greedy

    def _batch(
        self, tokens: Int[Tensor, "B n"], given: int
    ) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
        """Log-likelihood of the tokens after the first `given`, and whether they are the most
        probable ones.
        """
        model, end = self.model, tokens.shape[1]
        # whole positions: the baseline does not score what is added, for a flow any tokens there
        # give a lower bound
        tokens = F.pad(tokens.to(model.device), (0, -end % model.config.patch))
        if isinstance(model, TokenLM):
            scored, logits = tokens[:, given:end], model.logits(tokens)[:, given:end]
            log_p = logits.log_softmax(-1).gather(-1, scored[..., None]).squeeze(-1)
            return log_p.double().sum(-1), (logits.argmax(-1) == scored).all(-1)
        noise = [eps[:, : tokens.shape[1]].expand(len(tokens), -1, -1) for eps in self._noise]
        if given == 0 or model.num_blocks == 1:
            log_p = -importance_weighted(
                torch.stack([-conditional_bound(model, tokens, given, e) for e in noise])
            )
        else:
            head = [-model.bound(tokens[:, :given], e[:, :given]) for e in noise]
            whole = [-model.bound(tokens, e) for e in noise]
            log_p = importance_weighted(torch.stack(head)) - importance_weighted(torch.stack(whole))
        return log_p.double(), torch.zeros(len(tokens), dtype=torch.bool)
