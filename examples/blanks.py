"""Ten gaps of unknown length in sentences of test tales, filled in by models side by side.

    python examples/blanks.py english-small

Takes the first ten tales of the test split that have a sentence of 46 to 89 characters without
quotes in their first paragraph, and leaves out two words in its middle. Nothing is selected.
docs/constraints.md shows its output.
"""

import re
import sys
import time
from collections.abc import Iterator
from itertools import islice

import tarflowlm
from tarflowlm.data.built_in import Tales

NUM = 10
SENTENCE = re.compile(r"""[^"'_]{46,89}""")


def gaps() -> Iterator[tuple[str, str]]:
    """Templates, and the words that were left out of each."""
    for split, document, _ in Tales().pieces():
        if split != "test":
            continue
        _title, first, *_ = document.split("\n")
        sentences = filter(SENTENCE.fullmatch, re.split(r"(?<=[.!?]) ", first))
        if sentence := next(sentences, None):
            words = sentence.split()
            middle = len(words) // 2
            left, out, right = words[:middle], words[middle : middle + 2], words[middle + 2 :]
            yield " ".join([*left, "[...]", *right]), " ".join(out)


def main(*names: str) -> None:
    """Prints the templates as the models `names` fill them in, with the seconds of each."""
    models = {name: tarflowlm.load(name) for name in names}
    for template, out in islice(gaps(), NUM):
        print(f"{template}  ({out})")
        for name, lm in models.items():
            began = time.perf_counter()
            text = lm.fill(template, seed=0)
            print(f"    {name}, {time.perf_counter() - began:.1f} s: {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
