"""Samples of models of `tales`: the share of real words by temperature, and of texts that end.

    python examples/spelled_words.py english-small english-small-ar

This prints one line per model and temperature. A word is a run of letters; it counts as real if it
occurs in `tales` at least three times in any case. The last word of a sample may be cut and is left
out. A text has ended if the model wrote the end of a document within 1,024 tokens.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator

import tarflowlm
from tarflowlm.data.sources import Tales
from tarflowlm.generation.texts import Samples, Written
from tarflowlm.requests import Writing
from tarflowlm.runs.checkpoint import Checkpoint

SAMPLES = 32
LONG = 1024
"""Tokens within which a text may end."""
TEMPERATURES = (1.0, 0.8, 0.6)
LEAST = 3
WORD = re.compile(r"[^\W\d_]+")


def written(lm: Checkpoint, num_tokens: int | None, temperature: float) -> Iterator[Written]:
    """The batches of SAMPLES texts without a prompt."""
    request = Writing(num=SAMPLES, num_tokens=num_tokens, temperature=temperature, seed=0)
    return Samples(request, lm).batches()


def main(*names: str) -> None:
    """Prints the shares for the models `names`."""
    counts: Counter[str] = Counter()
    for document in Tales().documents():
        counts.update(word.lower() for word in WORD.findall(document))
    known = {word for word, count in counts.items() if count >= LEAST}
    print(f"{len(known):,} words occur at least {LEAST} times in tales")
    for name in names:
        lm = tarflowlm.load(name)
        for temperature in TEMPERATURES:
            texts = [text for batch in written(lm, None, temperature) for text in batch.texts]
            words = [word.lower() for text in texts for word in WORD.findall(text)[:-1]]
            share = sum(word in known for word in words) / len(words)
            print(f"{name}, temperature {temperature}: {share:.1%} of {len(words):,} words")
        streams = [one for batch in written(lm, LONG, lm.run.temperature) for one in batch.streams]
        ended = sum(stream.has_ended for stream in streams)
        print(f"{name}, temperature {lm.run.temperature}: {ended} of {SAMPLES} texts end by {LONG}")


if __name__ == "__main__":
    main(*sys.argv[1:])
