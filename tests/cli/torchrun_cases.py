"""Several commands in the processes that torchrun starts once, since importing torch takes the
longest.
"""

import contextlib
import io
import json
import os
import sys

from tarflowlm.cli.main import main


def run(commands: list[list[str]]) -> None:
    """Run commands one after the other; the first process prints what each of them prints."""
    printed = []
    for number, argv in enumerate(commands):
        # every command makes a group of its own, as after a restart
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            main(argv)
        printed.append(out.getvalue())
    if os.environ["RANK"] == "0":
        print(json.dumps(printed))


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
