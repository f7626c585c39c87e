"""`python -m tarflowlm.harness`: the command line of lm-eval, which knows `--model tarflowlm`."""

import sys

import torch

from tarflowlm.errors import UserError
from tarflowlm.harness.register import run_lm_eval


def main() -> None:
    """Entry point: exit status 2 and one line for what the user got wrong."""
    # denormal numbers make these densities many times slower on CPUs
    torch.set_flush_denormal(True)
    try:
        run_lm_eval(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"tarflowlm: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
