"""Two models on the same windows of a text: the difference of their bits per character.

    python -m reproduction.paired stories stories-ar stories
    python -m reproduction.paired stories stories-ar my_text.txt 64

The last argument is a number of windows, which are evenly spaced. The standard error is that of the
mean difference over the windows. It describes the choice of text, not that of the seed.
"""

import sys

import torch

import tarflowlm
from reproduction.measures import mean_of
from tarflowlm.evaluation.likelihood import bits, log_weights
from tarflowlm.evaluation.scores import read_windows
from tarflowlm.requests import Evaluation


def main(first: str, second: str, data: str, limit: str = "0") -> None:
    """Prints the bits of both models, and their difference with its standard error."""
    models = [tarflowlm.load(name) for name in (first, second)]
    windows = read_windows(Evaluation(data, windows=int(limit) or None), models[0]).windows
    characters = torch.from_numpy(models[0].tokenizer.characters_per_token)[windows].sum(1)
    a, b = (bits(-log_weights(lm.model, windows, samples=1, seed=0)[0]) for lm in models)
    of_window = mean_of((a - b) / characters.double().mean())
    total = characters.sum().item()
    sys.stdout.write(
        f"{first} {a.sum().item() / total:.4f}, {second} {b.sum().item() / total:.4f} bits per "
        f"character, {len(windows)} windows of {data}; difference {of_window.mean:.4f} +- "
        f"{of_window.std:.4f}\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
