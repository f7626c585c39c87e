"""`tarflowlm` in a worker of torchrun that breaks once: MARK PLACE ARGUMENTS...

The file MARK says that it has happened, so the restarted worker goes on.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from tarflowlm.cli.main import main
from tarflowlm.training import checkpoint, train


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def finds_the_disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


PLACES: dict[str, tuple[Any, str, int, int, Callable[[], None]]] = {
    "validation": (train, "validate", 1, 3, dies),
    "end of a stage": (train, "leave_stage", 1, 1, dies),
    "start of a state": (checkpoint, "save_shards", 1, 3, dies),
    "end of a state": (checkpoint, "write_manifest", 0, 3, dies),
    "full disk": (checkpoint, "save_shards", 0, 3, finds_the_disk_full),
}
"""Module, function, the process that breaks in it, at which call, and how."""


def break_once(mark: Path, place: str) -> None:
    module, name, rank, at, breaks = PLACES[place]
    function, calls = getattr(module, name), count(1)

    def broken(*args: Any, **options: Any) -> Any:
        if next(calls) == at and int(os.environ["RANK"]) == rank and not mark.exists():
            mark.touch()
            breaks()
        return function(*args, **options)

    setattr(module, name, broken)


if __name__ == "__main__":
    break_once(Path(sys.argv[1]), sys.argv[2])
    main(sys.argv[3:])
