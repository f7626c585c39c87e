"""Draw texts with a box around the letters that one call of the model gave.

    python examples/draw_drafts.py [FOLDER] [MODEL ...]    # FOLDER/drafts.png of two shipped models

It needs the extra `plots`, and models that write letters.
"""

import sys
from pathlib import Path

from PIL import Image

import tarflowlm
from tarflowlm.generation.texts import Samples
from tarflowlm.requests import Writing
from tarflowlm_apps.report.style import COLOURS, MUTED, Axes, Figure, render
from tarflowlm_apps.studio.pieces import SHADES

LENGTH, WIDTH, SEED = 256, 64, 0
STRENGTHS = dict(zip((1, *SHADES), (0.0, 0.14, 0.3, 0.5), strict=True))
"""Strength of the colour by the least number of letters."""
SAID = """A box is one call of the model: letters on blue, guessed by a small table and found right,
and one letter of its own. Without guesses the text is the same, with a call for every letter."""
LOOK = {"family": "DejaVu Sans Mono", "size": 13.5, "ha": "center", "va": "center"}


def draw_text(axes: Axes, pieces: list[str]) -> None:
    """A text in lines of WIDTH letters, with a box for every piece."""
    axes.set(xlim=(0, WIDTH), ylim=(0.55 - LENGTH / WIDTH, 0.5))
    axes.axis("off")
    for place, letter in enumerate("".join(pieces)):
        axes.text(place % WIDTH + 0.5, -(place // WIDTH) - 0.04, letter, **LOOK)
    end = 0
    for piece in pieces:
        start, end = end, end + len(piece)
        shade = max(strength for least, strength in STRENGTHS.items() if len(piece) >= least)
        for line in range(start // WIDTH, (end - 1) // WIDTH + 1):
            left, own, right = (min(max(x - line * WIDTH, 0), WIDTH) for x in (start, end - 1, end))
            axes.barh(-line, own - left, 0.84, left, color=COLOURS[0], alpha=shade, lw=0)
            left, right = left + 0.06, right - 0.06
            axes.barh(-line, right - left, 0.84, left, color="none", edgecolor=COLOURS[0], lw=0.8)


def main(folder: str = ".", *names: str) -> None:
    def draw(figure: Figure) -> None:
        chosen = names or ("english-mini-ar", "english-mini")
        panels = figure.subplots(len(chosen), squeeze=False).flat
        for axes, name in zip(panels, chosen, strict=True):
            samples = Samples(Writing(num_tokens=LENGTH, seed=SEED), tarflowlm.load(name))
            pieces = [piece for piece in samples.pieces() if piece]
            many = f"{LENGTH} letters in {len(pieces)} calls, {LENGTH / len(pieces):.1f} a call"
            axes.set_title(f"{name}: {many}", weight="bold")
            draw_text(axes, pieces)
        figure.supxlabel(SAID, size=9.5, color=MUTED, x=0.01, ha="left")

    picture = Path(folder) / "drafts.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    render(draw, picture.stem, picture.parent, width=8, height=3.4)
    Image.open(picture).convert("RGB").quantize(24).save(picture, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
