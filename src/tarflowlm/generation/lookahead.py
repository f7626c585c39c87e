"""How many positions to draft in a round: as many as pay, by what was accepted and what passes cost so far."""

from collections.abc import Sequence

PRIOR_RATE, PRIOR_TRIALS = 0.5, 4.0
"""Before there is any experience: the share of drafts that are right, and how many trials this counts for."""
PRIOR_POSITIONS = 32.0
"""And: a pass costs as much as this many positions before it has a single one. Dispatch of small operations."""
PRIOR_DRAFT = 0.07
"""And: a draft costs this share of that."""
MEMORY = 0.95
"""Weight of the experience of a round, relative to that of the next one."""
OPEN_PASSES = 2
"""Further passes that cover a position whose token was guessed right, until its latents no longer change."""


class Lookahead:
    """Chooses the number W of drafts that gives the most tokens per second.

    A draft counts only if all drafts before it were right, so a round over W of them is worth 1 + s_1 + ... + s_W
    tokens a row, with s_i the product of the shares p_j, j <= i, of drafts at offset j that were right after right
    ones. A pass over n positions of B rows takes the time base + slope B n, fitted to the passes so far; n is W + 1,
    and the positions of the last rounds that are still open.
    """

    def __init__(self, ahead: int) -> None:
        """At most `ahead` drafts a round."""
        self.hits = [PRIOR_RATE * PRIOR_TRIALS] * ahead
        self.trials = [PRIOR_TRIALS] * ahead
        self.moments = [0.0] * 5
        """Sums over past passes of 1, x, x x, t and x t, with x = B n and t its time."""
        self.drafting = 0.0
        """Seconds of a draft."""

    def accepted(self, drafted: int, counts: Sequence[int]) -> None:
        """Record how many of `drafted` drafts were right from the first on, in each row."""
        for count in counts:
            for i in range(min(count + 1, drafted)):
                self.trials[i] += 1
                self.hits[i] += i < count

    def took(self, seconds: float, positions: int) -> None:
        """Record the time of a pass over `positions` in all rows together."""
        new = (1.0, positions, positions * positions, seconds, positions * seconds)
        self.moments = [MEMORY * old + value for old, value in zip(self.moments, new, strict=True)]

    def drafted(self, seconds: float) -> None:
        """Record the time of one draft."""
        self.drafting = MEMORY * self.drafting + (1 - MEMORY) * seconds if self.drafting else seconds

    def costs(self) -> tuple[float, float, float]:
        """What a pass costs before its first position, what a position costs, and what a draft does."""
        count, x, xx, t, xt = self.moments
        if not count or not t > 0:
            return PRIOR_POSITIONS, 1.0, PRIOR_DRAFT * PRIOR_POSITIONS
        # the prior: one observation each at 0 and at twice the mean, on the line through the mean of all passes
        mean = x / count
        unit = t / count / (PRIOR_POSITIONS + mean)
        for at in (0.0, 2 * mean):
            value = unit * (PRIOR_POSITIONS + at)
            count, x, xx, t, xt = count + 1, x + at, xx + at * at, t + value, xt + at * value
        slope = max((count * xt - x * t) / max(count * xx - x * x, 1e-30), 0.0)
        base = max((t - slope * x) / count, 0.0)
        return base, slope, self.drafting or PRIOR_DRAFT * base

    def choose(self, rows: int) -> int:
        """W for `rows` rows."""
        base, slope, drafting = self.costs()
        tokens = chance = 1.0
        best, speed = 1, 0.0
        for W, (hits, trials) in enumerate(zip(self.hits, self.trials, strict=True), 1):
            chance *= hits / trials
            tokens += chance
            positions = 1 + W + OPEN_PASSES * (tokens - 1)
            now = tokens / (base + drafting * W + slope * rows * positions)
            if now > speed:
                best, speed = W, now
        return best
