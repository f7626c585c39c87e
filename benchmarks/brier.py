"""BrierLM (Shao et al. 2025, arXiv 2510.27688): a score of two samples, without likelihoods.

    python benchmarks/brier.py english-small-ar english-small          # 4,096 contexts each
    python benchmarks/brier.py english-mini-ar english-mini --contexts 256

For a context whose next n tokens are y, and two independent samples x, x' of n tokens from the
model at temperature 1,

    Brier-n = E[ 1(x = y) + 1(x' = y) - 1(x = x') ] = E[ 2 p(y) - sum_x p(x)^2 ],

which is largest for the true law, and at most 1. BrierLM is 100 times the geometric mean of
Brier-1 to Brier-4. The contexts are evenly spaced in the test split, each as long as the trained
context allows. The standard error is that of 1,000 bootstraps of the contexts.

n-grams are of a model's own tokens: compare models with the same tokenizer. Beside it stands the
bound, or the exact value, in bits per character, of the same contexts with their next tokens.
"""

import argparse

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tarflowlm.data import encode_text, eval_windows
from tarflowlm.evaluation.likelihood import evaluate, sign_of
from tarflowlm.generation import generate
from tarflowlm.pretrained import load

N = 4  # the longest n-gram
ROWS = 128  # contexts at once


def brier(
    x: Int[Tensor, "C n"], other: Int[Tensor, "C n"], y: Int[Tensor, "C n"]
) -> Float[Tensor, "C n"]:
    """The estimate of Brier-1, ..., Brier-n at every context, from two samples."""

    def equal(a: Tensor, b: Tensor) -> Bool[Tensor, "C n"]:
        return (a == b).cummin(1).values

    hits = equal(x, y).double() + equal(other, y).double()
    return hits - equal(x, other).double()


def brier_lm(values: Float[Tensor, "... C n"]) -> Float[Tensor, "..."]:
    """100 times the geometric mean of the means over contexts; 0 if one of them is not positive."""
    return 100 * values.mean(-2).clamp_min(0).log().mean(-1).exp()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="run directories or shipped models")
    parser.add_argument("--contexts", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    print("| model | bits per character | Brier-1 | Brier-2 | Brier-3 | Brier-4 | BrierLM |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in args.models:
        lm = load(name)
        model, tokenizer = lm.model, lm.tokenizer
        tokens = encode_text(lm.run.data, tokenizer, "test")
        windows = eval_windows(tokens, model.config.context, args.contexts)
        generator = torch.Generator().manual_seed(args.seed)
        found = []
        for some in windows.split(ROWS):
            given, y = some[:, :-N], some[:, -N:]
            drawn = generate(
                model,
                num_tokens=some.shape[1],
                num=2 * len(some),
                prompt=given.repeat(2, 1),
                generator=generator,
            ).tokens[:, -N:]
            x, other = drawn.cpu().chunk(2)
            found.append(brier(x, other, y))
        values = torch.cat(found)
        resampled = torch.randint(len(values), (1000, len(values)), generator=generator)
        spread = torch.stack([brier_lm(values[rows]) for rows in resampled]).std().item()
        lengths = torch.from_numpy(tokenizer.characters_per_token)
        likelihood = evaluate(model, windows, lengths, seed=args.seed)
        cells = [f"`{name}`", f"{sign_of(likelihood.bound)} {likelihood.bpc:.4f}"]
        cells += [f"{100 * value:.2f}" for value in values.mean(0).tolist()]
        print(f"| {' | '.join(cells)} | {brier_lm(values).item():.2f} ± {spread:.2f} |", flush=True)


if __name__ == "__main__":
    main()
