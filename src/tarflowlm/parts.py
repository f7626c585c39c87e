"""A share of a work, for an array of processes: `--part 3/8` is the third of eight."""

import re

from tarflowlm.errors import UserError

WHOLE = "1/1"


def share(part: str, total: int) -> range:
    """The neighbours among 0 .. total - 1 that are in a part. UserError unless it is "I/N"."""
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"part {part}: give it as I/N, say 1/8 for the first of eight")
    return range(total * (number - 1) // count, total * number // count)
