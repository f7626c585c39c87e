"""Samples of models by temperature and top-p: known words, repetitions, and ends.

    python examples/spelled_words.py stories stories-ar          # five minutes

A word is a run of letters; it is known if it occurs at least three times, in any case, in the
training part of the text of the first model. The last word of a sample may be cut and is left out.
The first rows have the words of the validation and test parts. Different 4-grams of words fall
where samples repeat themselves, and rise where they are short. A text has ended if the model wrote
the end of a document within its context.

The default of a model is the setting that read best, of those whose samples have at least as large
shares of known words and of different 4-grams as the validation part (docs/samples.md).
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product

import tarflowlm
from tarflowlm.data.sources import resolve_source
from tarflowlm.generation.texts import Samples, Written
from tarflowlm.requests import Writing
from tarflowlm.runs.checkpoint import Checkpoint

SAMPLES = 32
TEMPERATURES = (1.0, 0.9, 0.8, 0.7, 0.6)
TOP_P = (1.0, 0.9, 0.8)
LEAST = 3
SHORT = 180
"""Words of a text whose 4-grams are counted: more have more in common."""
WORD = re.compile(r"[^\W\d_]+")


def words_of(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


def written(
    lm: Checkpoint, num_tokens: int | None, temperature: float | None, top_p: float | None = None
) -> Iterator[Written]:
    """The batches of SAMPLES texts without a prompt."""
    request = Writing(num=SAMPLES, length=num_tokens, temperature=temperature, top_p=top_p, seed=0)
    return Samples(request, lm).batches()


def row(name: str, setting: str, texts: Sequence[list[str]], known: set[str]) -> str:
    """A row of the table, from the words of some texts."""
    words = [word for text in texts for word in text]
    few = [text[:SHORT] for text in texts[:SAMPLES]]
    grams = [tuple(text[at : at + 4]) for text in few for at in range(len(text) - 3)]
    share = sum(word in known for word in words) / len(words)
    return f"| {name} | {setting} | {share:.1%} | {len(set(grams)) / len(grams):.1%} |"


def main(*names: str) -> None:
    """Prints a table, with the rows of every model in the order in which the rule goes."""
    parts: dict[str, list[list[str]]] = {}
    data = tarflowlm.load(names[0]).run.data
    for split, document, _ in resolve_source(data).pieces():
        parts.setdefault(split, []).append(words_of(document))
    counts = Counter(word for text in parts["train"] for word in text)
    known = {word for word, count in counts.items() if count >= LEAST}
    print("| model | temperature, top-p | known words | different 4-grams |\n|" + " --- |" * 4)
    for split in ("valid", "test"):
        print(row(f"{split} part of `{data.source}`", "", parts[split], known))
    for name in names:
        lm = tarflowlm.load(name)
        for temperature, top_p in product(TEMPERATURES, TOP_P):
            batches = written(lm, None, temperature, top_p)
            texts = [words_of(text)[:-1] for batch in batches for text in batch.texts]
            setting = f"{temperature:g}, {top_p:g}"
            print(row(f"`{name}`", setting, texts, known), flush=True)
        streams = [one for batch in written(lm, None, None) for one in batch.streams]
        ended = sum(stream.has_ended for stream in streams)
        within = f"within {lm.config.context} tokens"
        print(f"\n{name} at its default: {ended} of {SAMPLES} texts end {within}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
