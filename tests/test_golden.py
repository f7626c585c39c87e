"""Golden values: the bits of three sentences, and the first tokens, of every shipped model.

A change of the random stream, or an error of sign that a round trip cancels, passes every other
test. Where a change is meant, `python tests/test_golden.py` writes the new values, and the commit
says why they differ.
"""

import json
import re
from pathlib import Path

import pytest
import torch

import tarflowlm
from docs_cases import ROOT, console_sessions
from helpers import mostly_slow
from tarflowlm.runs.hub import released

FILE = Path(__file__).parent / "golden.json"
SENTENCES = (
    "the people of this country have always been ready to defend it",
    "once upon a time there was a king who had three daughters",
    "the cat sat on the mat",
)
NUM_TOKENS = 40


def golden_values(name: str) -> dict[str, list[float] | list[int]]:
    """Bits of the sentences, and the tokens of one sample, of a shipped model; all with seed 0."""
    lm = tarflowlm.load(name)
    generator = torch.Generator().manual_seed(0)
    sample = tarflowlm.generate(lm.model, num_tokens=NUM_TOKENS, generator=generator)
    return {
        "bits": [round(lm.score(sentence, seed=0).total, 4) for sentence in SENTENCES],
        "tokens": sample.tokens[0].tolist(),
    }


@pytest.mark.parametrize("name", mostly_slow(released(), "english-mini", "english-mini-ar"))
def test_shipped_models_keep_their_bits_and_tokens(name):
    expected = json.loads(FILE.read_text(encoding="utf-8"))[name]
    found = golden_values(name)
    # processors round differently
    assert found["bits"] == pytest.approx(expected["bits"], rel=2e-4)
    assert found["tokens"] == expected["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "session", console_sessions(ROOT / "README.md"), ids=lambda session: session.command
)
def test_the_readme_shows_what_its_commands_print(session, run):
    result = run(*session.arguments)
    assert result.status == 0, result.err
    # the page leaves out the empty lines between samples
    assert re.sub(r"\n+", "\n", result.out) == session.output


if __name__ == "__main__":
    values = {name: golden_values(name) for name in released()}
    FILE.write_text(json.dumps(values) + "\n", encoding="utf-8")
