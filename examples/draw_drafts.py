"""Tokens final per pass of block 1 against the time that drafts were trained, from their logs.

python examples/draw_drafts.py OUT.png RUN [RUN ...]      # runs with a folder draft/; needs the extra `plots`
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#1d2a3a", "#e07a5f", "#3d8b7d", "#8a6fb3", "#c9a227")


def main(out: str, *runs: str) -> None:
    figure, axes = plt.subplots(figsize=(7.0, 4.2))
    for run, colour in zip(runs, COLOURS, strict=False):
        folder = Path(run) / "draft"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        measured = [line for line in lines if line["split"] == "valid"]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        minutes, tokens = zip(*((m["seconds"] / 60, m["tokens_per_pass"]) for m in measured), strict=True)
        label = f"{Path(run).name}: width {config['width']}, hidden {config['hidden']}"
        axes.plot(minutes, tokens, color=colour, marker="o", ms=3, lw=1.4, label=label)
        axes.annotate(f"{tokens[-1]:.2f}", (minutes[-1], tokens[-1]), xytext=(5, -3), textcoords="offset points")
    axes.axhline(1.0, color="#9aa5b1", lw=1, ls=":")
    axes.set(xlabel="minutes of training", ylabel="tokens final per pass", ylim=(0.9, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
