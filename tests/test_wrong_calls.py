"""What callers of the Python interface get wrong costs a UserError that names it, and the remedy.

In a process of its own: in this one the tests check the types of all arguments, and do so first.
"""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

REFUSED = [
    (
        'generate(flow, num_tokens=8, prompt="the cat")',
        ["prompt", "'the cat'", "tokenizer.encode"],
    ),
    ("generate(flow, num_tokens=8, prompt=[1, 2])", ["prompt", "[1, 2]"]),
    ("generate(flow, num_tokens=8, prompt=torch.zeros(4))", ["prompt", "float32"]),
    ("generate(flow, num_tokens=8, prompt=torch.ones(1, 1, 2).long())", ["[1, 1, 2]", "[num, T]"]),
    ("generate(flow, num_tokens=8, prompt=torch.tensor([99]))", ["99", "26"]),
    ("generate(flow, num_tokens=10**12)", ["length 1000", "10,000,000"]),
    ("lm.write(length=10**12)", ["length 1000", "10,000,000"]),
    ("lm.write('a', temperature=-1e-50)", ["temperature -1e-50", "at least 0"]),
    ("lm.write('a', contains=['b', ' '])", ["contains", "some words"]),
    ("lm.write('a', without=['b', ' '])", ["without", "some words"]),
    ("lm.write('a b', contains='x cat', without='cat')", ["contains 'x cat'", "not to come"]),
    ("lm.write('a b', words=2)", ["words 2", "the prompt has as many"]),
    ("lm.write('a b', words=60, length=12)", ["words 60", "length of 12", "raise"]),
    ("lm.write('a b', sentences=2)", ["sentences 2", "no full stop"]),
    (
        "generate(flow, num_tokens=8, prompt=tokens[:3, None], num=2)",
        ["3 prompts for 2 samples", "one per sample"],
    ),
    ("generate(flow, num_tokens=8, generator=[1])", ["generator 1", "torch.Generator"]),
    ("generate(flow, num_tokens=8, progress=3)", ["progress 3", "Progress"]),
    ("tarflowlm.Pretrained(flow, tokenizer, run=3)", ["run 3", "leave it out"]),
    ("small.tokenizer.encode('a\\udc80')", ["character 1", "UTF-8"]),
    ("tokenizer.encode('a\\udc80')", ["alphabet of 27"]),
    ('generate(baseline, num_tokens=8, decoder="sweeps")', ["decoder sweeps", "leave it out"]),
    ("elbo(flow, tokens[None], noise=noise[..., :3])", ["[1, 12, 3]", "give [1, 12, 8]"]),
    ("elbo(flow, tokens[None], noise=noise.double())", ["float64", "give", "float32"]),
    ("elbo(flow, tokens[None], noise=5)", ["noise 5", "[B, T, d]"]),
    ("flow.codebook.encode(tokens, noise[0, :, :3])", ["[12, 3]", "give [12, 8]"]),
    ("flow.prior(noise[..., :3])", ["[1, 12, 3]", "[B, N, 8]"]),
    ("flow.prior.inverse(noise[0])", ["[12, 8]"]),
    ("baseline.log_prob(tokens[None] + 99)", ["0 to 26"]),
    ("evaluate(flow, tokens[None], one_each[:5])", ["[5]", "27 tokens"]),
    ("evaluate(flow, tokens[None], one_each, given=[0])", ["given [0]", "[W]"]),
    (
        "evaluate(flow, tokens[None], one_each, given=tokens[:2])",
        ["given of shape [2]", "give [1]"],
    ),
    ("lm.evaluate(['!!!'])", ["nothing is left", "a-z"]),
    ("evaluate(flow, tokens[None], None)", ["characters_per_token None", "[V]"]),
    ("tarflowlm.Pretrained(diverged, tokenizer)", ["codebook.mean is not finite"]),
    ("generate(flow, num_tokens=8.5)", ["length 8.5", "integer"]),
    ("generate(flow, num_tokens=True)", ["length True", "integer"]),
    ('generate(flow, num_tokens=8, num="2")', ["num '2'", "integer"]),
    ("generate(flow, num_tokens=8, generator=3)", ["generator 3", "torch.Generator().manual_seed"]),
    ('generate(flow, num_tokens=8, decoder="foo")', ["decoder 'foo'", "steps, sweeps, auto"]),
    (
        'generate(flow, num_tokens=8, decoder=("auto", "auto", 3))',
        ["decoder (", "choose one of steps"],
    ),
    ('generate(baseline, num_tokens=8, decoder="foo")', ["decoder 'foo'", "steps"]),
    ('generate("english-mini", num_tokens=8)', ["'english-mini'", "pass lm.model", "load"]),
    ("elbo(lm, tokens[None])", ["of type Pretrained", "pass lm.model"]),
    ("elbo(flow, tokens[None], generator=3)", ["generator 3", "torch.Generator().manual_seed"]),
    ("elbo(flow, tokens)", ["[12]", "[B, T]"]),
    ('elbo(flow, "the cat")', ["'the cat'", "tokenizer.encode"]),
    ("elbo(flow, tokens[None] + 99)", ["0 to 26"]),
    ("elbo(flow, -tokens[None])", ["hold -", "0 to 26"]),
    ("elbo(flow, tokens[None].byte())", ["torch.uint8", ".long()"]),
    ("flow.prior(noise.half())", ["torch.float16", "float32"]),
    ("elbo(flow, tokens.repeat(25)[None])", ["300", "256", "score"]),
    ("elbo(flow, tokens[:0][None])", ["[1, 0]", "at least one"]),
    ("elbo(baseline, tokens[None])", ["baseline", "log_prob"]),
    ("importance_weighted_bound(flow, tokens[None], samples='2')", ["samples '2'", "integer"]),
    ("importance_weighted_bound(flow, tokens, samples=2)", ["[12]", "[B, T]"]),
    ("evaluate(lm, tokens[None], one_each)", ["of type Pretrained", "pass lm.model"]),
    ("evaluate(flow, tokens[None], one_each, samples=1.5)", ["samples 1.5", "integer"]),
    ("evaluate(flow, tokens[None], one_each, seed=None)", ["seed None", "integer"]),
    ("evaluate(baseline, tokens, one_each)", ["windows", "[12]"]),
    ("lm.write([1])", ["prompt", "text"]),
    ('lm.fill("the king")', ["'the king' has no blank", "'_'", "prompt"]),
    ('lm.fill("a [...0] b")', ["[...0]", "at least 1"]),
    ("lm.fill(None)", ["template None", "text"]),
    ("lm.write(particles=4)", ["particles 4", "nothing is given", "leave them out"]),
    ('lm.write("It\'s 1815", length=12)', ["read as: it s one eight one five", "12"]),
    ('lm.write("a", lenght=5)', ["'lenght'", "did you mean length?"]),
    ('lm.edit("a", strenght=1)', ["'strenght'", "did you mean strength?"]),
    ('lm.write("a", allowed="abc")', ["allowed 'abc'", "[27]"]),
    ('lm.write("a", allowed=[1, 2])', ["allowed [1, 2]", "[27]"]),
    ('lm.stream(["a", "b"])', ["prompt ('a', 'b')", "one text"]),
    ('lm.stream(template=["a_", "b_"])', ["template ('a_', 'b_')", "one text"]),
    ('lm.stream("a", num=2)', ["num 2", "one text"]),
    ("lm.stream(5)", ["prompt 5", "a text"]),
    ('lm.decode(["a"])', ["<U1 [1]", "0 to 26"]),
    ('lm.edit("a b", rewrite="")', ["rewrite ''", "character"]),
    ('lm.write("a", contains=" ")', ["contains ' '", "words"]),
    ('lm.fill("a_", blank="")', ["blank ''", "single character"]),
    ('small.write("日本\\udc80")', ["UTF-8"]),
    ("lm.score(tokens)", ["text", "tensor"]),
    ('lm.score("")', ["at least one"]),
    ("lm.score(None)", ["text None", "give"]),
    ('tarflowlm.load("")', ["'' is not a run directory"]),
    ('tarflowlm.load("x" * 300)', ["xxx is not a run directory"]),
    ('tarflowlm.from_pretrained("x" * 300, revision="a")', ["revision 'a'", "not on the hub"]),
    ("tarflowlm.score(lm, tokens)", ["of type Pretrained", "pass lm.model"]),
    ("tarflowlm.score(baseline, tokens[:0])", ["at least one token"]),
    ("tarflowlm.score(baseline, tokens[None])", ["[1, 12]"]),
    ("tarflowlm.score(baseline, tokens.float())", ["float32"]),
    ("tarflowlm.score(baseline, tokens * 0 + 27)", ["hold 27"]),
    ("tarflowlm.score(baseline, tokens * 0 - 1)", ["hold -1"]),
    ('lm.edit("the king", weight=0.5)', ["weight", "unknown", "strength"]),
    (
        'tarflowlm.load("english-mini-ar").edit("the king", level=0)',
        ["baseline", "level"],
    ),
    ('list(lm.stream("the", temperature=-1.0))', ["temperature -1.0", "at least"]),
    ('tarflowlm.train("mini-mixed", "x")', ["preset 'mini-mixed'", "mini-mixd"]),
    ('tarflowlm.train(3, "x")', ["run 3", "preset"]),
    ('tarflowlm.train("mini-ar", 3)', ["out 3", "directory"]),
    ('tarflowlm.train("mini-ar", "x", **{"model.latentdim": 3})', ["model.latentdim", "unknown"]),
    ('tarflowlm.train("mini-ar", "x", **{"modl.layers": 3})', ["modl.layers", "field"]),
    ('tarflowlm.train("mini-ar", "x", steps=3, minutes=1.0)', ["steps 3", "minutes 1.0"]),
    ('tarflowlm.train("mini-ar", "x", minutes=0)', ["minutes 0", "above 0"]),
    ('tarflowlm.train("mini-ar", "x", minutes="x")', ["minutes 'x'", "number"]),
    ('lm.tune("x", "y", steps=3, minutes=1)', ["minutes 1", "steps 3"]),
    ('lm.tune("x", "y", minutes="5")', ["minutes '5'", "number"]),
    ('lm.tune("x", "y", lr="x")', ["lr 'x'", "number"]),
    ('tarflowlm.coupling("")', ["coupling ''", "name"]),
    ("tarflowlm.coupling(5)", ["coupling 5", "name"]),
    ('tarflowlm.coupling("mine")(int)', ["'mine'", "conditionals"]),
    ("tarflowlm.preset(5)", ["preset 5", "name"]),
    ("tarflowlm.FlowConfig(blocks=5)", ["model.blocks 5", "BlockConfig"]),
    ('flow("abc")', ["tokens 'abc'", "tokenizer.encode"]),
    ("flow(torch.zeros(1, 3))", ["float32", "tokenizer.encode"]),
    ('tarflowlm.train("mini-ar", "x", data="no-such-file")', ["no-such-file"]),
    ('tarflowlm.resume("no-such-run")', ["no-such-run"]),
    ("lm.save_pretrained(5)", ["folder 5", "path"]),
    ('lm.save_pretrained("/proc/x")', ["/proc/x"]),
    ('lm.edit("the king", replace="king")', ["replace 'king'", "a list of 2"]),
    ('lm.decode("abc")', ["'abc'", "encode"]),
    ("tarflowlm.Pretrained(flow, small.tokenizer)", ["27", "symbols"]),
    ('tarflowlm.Pretrained("flow", tokenizer)', ["model 'flow'"]),
    ("generate(copy.deepcopy(flow).bfloat16(), num_tokens=8)", ["bfloat16", "float32"]),
    ("elbo(copy.deepcopy(flow).half(), tokens[None])", ["float16", "float32"]),
    ("lm.push_to_hub(5)", ["repository 5", "OWNER/NAME"]),
    ("tarflowlm.load(None)", ["model None", "run directory", "hf:OWNER/NAME"]),
    ('tarflowlm.load("english-mini", device="cuda:1")', ["device cuda:1", "auto", "cpu"]),
    ("lm.to(torch.bfloat16)", ["device torch.bfloat16", "float32"]),
    ('tarflowlm.load("english-mini", device=None)', ["device None", "give auto", "cpu"]),
    ('tarflowlm.load("nothing")', ["nothing", "english-mini"]),
]
ACCEPTED = [
    "generate(lm, num_tokens=8).tokens.shape == (1, 8)",
    "lm.write('the', length=np.int64(8), num=np.int32(1), temperature=np.float32(1.0),"
    " seed=np.int64(3))"
    " == lm.write('the', length=8, num=1, temperature=1, seed=3)",
    "small.write('The', length=8, temperature=torch.tensor(0.5), top_k=np.int64(3),"
    " seed=np.array(1))"
    " == small.write('The', length=8, temperature=0.5, top_k=3, seed=1)",
    "len(lm.write('the', length=8, temperature=1, top_p=1)) == 8",
    "lm.write('the', max_new_tokens=5) == lm.write('the', length=8)",
    "lm.write(['a', 'the'], max_new_tokens=5)[0] == lm.write('a', max_new_tokens=5)",
    "lm.write(['the', 'cat'], max_new_tokens=5) == lm.write(['the', 'cat'], length=8)",
    "lm.write([]) == lm.score([]) == []",
    "''.join(lm.stream('the', length=8)) == lm.write('the', length=8)",
    "len(generate(flow, num_tokens=8, particles=None).tokens) == 1",
    "lm.score('the', samples=np.int64(2), seed=np.int64(1)).total > 0",
    "evaluate(flow, tokens[None], one_each, samples=np.int64(2), seed=np.int64(1)).samples == 2",
    "tarflowlm.load('english-mini', device=torch.device('cpu')).device == torch.device('cpu')",
    "lm.write('', length=8) == lm.write(length=8)",
]
CALLS = [*(call for call, _ in REFUSED), *ACCEPTED]
SCRIPT = f"""
import copy, numpy as np, torch, tarflowlm
from tarflowlm import elbo, evaluate, generate, importance_weighted_bound
lm, small = tarflowlm.load("english-mini"), tarflowlm.load("stories")
flow, tokenizer = lm
baseline, _ = tarflowlm.load("english-mini-ar")
tokens = torch.from_numpy(tokenizer.encode("the cat sat "))
noise = torch.zeros(1, 12, 8)
diverged = copy.deepcopy(flow)
torch.nn.init.constant_(diverged.codebook.mean, float("nan"))
one_each = torch.ones(27, dtype=torch.int64)
for call in {CALLS}:
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
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONIOENCODING": "utf-8:backslashreplace",
    }
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CALLS, done.stdout.splitlines(), strict=True))


def test_wrong_calls_are_named(answers):
    for call, parts in REFUSED:
        answer = answers[call]
        assert answer.startswith("refused: "), (call, answer)
        assert [part for part in parts if part not in answer] == [], (call, answer)


def test_right_calls_are_answered(answers):
    assert {call: answers[call] for call in ACCEPTED} == dict.fromkeys(ACCEPTED, "returned True")
