"""What callers of the Python interface get wrong costs a UserError that names it, and the remedy.

In a process of its own: in this one the tests check the types of all arguments, and do so first.
"""

import os
import subprocess
import sys

import pytest

CALLS = {
    "text": ('generate(flow, num_tokens=8, prompt="the cat")', ["prompt", "'the cat'", "tokenizer.encode", "load"]),
    "list": ("generate(flow, num_tokens=8, prompt=[1, 2])", ["prompt", "[1, 2]", "list"]),
    "floats": ("generate(flow, num_tokens=8, prompt=torch.zeros(4))", ["prompt", "float32"]),
    "three axes": ("generate(flow, num_tokens=8, prompt=torch.ones(1, 1, 2).long())", ["[1, 1, 2]", "[num, T]"]),
    "unknown prompt": ("generate(flow, num_tokens=8, prompt=torch.tensor([99]))", ["99", "26"]),
    "length": ("generate(flow, num_tokens=8.5)", ["num_tokens 8.5", "integer"]),
    "length, text": ('generate(flow, num_tokens="5")', ["num_tokens '5'", "integer"]),
    "length, bool": ("generate(flow, num_tokens=True)", ["num_tokens True", "integer"]),
    "number": ('generate(flow, num_tokens=8, num="2")', ["num '2'", "integer"]),
    "particles": ("generate(flow, num_tokens=8, particles=None)", ["particles None", "integer"]),
    "generator": ("generate(flow, num_tokens=8, generator=3)", ["generator 3", "torch.Generator().manual_seed"]),
    "decoder": ('generate(flow, num_tokens=8, decoder="foo")', ["decoder 'foo'", "steps, sweeps, auto"]),
    "decoder, number": ("generate(flow, num_tokens=8, decoder=5)", ["decoder 5", "steps"]),
    "decoders": ('generate(flow, num_tokens=8, decoder=("auto", "auto", 3))', ["decoder 3", "steps"]),
    "decoder of the baseline": ('generate(baseline, num_tokens=8, decoder="foo")', ["decoder 'foo'", "steps"]),
    "decoding": ('generate(flow, num_tokens=8, decoding="foo")', ["decoding 'foo'", "mode, drawn"]),
    "pair": ("generate(flow_and_more, num_tokens=8)", ["of type Pretrained", "pass lm.model"]),
    "pair of a baseline": ("generate(baseline_and_more, num_tokens=8)", ["of type Pretrained", "pass lm.model"]),
    "name": ('generate("english-mini", num_tokens=8)', ["'english-mini'", "pass lm.model", "load"]),
    "elbo, pair": ("elbo(flow_and_more, tokens[None])", ["of type Pretrained", "pass lm.model"]),
    "elbo, generator": ("elbo(flow, tokens[None], generator=3)", ["generator 3", "torch.Generator().manual_seed"]),
    "weighted, pair": (
        "importance_weighted_bound(flow_and_more, tokens[None], samples=2)",
        ["of type Pretrained", "pass lm.model"],
    ),
    "weighted, generator": (
        "importance_weighted_bound(flow, tokens[None], samples=2, generator=3)",
        ["generator 3", "torch.Generator().manual_seed"],
    ),
    "weighted, samples": (
        "importance_weighted_bound(flow, tokens[None], samples='2')",
        ["samples '2'", "integer"],
    ),
    "windows, pair": (
        "evaluate(flow_and_more, tokens[None], one_each)",
        ["of type Pretrained", "pass lm.model"],
    ),
    "windows, samples": ("evaluate(flow, tokens[None], one_each, samples=1.5)", ["samples 1.5", "integer"]),
    "windows, seed": ("evaluate(flow, tokens[None], one_each, seed=None)", ["seed None", "integer"]),
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
    "write, zero": ("flow_and_more.write(0)", ["prompt 0", "text"]),
    "write, list": ("flow_and_more.write([])", ["prompt []", "text"]),
    "write, bytes": ('flow_and_more.write(b"")', ["prompt b''", "text"]),
    "write, no blank": ('flow_and_more.write(template="the king")', ["'the king' has no blank", "'_'", "prompt"]),
    "write, blank": ('flow_and_more.write(template="a_", blank=None)', ["blank None", "single character"]),
    "write, blanks": ('flow_and_more.write(template="a_", blank="")', ["blank ''", "single character"]),
    "write, decoder": ('flow_and_more.write("a", decoder="foo")', ["decoder 'foo'", "steps"]),
    "write, temperature": ('flow_and_more.write("a", temperature="0.8")', ["temperature '0.8'", "number"]),
    "write, top-k": ('flow_and_more.write("a", top_k=1.5)', ["top-k 1.5", "integer"]),
    "write, top-p": ('flow_and_more.write("a", top_p="0.3")', ["top-p '0.3'", "number"]),
    "write, bool": ('flow_and_more.write("a", temperature=True)', ["temperature True", "number"]),
    "write, no seed": ('flow_and_more.write("a", seed=None)', ["seed None", "integer"]),
    "write, seed": ('flow_and_more.write("a", seed=1.5)', ["seed 1.5", "integer"]),
    "write, both": ('flow_and_more.write("a", template="a_")', ["prompt", "template"]),
    "write, unknown": ('flow_and_more.write("1790")', ["'1' x1"]),
    "score": ("flow_and_more.score(tokens)", ["text", "Tensor"]),
    "score, empty": ('flow_and_more.score("")', ["at least one"]),
    "score, samples": ('flow_and_more.score("the", samples=1.5)', ["samples 1.5", "integer"]),
    "score, seed": ('flow_and_more.score("the", seed=None)', ["seed None", "integer"]),
    "score, pair": ("tarflowlm.score(flow_and_more, tokens)", ["of type Pretrained", "pass lm.model"]),
    "save": ("flow_and_more.save_pretrained(5)", ["folder 5", "path"]),
    "push": ("flow_and_more.push_to_hub(5)", ["repository 5", "OWNER/NAME"]),
    "load, number": ("tarflowlm.load(5)", ["model 5", "run directory", "hf:OWNER/NAME"]),
    "load, none": ("tarflowlm.load(None)", ["model None", "run directory", "hf:OWNER/NAME"]),
    "from_pretrained": ("tarflowlm.from_pretrained(5)", ["model 5", "run directory", "hf:OWNER/NAME"]),
    "load, absent device": ('tarflowlm.load("english-mini", device="cuda:1")', ["device cuda:1", "auto", "cpu"]),
    "load, device": ('tarflowlm.load("english-mini", device="foo")', ["device foo", "auto", "cpu"]),
    "load, no device": ('tarflowlm.load("english-mini", device=None)', ["device None", "auto", "cpu"]),
    "load": ('tarflowlm.load("nothing")', ["nothing", "english-mini"]),
}
RIGHT = {
    "ints and floats of NumPy": (
        "flow_and_more.write('the', num_tokens=np.int64(8), num=np.int32(1), temperature=np.float32(1.0), "
        "top_k=np.int64(30), top_p=np.float64(1.0), seed=np.int64(3), particles=np.int16(1))"
        " == flow_and_more.write('the', num_tokens=8, num=1, seed=3)"
    ),
    "changed by those of NumPy": (
        "small.write('The', num_tokens=8, temperature=np.float64(0.5), top_k=np.int64(3), top_p=np.float64(0.5))"
        " == small.write('The', num_tokens=8, temperature=0.5, top_k=3, top_p=0.5)"
    ),
    "numbers in tensors": (
        "small.write('The', num_tokens=8, temperature=torch.tensor(0.5), top_k=torch.tensor(3), seed=np.array(1))"
        " == small.write('The', num_tokens=8, temperature=0.5, top_k=3, seed=1)"
    ),
    "ints for floats": "len(flow_and_more.write('the', num_tokens=8, temperature=1, top_p=1)) == 8",
    "score": "flow_and_more.score('the', samples=np.int64(2), seed=np.int64(1)).total > 0",
    "evaluate": "evaluate(flow, tokens[None], one_each, samples=np.int64(2), seed=np.int64(1)).samples == 2",
    "auto": "tarflowlm.load('english-mini', device='auto').model.device.type in ('cpu', 'mps')",
    "a device": "tarflowlm.load('english-mini', device=torch.device('cpu')).model.device == torch.device('cpu')",
    "no prompt": "flow_and_more.write('', num_tokens=8) == flow_and_more.write(num_tokens=8)",
    "decoders": "generate(flow, num_tokens=8, decoder=['sequential', 'steps', 'steps']).decoders == ('steps',) * 3",
}
"""What is neither, and stays accepted."""
ALL = [*(call for call, _ in CALLS.values()), *RIGHT.values()]
SCRIPT = f"""
import numpy as np, torch, tarflowlm
from tarflowlm import elbo, evaluate, generate, importance_weighted_bound
flow_and_more = tarflowlm.load("english-mini")
flow, tokenizer = flow_and_more
baseline_and_more = tarflowlm.load("english-mini-ar")
baseline, _ = baseline_and_more
small = tarflowlm.load("english-small")
tokens = torch.from_numpy(tokenizer.encode("the cat sat "))
one_each = torch.ones(27, dtype=torch.int64)
for call in {ALL}:
    try:
        print("returned", " ".join(str(eval(call)).split()))
    except tarflowlm.UserError as error:
        print("refused:", error)
    except Exception as error:
        print(type(error), error)
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    # without a GPU on any machine
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(ALL, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_wrong_calls_are_named(answers, name):
    call, parts = CALLS[name]
    assert answers[call].startswith("refused: ")
    for part in parts:
        assert part in answers[call]


@pytest.mark.parametrize("name", RIGHT)
def test_right_calls_are_answered(answers, name):
    assert answers[RIGHT[name]] == "returned True"
