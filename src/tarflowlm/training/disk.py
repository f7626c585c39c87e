"""A full disk, in one line."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tarflowlm.errors import UserError
from tarflowlm.runs.checkpoint import CONFIG

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def told_when_full(directory: Path) -> Iterator[None]:
    """Turns whatever a full disk raised, here or in a library, into a UserError that says how to go on."""
    try:
        yield
    except BaseException as error:
        reason = _full(error)
        if reason is None:
            raise
        begun = (directory / CONFIG).exists()
        remedy = f"go on with `tarflowlm train --resume {directory}`" if begun else "start it again"
        raise UserError(
            f"cannot write to {directory} ({reason}): what was saved before is kept; make room and {remedy}"
        ) from error


def _full(error: BaseException | None) -> str | None:
    """What the system says, where `error` comes from a full disk or quota or too large a file."""
    if error is None:
        return None
    # safetensors says the number in its text alone
    in_text = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(in_text[1]) if in_text else None
    if number in FULL:
        return os.strerror(number)
    # torch.distributed.checkpoint collects the errors of its processes
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()]
    inner = (_full(e) for e in (error.__cause__, error.__context__, *failures))
    return next((reason for reason in inner if reason is not None), None)
