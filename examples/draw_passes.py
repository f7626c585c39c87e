"""Draw the latents of a sample after every pass, in the plane of the codebook.

    python examples/draw_passes.py [MODEL] [OUT.png]      # english-passes, passes.png

It needs the extra `plots`.
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import tarflowlm
from tarflowlm.model import as_flow

# the sample of `tarflowlm sample english-passes --length 96 --passes --seed 0`
LENGTH = 96
SEED = 0
TEMPERATURE = 0.8
INK, ACCENT, PALE = "#1d2a3a", "#e07a5f", "#dbe2ea"


def main(name: str = "english-passes", out: str = "passes.png") -> None:
    lm, tokenizer = tarflowlm.load(name)
    model = as_flow(lm)
    generator = torch.Generator().manual_seed(SEED)
    result = tarflowlm.generate(
        model, num_tokens=LENGTH, temperature=TEMPERATURE, generator=generator
    )
    states, passes = result.states(model), result.passes(model)
    mean, std = model.codebook.mean.detach(), model.codebook.log_std.detach().exp()
    # the two principal components of the codebook
    plane = torch.linalg.svd(mean - mean.mean(0)).Vh[:2].T
    codes = (mean - mean.mean(0)) @ plane
    num = len(passes)
    titles = ["noise u", *(f"block {block} inverted" for block in range(num - 1, 0, -1))]
    figure, grid = plt.subplots(
        1, num, figsize=(5.2 * num, 5.6), sharex=True, sharey=True, squeeze=False
    )
    final = passes[-1][0]
    for axes, title, state, tokens in zip(grid.flat, titles, states, passes, strict=False):
        for (x, y), radius, symbol in zip(
            codes.tolist(), std.tolist(), tokenizer.symbols, strict=True
        ):
            axes.add_patch(plt.Circle((x, y), 2 * radius, color=PALE, lw=0))
            axes.text(
                x,
                y,
                symbol.replace(" ", "␣"),
                color=INK,
                ha="center",
                va="center",
                fontsize=11,
                zorder=4,
            )
        points = (state[0] - mean.mean(0)) @ plane
        axes.scatter(*points.T, s=42, color=ACCENT, alpha=0.55, lw=0, zorder=3)
        share = (tokens[0] == final).double().mean().item()
        axes.set_title(f"{title}: {share:.0%} of the final text", color=INK, fontsize=13)
        line = tokenizer.decode(tokens[0].tolist())
        axes.set_xlabel(f"{line[:48]}\n{line[48:]}", family="monospace", fontsize=9.5, color=INK)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(PALE)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
