"""Draw a story with three gaps, each filled in the four likeliest ways, with their shares.

    python examples/draw_gaps.py [MODEL] [OUT.png]      # stories, stories.png

One gap is open at a time, and the rest of the story is given. The weight of a try is its evidence,
as in the studio. It needs the extra `plots`.
"""

import sys
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import tarflowlm
from tarflowlm.generation.texts import Samples
from tarflowlm.model import LanguageModel
from tarflowlm.pretrained import Pretrained
from tarflowlm.requests import Writing
from tarflowlm_apps.studio.write import shares_of, weights_of

STORY = (
    "One day, Lily found ",
    "a small key",
    " in the garden. She wanted to ",
    "open the old box",
    " with it. Her mom said, ",
    '"Be careful, Lily!"',
    " Then they went home together, and they were very happy.",
)
"""Given words, and words that become a gap, by turns."""
TRIES, PARTICLES, SHOWN, WIDTH = 96, 8, 4, 96
INK, ACCENTS, PALE = "#1d2a3a", ("#e07a5f", "#3d8b7d", "#5b6fb5"), "#dbe2ea"


def fillings(lm: Pretrained[LanguageModel], place: int) -> list[tuple[str, float]]:
    """The likeliest words for the gap at `place`, with their shares."""
    before, after = "".join(STORY[:place]), "".join(STORY[place + 1 :])
    request = Writing(template=f"{before}[...]{after}", num=TRIES, particles=PARTICLES)
    batches = list(Samples(request, lm).batches())
    texts = (text for batch in batches for text in batch.texts)
    found = (text.removeprefix(before).removesuffix(after).strip() for text in texts)
    return shares_of(found, weights_of(batches))[:SHOWN]


def main(name: str = "stories", out: str = "stories.png") -> None:
    lm = tarflowlm.load(name)
    figure, axes = plt.subplots(figsize=(11, 4.1))
    axes.set(xlim=(0, 100), ylim=(-8, 100))
    axes.axis("off")
    text = "".join(f"[ {place // 2 + 1} ]" if place % 2 else STORY[place] for place in range(7))
    axes.text(0, 100, textwrap.fill(text, WIDTH), va="top", fontsize=14, color=INK, linespacing=1.6)
    for column, accent in enumerate(ACCENTS):
        left = 34 * column
        axes.text(left, 63, f"gap {column + 1}", fontsize=13, color=accent, weight="bold")
        for row, (words, share) in enumerate(fillings(lm, 2 * column + 1)):
            at = 52 - 16 * row
            axes.text(left, at, textwrap.shorten(words, 38), fontsize=12, color=INK, va="center")
            axes.barh(at - 6.5, 25, left=left, height=2.4, color=PALE)
            axes.barh(at - 6.5, 25 * share, left=left, height=2.4, color=accent)
            axes.text(left + 26, at - 6.5, f"{share:.0%}", fontsize=11, color=accent, va="center")
    figure.tight_layout()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
