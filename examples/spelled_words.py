"""Share of the words written by models that are words of another text, by temperature.

    python examples/spelled_words.py english_raw.txt.xz english-small english-small-ar

prints one line per model and temperature. A word is a run of letters; it counts as found if it
occurs in the text at least three times, whatever the case. The first and the last word of a sample
may be cut and are left out.
"""

import re
import sys
from collections import Counter

import tarflowlm
from tarflowlm.data.text import read_text

SAMPLES, TEMPERATURES, LEAST = 32, (1.0, 0.8, 0.6), 3
WORD = re.compile(r"[^\W\d_]+")


def main(text: str, *names: str) -> None:
    """Prints the shares for the models `names`; `text` is the file with the words."""
    counts = Counter(word.lower() for word in WORD.findall(read_text(text)))
    known = {word for word, count in counts.items() if count >= LEAST}
    print(f"{len(known):,} words occur at least {LEAST} times in {text}")
    for name in names:
        model = tarflowlm.load(name)
        for temperature in TEMPERATURES:
            samples = model.write(num=SAMPLES, temperature=temperature, seed=0)
            words = [word.lower() for sample in samples for word in WORD.findall(sample)[1:-1]]
            share = sum(word in known for word in words) / len(words)
            print(f"{name}, temperature {temperature}: {share:.1%} of {len(words):,} words")


if __name__ == "__main__":
    main(*sys.argv[1:])
