"""The inverse of block 1 by drafts that it verifies itself (docs/math.md, section 7, "Drafts").

Shape legend: B rows, N positions, n positions of a pass, k positions that a draft reads, W drafts, P tokens per
position, d channels per token, C = P d, D width of the block, E width of the draft.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflowlm.choices import Decoder
from tarflowlm.device import now
from tarflowlm.errors import UserError
from tarflowlm.flow.cached import KVCache
from tarflowlm.flow.couplings import AdjustWeights
from tarflowlm.flow.precision import widen
from tarflowlm.generation.inversion import (
    TOLERANCE,
    Decoders,
    Follow,
    Inverted,
    Tick,
    first_bad,
    invert_block,
    invert_stack,
    per_block,
)
from tarflowlm.generation.lookahead import Lookahead
from tarflowlm.model import TarFlowLM

LONGEST_PASS = 4
"""A pass covers at most this many times the W + 1 positions of a round, so that open ones cannot pile up."""
REACH = 8.0
"""Latents h that move by at most this many sigma (1 + |h|) are taken to keep their token; a mistake costs time."""
DROP_SHARE = 0.25
"""Rows that are done leave the batch when they are this share of it: the others are copied then."""
MARGIN = 1.2
"""`auto` takes drafts if steps take so many times as long: what is believed has to be finished, the text checked."""
TRIAL_STEPS, TRIAL_ROUNDS = 4, 8
"""What `auto` times: steps, then rounds; the first of each are not counted."""


@dataclass(frozen=True)
class Round:
    """The state of a text after a round."""

    tokens: Tensor
    """[B, T]: final ones, then those that are believed, then drafts."""
    final: Tensor
    """[B]: how many leading tokens are final."""
    guessed: Tensor
    """[B]: how many leading tokens are at least guessed; those behind mean nothing yet."""

    def cut(self, length: int) -> "Round":
        """The same for the first `length` tokens."""
        return Round(self.tokens[:, :length], self.final.clamp(max=length), self.guessed.clamp(max=length))


Watch = Callable[[Round], None]
"""Called after every round."""


@torch.no_grad()
def invert_with_drafts(
    model: TarFlowLM,
    u: Tensor,
    *,
    decoder: Decoder = "drafted",
    adjust: AdjustWeights | None = None,
    settled: Tensor | None = None,
    num_settled: int = 0,
    tick: Tick | None = None,
    watch: Watch | None = None,
) -> Inverted:
    """Invert block 1: latents h [B, N, C] from noise u [B, N, C], by the model's draft.

    The result is that of steps up to rounding, as for sweeps, and is checked in the same way: it is mapped forward
    again, and from the first position whose noise does not come back the rest is inverted by steps. auto: times
    steps and rounds on the first positions and goes on with the faster. `tick` is called once per position that is
    not settled; other arguments as `invert_block`.

    UserError if the model has no draft.
    """
    work = _Drafting(model, u, adjust, tick, watch)
    if num_settled and settled is not None:
        work.settle(settled, num_settled)
    chosen = work.trial() if decoder == "auto" else decoder
    # rows that are done have no final positions left to go by steps
    by_rounds = min(work.final) if len(work.rows) == len(u) else work.num_positions
    if chosen == "sequential":
        work.step(work.num_positions)
    else:
        by_rounds = work.num_positions
        while len(work.rows):
            work.round()
    h, repeated = work.result(), 0
    # positions before were computed from final inputs; with adjusted weights there is no map to check against
    if adjust is None and work.unchanged_from < by_rounds:
        bad = first_bad(model.prior.block(0), h[:, :by_rounds], u[:, :by_rounds], work.unchanged_from)
        if bad < by_rounds:
            repeated = work.num_positions - bad
            again = invert_block(model.prior.block(0), u, settled=h, num_settled=bad)
            h, work.passes = again.h, work.passes + again.passes
    return Inverted(h, chosen, work.passes, repeated)


def invert_stack_with_drafts(
    model: TarFlowLM,
    noise: Tensor,
    *,
    decoder: Decoders,
    adjust: AdjustWeights | None = None,
    tick: Tick | None = None,
    watch: Watch | None = None,
    follow: Follow | None = None,
) -> tuple[list[Tensor], list[Inverted]]:
    """As `invert_stack`, where block 1 may be drafted; blocks above it are then decoded by auto."""
    upper, first = split_decoders(model, decoder)
    if uses_draft(model, first):
        states, work = invert_stack(model, noise, decoder=(*upper, "auto"), above=1, tick=tick)
        u = model.prior.patch(states[-1])[0]
        work.append(invert_with_drafts(model, u, decoder=first, adjust=adjust, tick=tick, watch=watch))
        return [*states, model.prior.patch.inverse(work[-1].h)], work
    return invert_stack(model, noise, decoder=(*upper, first), adjust=adjust, tick=tick, follow=follow)


def uses_draft(model: TarFlowLM, decoder: Decoder) -> bool:
    """Whether block 1 is inverted by its draft, or tries it, with this decoder."""
    return model.draft is not None and decoder in ("drafted", "auto")


def split_decoders(model: TarFlowLM, decoder: Decoders) -> tuple[tuple[Decoder, ...], Decoder]:
    """The decoders of blocks L .. 2, and that of block 1.

    UserError for a drafted block without a draft.
    """
    *upper, first = per_block(decoder, model.num_blocks)
    if decoder == "drafted":
        upper = ["auto"] * len(upper)
    if "drafted" in upper:
        raise UserError(f"decoder {decoder}: only block 1 can be drafted, give another decoder for the blocks above")
    if first == "drafted" and model.draft is None:
        raise UserError("decoder drafted: the model has no draft; train one with `tarflowlm draft`")
    return tuple(upper), first


class _Drafting:
    """The state of an inversion by drafts.

    In each row, positions before `final` are final: they were computed from final inputs, or from inputs that a pass
    no longer changed. Those before `front` came out near the guess, so they have the tokens that were guessed, while
    their latents may still move; the next drafts begin there. Arrays hold the rows that are not done, `rows` says
    which ones; they begin with k positions before the text, and end with some after it.
    """

    def __init__(
        self, model: TarFlowLM, u: Tensor, adjust: AdjustWeights | None, tick: Tick | None, watch: Watch | None
    ) -> None:
        assert model.draft is not None
        self.block, self.book, self.draft = model.prior.block(0), model.codebook, model.draft
        self.adjust, self.tick, self.watch = adjust, tick, watch
        B, self.num_positions, C = u.shape
        config = self.draft.config
        self.before, self.longest = config.past, LONGEST_PASS * (config.ahead + 1)
        self.patch, self.passes, self.ticked = model.config.patch, 0, 0
        length = self.before + self.num_positions + self.longest
        self.noise = u.new_zeros(B, length, C)
        self.noise[:, self.before : self.before + self.num_positions] = u
        self.h = torch.zeros_like(self.noise)
        self.features = u.new_zeros(B, length, self.block.start.shape[0])
        self.reach = REACH * self.book.log_std.max().exp().item()
        self.steps = torch.arange(length, device=u.device)
        self.each = torch.arange(B, device=u.device)[:, None]
        # passes of many lengths: nothing to compile
        self.cache = KVCache(self.block.transformer, B, self.num_positions + self.longest, self.block.start)
        self.rows = torch.arange(B, device=u.device)
        self.final = [0] * B
        self.front = [0] * B
        self.lookahead = Lookahead(config.ahead)
        self.draft_step = self.draft.steps()
        self.unchanged_from = self.num_positions
        """The first position that was taken as final because what came before it no longer changed."""
        self.done_h = torch.zeros_like(u)
        self.seen_final, self.seen_guessed = [0] * B, [0] * B

    def result(self) -> Tensor:
        """The latents [B, N, C]."""
        self.done_h[self.rows] = self._text(self.h)
        return self.done_h

    def _text(self, x: Tensor) -> Tensor:
        """The positions of the text in one of the arrays."""
        return x[:, self.before : self.before + self.num_positions]

    def settle(self, h: Tensor, num: int) -> None:
        """Take the first `num` positions from h [B, N, C]."""
        self._text(self.h)[:, :num] = h[:, :num]
        self._text(self.features)[:, :num] = self.block.features_of(self.cache, h[:, : num - 1], first=True)
        self.ticked = num
        self._move([num] * len(self.rows), [num] * len(self.rows))

    def _move(self, final: list[int], front: list[int]) -> None:
        """Note how far every row is, tell who watches, and drop the rows that are done."""
        N = self.num_positions
        self.final, self.front = [min(x, N) for x in final], [min(x, N) for x in front]
        for row, at in zip(self.rows.tolist(), self.final, strict=True):
            self.seen_final[row] = max(at, self.seen_final[row])
        if self.tick is not None:
            for _ in range(min(self.seen_final) - self.ticked):
                self.tick()
            self.ticked = min(self.seen_final)
        if self.watch is not None:
            tokens = self.book.decode(self.result().unflatten(-1, (self.patch, -1))).flatten(1)
            counts = self.patch * torch.tensor((self.seen_final, self.seen_guessed))
            self.watch(Round(tokens, counts[0], counts.amax(0)))
        open_rows = [i for i, at in enumerate(self.final) if at < N]
        if not open_rows or len(self.rows) - len(open_rows) >= DROP_SHARE * len(self.rows):
            self._keep(open_rows)

    def _keep(self, rows: list[int]) -> None:
        """Go on with these rows alone."""
        self.done_h[self.rows] = self._text(self.h)
        index = torch.tensor(rows, dtype=torch.long, device=self.h.device)
        for name in ("rows", "noise", "h", "features"):
            setattr(self, name, getattr(self, name)[index])
        self.cache.stored = [stored[:, index] for stored in self.cache.stored]
        self.final, self.front = [self.final[i] for i in rows], [self.front[i] for i in rows]

    def round(self) -> None:
        """Draft what follows the front of every row, and let block 1 verify it in one pass."""
        begun, B, N = now(self.h.device), len(self.rows), self.num_positions
        open_spans = [front - final for front, final in zip(self.front, self.final, strict=True)]
        widest = max(open_spans)
        left = max(N - front for front in self.front)
        # the first position of a text has no features before it to draft from
        ahead = min(self.lookahead.choose(B), max(left - 1, 0)) if min(self.front) else 0
        n = min(widest + ahead + 1, self.longest, N - min(self.final))
        drafted = min(max(n - 1 - span for span in open_spans), self.draft.config.ahead) if ahead else 0
        if drafted > 0:
            self._guess(drafted)
            self.lookahead.drafted((now(self.h.device) - begun) / drafted)
            begun = now(self.h.device)
        done, right = self._pass(n)
        for row, at in zip(self.rows.tolist(), self.final, strict=True):
            self.seen_guessed[row] = min(at + n, N)
        self.unchanged_from = min(
            [self.unchanged_from, *(at + 1 for at, count in zip(self.final, done, strict=True) if count > 1)]
        )
        final = [at + min(count, n) for at, count in zip(self.final, done, strict=True)]
        front = [at + min(max(counts), n) for at, *counts in zip(self.final, done, right, strict=True)]
        if drafted > 0:
            gained = [max(0, new - old - 1) for new, old in zip(front, self.front, strict=True) if old + drafted < N]
            self.lookahead.accepted(min(drafted, n - 1 - widest), gained)
        self.lookahead.took(now(self.h.device) - begun, B * n)
        self._move(final, front)

    def _guess(self, count: int) -> None:
        """Guess the latents of `count` positions from the front of every row."""
        here = self._places(self.front, 0, count)
        past = self.features[self._places(self.front, -self.before, self.before)]
        noise, z = self.noise[here], self.h[self._places(self.front, -1, 1)][:, 0]
        state, features, guessed = self.draft.start(past), past[:, -1].contiguous(), []
        for u in noise.unbind(1):
            state, features = self.draft_step(state, features, z)
            z = self.block.coupling.invert(u, features, self.adjust)
            guessed.append(z)
        self.h[here] = torch.stack(guessed, 1)

    def _pass(self, n: int) -> tuple[list[int], list[int]]:
        """Block 1 on n positions from `final` on in every row; returns how far each row gets.

        The first list counts the positions that are final now, the second those whose tokens were guessed right.
        """
        here = self._places(self.final, 0, n)
        x = widen(self.block.input(self.h[self._places(self.final, -1, n)]))
        if min(self.final) == 0:
            starts = torch.tensor([at == 0 for at in self.final], device=x.device)
            x[starts, 0] = self.block.start.to(x.dtype)
        if len(set(self.final)) == 1:
            self.cache.length = self.final[0]
            features = self.cache.extend(x)
        else:
            features = self.cache.extend(x, torch.tensor(self.final, device=x.device))
        self.features[here] = features
        noise, old = self.noise[here], self.h[here]
        new = self.block.coupling.invert(noise.flatten(0, 1), features.flatten(0, 1), self.adjust).view_as(old)
        change = ((new - old).abs_() / (1 + new.abs())).amax(-1).tolist()
        self.h[here] = new
        self.passes += 1
        # a position is final when those before it are, so the one after them is final, too
        tolerance = TOLERANCE[new.dtype]
        return [1 + _leading(row, tolerance) for row in change], [1 + _leading(row, self.reach) for row in change]

    def _places(self, starts: list[int], shift: int, count: int) -> tuple[Tensor | slice, Tensor | slice]:
        """Index of `count` positions of every row from `starts` + `shift` on."""
        first = self.before + shift
        if len(set(starts)) == 1:
            return slice(None), slice(first + starts[0], first + starts[0] + count)
        at = torch.tensor(starts, device=self.h.device)[:, None]
        return self.each[: len(starts)], at + self.steps[first : first + count]

    def step(self, until: int) -> None:
        """Go on position by position, from the first one that is not final in all rows, up to `until`."""
        while min(self.final, default=until) < until:
            self.final = self.front = [min(self.final)] * len(self.rows)
            self._pass(1)
            self._move([at + 1 for at in self.final], [at + 1 for at in self.front])

    def trial(self) -> Decoder:
        """The faster decoder, timed on positions that have to be inverted anyway."""
        if not len(self.rows):
            return "drafted"
        marks = [(now(self.h.device), self._open())]
        for _ in range(min(TRIAL_STEPS, self.num_positions - min(self.final))):
            self.step(min(self.final) + 1)
            marks.append((now(self.h.device), self._open()))
        begun = len(marks)
        while len(marks) < begun + TRIAL_ROUNDS and len(self.rows):
            self.round()
            marks.append((now(self.h.device), self._open()))
        by_step = _pace(marks[1 : TRIAL_STEPS + 1])
        by_round = _pace(marks[begun:])
        return "sequential" if by_step < MARGIN * by_round else "drafted"

    def _open(self) -> float:
        """Positions that are not believed yet, mean over the rows."""
        return sum(self.num_positions - at for at in self.front) / len(self.done_h)


def _leading(changes: list[float], most: float) -> int:
    """How many values from the first on are at most `most`; NaN is not."""
    return next((i for i, change in enumerate(changes) if not change <= most), len(changes))


def _pace(marks: list[tuple[float, float]]) -> float:
    """Seconds per position between the first and the last of (time, positions left)."""
    if len(marks) < 2 or marks[0][1] <= marks[-1][1]:
        return 0.0
    return (marks[-1][0] - marks[0][0]) / (marks[0][1] - marks[-1][1])
