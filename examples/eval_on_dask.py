"""Evaluate a model in parts on the workers of Dask, and print what one process would.

python examples/eval_on_dask.py 8 english-mini --data tales --samples 4

Here the workers are processes of this machine. For those of a cluster, first make a
`dask.distributed.Client`, leave `scheduler` out, and let every worker read the same files.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import dask


def tarflowlm(*words: str) -> str:
    """The output of a command."""
    command = [sys.executable, "-m", "tarflowlm", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def evaluate(num_parts: int, *words: str) -> str:
    """The table that `tarflowlm eval WORDS` prints, from parts that Dask distributes."""
    parts = [f"{number}/{num_parts}" for number in range(1, num_parts + 1)]
    work = [dask.delayed(tarflowlm)("eval", *words, "--part", part) for part in parts]
    found = dask.compute(*work, scheduler="processes", num_workers=num_parts)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.json" for number in range(num_parts)]
        for file, text in zip(files, found, strict=True):
            file.write_text(text, encoding="utf-8")
        return tarflowlm("eval", *words, "--merge", *map(str, files))


if __name__ == "__main__":
    print(evaluate(int(sys.argv[1]), *sys.argv[2:]))
