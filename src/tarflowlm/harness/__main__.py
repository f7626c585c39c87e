"""`python -m tarflowlm.harness`: the command line of lm-eval, to which `--model tarflowlm` is
known.
"""

import sys

import torch

from tarflowlm.errors import UserError
from tarflowlm.harness.register import run_lm_eval


def main() -> None:
    """Entry point: exit status 2 and one line for what the user got wrong."""
    torch.set_flush_denormal(
        True
    )  # denormal numbers make these densities many times slower on CPUs
    try:
        run_lm_eval(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"tarflowlm: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
