"""How many positions to draft in a round: as many as pay, by what was accepted and what passes cost so far."""

from collections.abc import Sequence

PRIOR_RATE, PRIOR_TRIALS = 0.5, 4.0
"""Before there is any experience: the share of drafts that are right, and how many trials this counts for."""
PRIOR_POSITIONS = 32.0
"""And: a pass costs as much as this many positions before it has a single one. Dispatch of small operations."""
MEMORY = 0.95
"""Weight of the experience of a round, relative to that of the next one."""


class Lookahead:
    """Chooses the number W of drafts that gives the most tokens per second.

    A draft counts only if all drafts before it were right, so a round over W of them is worth 1 + s_1 + ... + s_W
    tokens a row, with s_i the product of the shares p_j, j <= i, of drafts at offset j that were right after right
    ones. A pass over n positions of B rows takes the time base + slope B n, fitted to the passes so far.
    """

    def __init__(self, ahead: int) -> None:
        """At most `ahead` drafts a round."""
        self.hits = [PRIOR_RATE * PRIOR_TRIALS] * ahead
        self.trials = [PRIOR_TRIALS] * ahead
        self.moments = [0.0] * 5
        """Sums over past passes of 1, x, x x, t and x t, with x = B n and t its time."""

    def accepted(self, drafted: int, counts: Sequence[int]) -> None:
        """Record how many of `drafted` drafts were right from the first on, in each row."""
        for count in counts:
            for i in range(min(count + 1, drafted)):
                self.trials[i] += 1
                self.hits[i] += i < count

    def took(self, seconds: float, positions: int) -> None:
        """Record the time of a round with a pass over `positions` in all rows together."""
        new = (1.0, positions, positions * positions, seconds, positions * seconds)
        self.moments = [MEMORY * old + value for old, value in zip(self.moments, new, strict=True)]

    def base(self) -> float:
        """What a pass costs before its first position, in positions."""
        count, x, xx, t, xt = self.moments
        if not count or not t > 0:
            return PRIOR_POSITIONS
        # the prior: one observation each at 0 and at twice the mean, on the line through the mean of all passes
        mean = x / count
        unit = t / count / (PRIOR_POSITIONS + mean)
        for at in (0.0, 2 * mean):
            value = unit * (PRIOR_POSITIONS + at)
            count, x, xx, t, xt = count + 1, x + at, xx + at * at, t + value, xt + at * value
        slope = (count * xt - x * t) / max(count * xx - x * x, 1e-30)
        if not slope > 0:
            return 1e6
        return max((t - slope * x) / count / slope, 1.0)

    def choose(self, rows: int, others: int) -> int:
        """W for `rows` rows, in a pass that has `others` positions in each row besides."""
        base, tokens, chance = self.base(), 1.0, 1.0
        best, speed = 0, tokens / (base + rows * (others + 1))
        for i, (hits, trials) in enumerate(zip(self.hits, self.trials, strict=True)):
            chance *= hits / trials
            tokens += chance
            now = tokens / (base + rows * (others + i + 2))
            if now > speed:
                best, speed = i + 1, now
        return best
