"""`python -m tarflowlm.compiled` compiles all functions for this processor."""

import os

from tarflowlm import compiled

if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(19)
    compiled.prepare()
