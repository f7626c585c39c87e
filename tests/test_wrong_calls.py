"""What callers of the Python interface get wrong costs a UserError that names it, and the remedy.

In a process of its own: in this one the tests check the types of all arguments, and do so first.
"""

import subprocess
import sys

import pytest

CALLS = {
    "text": ('generate(flow, num_tokens=8, prompt="the cat")', ["prompt", "'the cat'", "tokenizer.encode", "load"]),
    "list": ("generate(flow, num_tokens=8, prompt=[1, 2])", ["prompt", "[1, 2]", "list"]),
    "floats": ("generate(flow, num_tokens=8, template=torch.zeros(4))", ["template", "float32"]),
    "three axes": ("generate(flow, num_tokens=8, prompt=torch.ones(1, 1, 2).long())", ["[1, 1, 2]", "[num, T]"]),
    "unknown prompt": ("generate(flow, num_tokens=8, prompt=torch.tensor([99]))", ["99", "26"]),
    "length": ("generate(flow, num_tokens=8.5)", ["length 8.5", "integer"]),
    "number": ('generate(flow, num_tokens=8, num="2")', ["num '2'", "integer"]),
    "elbo, one axis": ("elbo(flow, tokens)", ["[12]", "[B, T]", "[None]"]),
    "elbo, text": ('elbo(flow, "the cat")', ["'the cat'", "tokenizer.encode"]),
    "elbo, unknown": ("elbo(flow, tokens[None] + 99)", ["0 to 26"]),
    "elbo, negative": ("elbo(flow, -tokens[None])", ["hold -", "0 to 26"]),
    "elbo, long": ("elbo(flow, tokens.repeat(25)[None])", ["300 tokens", "256", "score"]),
    "elbo, empty": ("elbo(flow, tokens[:0][None])", ["[1, 0]", "at least one"]),
    "elbo of the baseline": ("elbo(baseline, tokens[None])", ["baseline", "log_prob"]),
    "weighted": ("importance_weighted_bound(flow, tokens, samples=2)", ["[12]", "[B, T]"]),
    "windows": ("evaluate(baseline, tokens, one_each)", ["windows", "[12]"]),
    "unknown windows": ("evaluate(flow, tokens[None] + 99, one_each)", ["0 to 26"]),
    "write": ("flow_and_more.write(7)", ["prompt 7", "text"]),
    "write, both": ('flow_and_more.write("a", template="a_")', ["prompt", "template"]),
    "write, unknown": ('flow_and_more.write("1790")', ["'1' x1"]),
    "score": ("flow_and_more.score(tokens)", ["text", "Tensor"]),
    "score, empty": ('flow_and_more.score("")', ["at least one"]),
    "load": ('tarflowlm.load("nothing")', ["nothing", "english-mini"]),
}
SCRIPT = f"""
import torch, tarflowlm
from tarflowlm import elbo, evaluate, generate, importance_weighted_bound
flow_and_more = tarflowlm.load("english-mini")
flow, tokenizer = flow_and_more
baseline, _ = tarflowlm.load("english-mini-ar")
tokens = torch.from_numpy(tokenizer.encode("the cat sat "))
one_each = torch.ones(27, dtype=torch.int64)
for call in {[call for call, _ in CALLS.values()]}:
    try:
        print("returned", type(eval(call)))
    except tarflowlm.UserError as error:
        print("refused:", error)
    except Exception as error:
        print(type(error), error)
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip(CALLS, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_wrong_calls_are_named(answers, name):
    assert answers[name].startswith("refused: ")
    for part in CALLS[name][1]:
        assert part in answers[name]
