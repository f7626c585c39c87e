"""Sampling from either model: free, after a prompt, or around given tokens.

Read `generate_plainly` first: a free text needs nothing else. Then read `plan`, `Writer` and
`decoder`.
"""

from tarflowlm.generation.generate import generate, generate_plainly
from tarflowlm.generation.sampling import BLANK, Evidence, Generation
from tarflowlm.generation.write import Writer, write

__all__ = ["BLANK", "Evidence", "Generation", "Writer", "generate", "generate_plainly", "write"]
