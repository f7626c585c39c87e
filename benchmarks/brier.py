"""BrierLM (Shao et al. 2025, arXiv 2510.27688): a score of two samples, without likelihoods.

    python benchmarks/brier.py stories-ar stories                        # 4,096 contexts
    python benchmarks/brier.py english-mini-ar english-mini --contexts 256
    python benchmarks/brier.py english-mini-ar --peers runs/peers      # and the models of peers.py

For a context whose next n tokens are y, and two independent samples x, x' of n tokens from the
model at temperature 1,

    Brier-n = E[ 1(x = y) + 1(x' = y) - 1(x = x') ] = E[ 2 p(y) - sum_x p(x)^2 ],

which is largest for the true law, and at most 1. BrierLM is 100 times the geometric mean of
Brier-1 to Brier-4. The contexts are evenly spaced in the test split, each as long as the trained
context allows, so they overlap, but the tokens after them do not. The standard error is that of
1,000 bootstraps of the contexts.

n-grams are of a model's own tokens: compare models with the same tokenizer. Beside it stands the
bound, or the exact value, in bits per character, of the same contexts with their next tokens.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tarflowlm.data import encode_text
from tarflowlm.data.windows import sliding_windows
from tarflowlm.evaluation.likelihood import bits, evaluate, sign_of
from tarflowlm.generation import generate
from tarflowlm.pretrained import Pretrained, load

Draw = Callable[[Tensor], Tensor]
"""From given tokens [C, T] to a sample of the next N, [C, N]."""
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


def of_model(lm: Pretrained, windows: Tensor, seed: int) -> tuple[Draw, str]:
    """How a model goes on after given tokens, and its bits per character of the windows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(given: Tensor) -> Tensor:
        length = given.shape[1] + N
        return generate(
            lm.model, num_tokens=length, num=len(given), prompt=given, generator=generator
        ).tokens[:, -N:]

    lengths = torch.from_numpy(lm.tokenizer.characters_per_token)
    found = evaluate(lm.model, windows, lengths, seed=seed)
    return draw, f"{sign_of(found.bound)} {found.bpc:.4f}"


def of_peers(folder: Path, lm: Pretrained, windows: Tensor) -> dict[str, tuple[Draw, str]]:
    """The same of the peers in `folder`, whose tokens are characters, as those of `lm`."""
    from peers import load_peers  # beside this file

    found = {}
    for name, peer in load_peers(folder, lm.config).items():
        nats = peer.nats_of_windows(windows).mean().item()
        sign = "=" if peer.is_exact else "<="
        found[name] = partial(peer.go_on, num=N), f"{sign} {bits(nats):.4f}"
    return found


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="run directories or shipped models")
    parser.add_argument("--peers", type=Path, help="weights of peers.py, like the first model")
    parser.add_argument("--contexts", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)  # of the peers
    generator = torch.Generator().manual_seed(args.seed)
    print("| model | bits per character | Brier-1 | Brier-2 | Brier-3 | Brier-4 | BrierLM |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in args.models:
        lm = load(name)
        if lm.config.context <= N:
            raise SystemExit(f"{name} has a context of {lm.config.context}: give one above {N}")
        tokens = encode_text(lm.run.data, lm.tokenizer, "test")
        # a window ends every few tokens, but the scored tokens of two never overlap
        most = len(tokens) - lm.config.context
        stride = min(max(N, most // args.contexts), lm.config.context)
        windows = sliding_windows(tokens, lm.config.context, stride, args.contexts)[0]
        contenders = {name: of_model(lm, windows, args.seed)}
        if args.peers is not None and name == args.models[0]:
            contenders |= of_peers(args.peers, lm, windows)
        for contender, (draw, likelihood) in contenders.items():
            found = []
            for some in windows.split(ROWS):
                given, y = some[:, :-N], some[:, -N:]
                x, other = draw(given.repeat(2, 1)).cpu().chunk(2)
                found.append(brier(x, other, y))
            values = torch.cat(found)
            resampled = torch.randint(len(values), (1000, len(values)), generator=generator)
            spread = torch.stack([brier_lm(values[rows]) for rows in resampled]).std().item()
            cells = [f"`{contender}`", likelihood]
            cells += [f"{100 * value:.2f}" for value in values.mean(0).tolist()]
            cells.append(f"{brier_lm(values).item():.2f} ± {spread:.2f}")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
