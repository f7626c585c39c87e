"""A frozen model of one text, and a block above it that learns another text.

    python benchmarks/boosting.py english-small-ar tinyshakespeare.txt --steps 350

MODEL is a baseline, or a flow whose block 1 is tied Mix-d, and stays as it is. Block 2 has a small
Transformer that reads the new text and block 1's features. It redoes the map of block 1 with other
weights (eq. 12b of docs/math.md): with those of its head, or with block 1's times these. Before it
the whole model is tuned (`tarflowlm train --from`) for --steps, and each block 2 has as much time
of one core. The text is Tiny Shakespeare, for one (benchmarks/shakespeare.py says where it is).

Prints bits per character of the test split of the new text, and of the validation split of the
model's own text, which training may make it forget. Without block 2 the model is as before. Then a
text of one noise, through block 1 alone and through both blocks.
"""

import argparse
import logging
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # `reproduction` lies beside this folder

from reproduction.boosting import Below, Reader, Weights, evaluate, fit, write
from tarflowlm.config import RunConfig
from tarflowlm.data import eval_windows, prepare_corpus
from tarflowlm.evaluation import likelihood
from tarflowlm.runs.checkpoint import Checkpoint, load_checkpoint
from tarflowlm.terminal.bars import Bars
from tarflowlm.training.configure import tuning
from tarflowlm.training.train import train

LENGTH = 64  # tokens of the text of one noise
ADDS = {"block 2, w' = its head": False, "block 2, w' = w times its head": True}


def new_block(below: Below, run: RunConfig, layers: int, *, adds: bool) -> Weights:
    reader = Reader(below, run.model.trunk, layers=layers, reads="text, features")
    return Weights(reader, below.codebook.vocab_size, adds=adds)


def trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def tuned(parent: Checkpoint, run: RunConfig) -> tuple[Checkpoint, float]:
    """The whole model after the run, and the minutes of one core that it took."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train(run, out, device=torch.device("cpu"), parent=parent)
        minutes = (time.process_time() - began) / 60
        return load_checkpoint(out), minutes


def texts_of_one_noise(below: Below, block: Weights) -> list[Tensor]:
    """Tokens [T] by block 1 alone and by both blocks."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, LENGTH, below.channels, generator=generator)
    return [below.codebook.decode(write(below, one, noise))[0] for one in (None, block)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="run directory or shipped model")
    parser.add_argument("text", help="the new text, a file")
    parser.add_argument("--steps", type=int, default=350, help="optimiser steps of tuning")
    parser.add_argument("--layers", type=int, default=2, help="layers of block 2")
    parser.add_argument("--lr", type=float, default=6e-3, help="peak rate of block 2")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--windows", type=int, default=256, help="windows of each text, at most")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)

    parent = load_checkpoint(args.model)
    tokenizer, context = parent.tokenizer, parent.run.model.context
    below = Below(parent.model)
    tune = tuning(parent, args.text, steps=args.steps)
    corpus = prepare_corpus(tune.data, tokenizer)
    own = prepare_corpus(parent.run.data, tokenizer)
    lengths = torch.from_numpy(tokenizer.characters_per_token)
    texts = [
        eval_windows(corpus.split("test"), context, args.windows),
        eval_windows(own.split("valid"), context, args.windows),
    ]
    per_character = [1 / lengths[windows].double().mean().item() for windows in texts]

    def show(
        name: str, seed: int | str, parameters: int, minutes: float, bits: list[float]
    ) -> None:
        numbers = f"{parameters:,} | {minutes:.1f} | {bits[0]:.4f} | {bits[1]:.4f}"
        print(f"| {name} | {seed} | {numbers} |", flush=True)

    columns = ("", "seed", "trained parameters", "minutes", Path(args.text).stem)
    print(f"| {' | '.join(columns)} | {parent.run.data.source} |\n|{' --- |' * 6}")
    before = [likelihood.evaluate(parent.model, windows, lengths).bpc for windows in texts]
    show(args.model, "", 0, 0.0, before)
    boosted: Weights | None = None
    for seed in range(args.seeds):
        # another copy, because the parent is frozen as block 1
        other, minutes = tuned(load_checkpoint(args.model), replace(tune, seed=seed))
        found = [likelihood.evaluate(other.model, windows, lengths).bpc for windows in texts]
        show("all of the model tuned", seed, trainable(other.model), minutes, found)
        run = replace(
            tune,
            seed=seed,
            optim=replace(tune.optim, lr=args.lr),
            train=replace(tune.train, minutes=minutes),
        )
        for name, adds in ADDS.items():
            with Bars() as bars:
                bars.stage(f"{name}, seconds", round(60 * minutes))
                make = partial(new_block, below, run, args.layers, adds=adds)
                block = fit(make, below, corpus, run, bars)
            found = [evaluate(below, block, windows).both.mean().item() for windows in texts]
            bits = [value * rate for value, rate in zip(found, per_character, strict=True)]
            show(name, seed, trainable(block), minutes, bits)
            boosted = block
    if boosted is not None:
        alone, both = texts_of_one_noise(below, boosted)
        print(f"\nOne noise, through block 1 alone:\n\n{tokenizer.decode(alone.tolist())}")
        print(f"\nand through both blocks:\n\n{tokenizer.decode(both.tolist())}")


if __name__ == "__main__":
    main()
