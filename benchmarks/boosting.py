"""A second block on a trained and frozen model: its gain, and the time it takes.

    python benchmarks/boosting.py english-small --steps 400

MODEL is the baseline, or a flow whose block 1 is tied Mix-d; its own text is used. Block 2 reads
the text and redoes the map of block 1 with new weights (eq. 12b of docs/math.md), as the recipe
`cipher` trains it: first its Transformer by a head, then its map. Prints bits per character on test
windows by block 1, by the head alone and by both blocks, and the gain with its standard error.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # `reproduction` lies beside this folder

from reproduction.boosting import Below, evaluate
from reproduction.cipher import second_blocks
from tarflowlm.data import eval_windows, prepare_corpus
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.terminal.bars import Bars


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="run directory or shipped model")
    parser.add_argument("--steps", type=int, default=400, help="steps of the reader and of the map")
    parser.add_argument("--layers", type=int, default=2, help="layers of block 2")
    parser.add_argument("--windows", type=int, default=256, help="test windows")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    checkpoint = load_checkpoint(args.model)
    run, tokenizer = checkpoint.run, checkpoint.tokenizer
    below = Below(checkpoint.model)
    began = time.monotonic()
    with Bars() as bars:

        def stage(what: str, steps: int) -> Bars:
            bars.stage(what, steps)
            return bars

        [(_, upper)] = second_blocks(
            checkpoint,
            below,
            "text",
            ["redo"],
            layers=args.layers,
            steps=args.steps,
            valid_windows=64,
            stage=stage,
        )
    corpus = prepare_corpus(run.data, tokenizer)
    windows = eval_windows(corpus.split("test"), run.model.context, args.windows)
    characters = torch.from_numpy(tokenizer.characters_per_token)[windows].double().mean().item()
    found = evaluate(below, upper, windows)
    parts = {"block 1": found.below, "head of block 2": found.by_head, "both blocks": found.both}
    for name, bits in parts.items():
        print(f"{name}: {bits.mean().item() / characters:.4f} bits per character")
    gain, error = (value / characters for value in found.gain)
    minutes = (time.monotonic() - began) / 60
    print(f"gain {gain:.4f} +- {error:.4f}, {args.steps} steps each, {minutes:.0f} minutes in all")


if __name__ == "__main__":
    main()
