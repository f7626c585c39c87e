"""Compiled functions compute what the plain ones do, and a row has the same bits in any company."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import helpers
from helpers import FILLS, TRUNK, mostly_slow, randomise, tiny_ar, tiny_flow
from tarflowlm import compiled
from tarflowlm.data.prompts import Gap
from tarflowlm.flow.cache import Cache, KVCache
from tarflowlm.flow.compiled_cache import CompiledCache
from tarflowlm.flow.conditioner import Conditioner
from tarflowlm.flow.transformer import Transformer
from tarflowlm.generation import generate
from tarflowlm.generation.plan import plan
from tarflowlm.generation.sampling import Gumbel, row_generators
from tarflowlm.generation.write import Writer
from tarflowlm.model import LanguageModel, seeded
from tarflowlm.requests import ADJUSTMENTS, Sampling

pytest.importorskip("numba")
pytestmark = pytest.mark.usefixtures("compiled_steps")

START = compiled.start
"""Before the tests replace it."""
T = 11
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SHAPES = {
    "no taps": TRUNK,
    "one tap": replace(TRUNK, input_taps=1),
    "taps": replace(TRUNK, input_taps=3),
    "qwen3": replace(TRUNK, layer="qwen3"),
    "odd sizes": replace(TRUNK, width=12, num_heads=3, mlp_ratio=1),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return helpers.normal(*shape, seed=seed).float()


# functions


def test_exponentials_are_right_to_some_roundings():
    from tarflowlm.compiled.step import exponentials

    x = torch.cat((torch.linspace(-86.9, 88.0, 99_999), torch.tensor([0.0, -0.0, 1e-20])))
    found = x.numpy().copy()
    exponentials(found, np.empty(len(found), np.int32))
    expected = x.double().exp()
    assert ((torch.from_numpy(found) - expected) / expected).abs().max() < 3e-7
    beyond = np.array([-np.inf, -3e38, -200.0, 200.0], np.float32)
    exponentials(beyond, np.empty(4, np.int32))
    assert (beyond[:3] < 1e-37).all()
    assert 1e38 < beyond[3] < np.inf


def test_activations_are_those_of_pytorch():
    from tarflowlm.compiled.step import gelu, swiglu

    x = torch.linspace(-30, 30, 100_001)
    found, room, powers = x.numpy().copy(), np.empty(len(x), np.float32), np.empty(len(x), np.int32)
    gelu(found, room, powers)
    error = (torch.from_numpy(found) - F.gelu(x.double())).abs()
    assert (error < 3e-7 * (1 + x.abs())).all()
    both = torch.cat((x, x.flip(0)))
    found = both.numpy().copy()
    swiglu(found, room, powers)
    expected = F.silu(x.double()) * x.flip(0)
    torch.testing.assert_close(
        torch.from_numpy(found[: len(x)]).double(), expected, rtol=1e-6, atol=1e-6
    )


LIMITS = {
    "none": {},
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 5},
    "top-1": {"top_k": 1},
    "top-p": {"temperature": 0.9, "top_p": 0.9},
    "small top-p": {"top_p": 0.01},
    "large top-p": {"top_p": 0.9999},
    "min-p": {"min_p": 0.1},
    "all": {"temperature": 1.5, "top_k": 30, "top_p": 0.8, "min_p": 0.02},
}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("banned", [None, 3])
def test_a_draw_is_that_of_the_plain_one(limits, banned):
    K, rows = 97, 400
    adjust = Sampling(**LIMITS[limits]).adjustment(K, banned)
    gumbel = Gumbel(torch.arange(rows) * 2**50, 4, (2, K))
    for scale in (0.1, 3.0, 30.0):
        log_w = scale * normal(rows, K)
        log_w[:, 3] += 2 * scale
        expected = gumbel.draw(log_w, adjust, slice(None), 2, 1)
        kept = log_w.clone()
        found = gumbel.draw(log_w, adjust, slice(None), 2, 1, is_compiled=True)
        assert torch.equal(found, expected)
        assert torch.equal(log_w, kept)
        some = torch.tensor([7, 3])
        again = gumbel.draw(log_w[some], adjust, some, 2, 1, is_compiled=True)
        assert torch.equal(again, found[some])


def test_equal_weights_keep_as_many_as_asked():
    log_w = torch.zeros(1, 8)
    for name, number in (("top_k", 3), ("top_p", 0.3)):
        adjust = Sampling(**{name: number}).adjustment(8)
        gumbel = Gumbel(torch.arange(300), 1, (1, 8))
        found = gumbel.draw(log_w.repeat(300, 1), adjust, slice(None), 0, 0, is_compiled=True)
        assert sorted(set(found.tolist())) == [0, 1, 2]


# caches


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def transformer(request) -> Transformer:
    with seeded(0):
        return randomise(Transformer(request.param, 2)).float()


def test_features_are_those_of_the_plain_pass(transformer):
    x = normal(3, T, transformer.config.width)
    found = CompiledCache(transformer, 3, T).extend(x)
    torch.testing.assert_close(found, transformer(x).detach(), **CLOSE)


def test_a_row_has_the_same_bits_in_any_company(transformer):
    x = normal(5, T, transformer.config.width)
    expected = CompiledCache(transformer, 5, T).extend(x)
    for sizes in ([1] * T, [4, 6, 1], [7, 4]):
        cache = CompiledCache(transformer, 2, T)
        parts = [cache.extend(part) for part in x[1:3].split(sizes, 1)]
        assert torch.equal(torch.cat(parts, 1), expected[1:3])


def test_many_positions_are_read_in_parts(transformer):
    x = normal(3, 50, transformer.config.width)
    cache = CompiledCache(transformer, 3, 50)
    steps = [cache.extend(part) for part in x.split(1, 1)]
    assert torch.equal(CompiledCache(transformer, 3, 50).extend(x), torch.cat(steps, 1))


def test_rows_leave_return_and_are_replaced(transformer):
    D = transformer.config.width
    x = normal(4, T, D)
    expected = CompiledCache(transformer, 4, T).extend(x)
    cache = CompiledCache(transformer, 4, T)
    cache.extend(x[:, :4])
    cache.extend(normal(4, 2, D, seed=1))
    cache.rewind(4)
    cache.keep(torch.tensor([1, 3]))
    assert cache.batch == 2
    assert torch.equal(cache.extend(x[[1, 3], 4:6]), expected[[1, 3], 4:6])
    cache.take(cache, torch.tensor([1, 0]))
    assert torch.equal(cache.extend(x[[3, 1], 6:8]), expected[[3, 1], 6:8])
    cache.keep(torch.tensor([1]))
    cache.take(cache, torch.tensor([0]))
    assert torch.equal(cache.extend(x[1:2, 8:]), expected[1:2, 8:])
    one = CompiledCache(transformer, 1, 4)
    one.extend(x[2:3, :4])
    many = CompiledCache(transformer, 3, T)
    many.take(one, torch.zeros(3, dtype=torch.long))
    assert torch.equal(many.extend(x[2:3, 4:].repeat(3, 1, 1))[1], expected[2, 4:])


def test_changed_weights_are_packed_anew(transformer):
    x = normal(1, T, transformer.config.width)
    CompiledCache(transformer, 1, T).extend(x)
    with torch.no_grad():
        weight = transformer.layers[1].up.weight
        weight.mul_(2)
        torch.testing.assert_close(
            CompiledCache(transformer, 1, T).extend(x), transformer(x), **CLOSE
        )
        weight.mul_(0.5)
    one, other = (CompiledCache(transformer, 1, T) for _ in range(2))
    assert one.weights is other.weights


CONDITIONERS = {
    "ar": lambda: tiny_ar(context=T),
    "ar P2": lambda: tiny_ar(context=12, patch=2),
    "mixd": lambda: tiny_flow(couplings=("mixd",), context=T),
    "tokens": lambda: tiny_flow(couplings=("mixd",), context=T, reads_tokens=True),
    "linear": lambda: tiny_flow(couplings=("mixd",), context=T, input_map="linear"),
    "P2": lambda: tiny_flow(couplings=("mixd",), context=12, patch=2, reads_tokens=True),
}


@pytest.mark.parametrize("name", CONDITIONERS)
def test_features_from_latents_are_those_of_the_plain_cache(name):
    model = CONDITIONERS[name]().float().eval()
    source: Conditioner = model if model.is_exact else model.prior.block(0)
    tokens = torch.randint(5, (3, 10), generator=torch.Generator().manual_seed(0))
    past = tokens
    if not model.is_exact:
        past = model.prior.patch(model.codebook.encode(tokens, normal(3, 10, 2))).detach()
    N = 10 // model.config.patch + 1
    caches: list[Cache] = [
        KVCache(source.transformer, 3, N, source.start),
        CompiledCache(source.transformer, 3, N),
        CompiledCache(source.transformer, 1, N),
    ]
    with torch.no_grad():
        for cache in caches:
            cache.embed = source.embedder(cache)
        expected, found = (source.features_of(cache, past) for cache in caches[:2])
        torch.testing.assert_close(found, expected, **CLOSE)
        if model.is_exact:
            past = past.unflatten(1, (N - 1, -1))
        steps = [source.features_at(caches[2], past[1:2, n - 1] if n else None) for n in range(N)]
        assert torch.equal(torch.stack(steps, 1), found[1:2])


# texts


MODELS = {
    "ar": lambda: tiny_ar(context=12),
    "ar qwen3": lambda: tiny_ar(context=12, trunk=SHAPES["qwen3"]),
    "mixd": lambda: tiny_flow(couplings=("mixd",), context=12),
    "fills": lambda: tiny_flow(**FILLS, alternate=False, log_std=-4.0, context=12),
    "stack": lambda: tiny_flow(couplings=("mixd", "mix1"), context=12),
}
"""All have 5 symbols, or a component of noise besides in the block that draws."""
REQUESTS = {
    "free": {},
    "top-p": {"temperature": 0.8, "top_p": 0.7},
    "top-k": {"top_k": 2},
    "min-p": {"min_p": 0.2},
    "prompt": {"prompt": torch.tensor([2, 0, 1])},
    "window": {"num_tokens": 30},
    "blanks": {"prompt": torch.tensor([2, -1, -1, 3, 0, -1]), "particles": 1},
    "particles": {"prompt": torch.tensor([2, -1, -1, 3, 0, -1]), "particles": 4},
    "gap": {"prompt": [torch.tensor([2]), Gap(2, least=1), torch.tensor([3])], "particles": 3},
}
TEXTS = [
    f"{name} {request}"
    for name in MODELS
    for request in REQUESTS
    if f"{name} {request}" != "fills gap"
    and not (name == "stack" and request in ("top-p", "top-k", "min-p"))
]
SOON = ["ar free", "ar qwen3 top-p", "ar window", "mixd min-p", "mixd blanks", "fills prompt"]


def texts(model: LanguageModel, request: str, num: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    options = {"num_tokens": 12, "num": num, "generator": generator} | REQUESTS[request]
    return generate(model, **options).tokens


@pytest.mark.parametrize("case", mostly_slow(TEXTS, *SOON))
def test_a_text_is_that_of_plain_steps_alone_and_beside_others(case, monkeypatch):
    name, _, request_ = case.rpartition(" ")
    model = MODELS[name]().float().eval()
    found = texts(model, request_, 5)
    if request_ != "gap":
        assert torch.equal(texts(model, request_, 1)[0], found[0])
        assert torch.equal(texts(model, request_, 2), found[:2])
    monkeypatch.setattr(compiled, "is_due", lambda num_tokens: False)
    assert torch.equal(texts(model, request_, 5), found)


@pytest.mark.parametrize("name", ["ar", "mixd"])
def test_a_longer_text_begins_like_a_shorter_one(name):
    model = MODELS[name]().float().eval()
    for more in ({}, {"temperature": 0.8, "top_p": 0.7, "prompt": torch.tensor([2, 0, 1])}):

        def text(length: int, more=more) -> Tensor:
            generator = torch.Generator().manual_seed(5)
            return generate(model, num_tokens=length, num=2, generator=generator, **more).tokens

        # of three windows, the first of 12 tokens
        longest = text(20)
        for length in (7, 13):
            assert torch.equal(text(length), longest[:, :length])


@pytest.mark.parametrize("name", ["ar", "mixd"])
def test_texts_that_end_and_stream_are_the_same(name):
    """Rows end at different places, and parts of any size are of final tokens."""
    model = MODELS[name]().float().eval()

    def text(end: int, every: int, num: int) -> Tensor:
        plans = [plan(model, [], Sampling(temperature=0.9), num_tokens=14, end=end)] * num
        streams = row_generators(range(num), torch.Generator().manual_seed(end))
        return torch.cat(list(Writer(model, plans, streams, every=every)), 1)

    for end, every, num in ((0, 1, 5), (2, 4, 5), (3, 3, 1)):
        steps = text(end, 1, num)
        assert torch.equal(text(end, every, num), steps)
        ended = (steps == end).int().argmax(1)
        assert all((row[at:] == end).all() for row, at in zip(steps, ended, strict=True) if at)


# when


def test_short_texts_do_not_compile(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path)
    monkeypatch.setattr(compiled, "prepare", lambda: not asked.append(1))
    assert not compiled.is_due(compiled.LONG - 1)
    assert not asked
    assert compiled.is_due(compiled.LONG)
    (tmp_path / compiled.READY).touch()
    assert compiled.is_due(1)
    assert len(asked) == 2
    monkeypatch.setattr(compiled, "is_installed", lambda: False)
    assert not compiled.is_due(compiled.LONG)


def test_other_weights_take_plain_steps():
    like = torch.zeros(3)
    from tarflowlm.flow.packing import serves

    assert serves(like, 1)
    assert not serves(like.double(), 1)
    assert not serves(like.bfloat16(), 1)
    assert not serves(like.to("meta"), 1)


def test_a_folder_that_cannot_be_written_to_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path / "file" / "below")
    assert not compiled.is_due(1)
    assert not compiled.prepare.__wrapped__()


def test_threads_share_a_batch(transformer, monkeypatch):
    x = normal(16, T, transformer.config.width)
    expected = CompiledCache(transformer, 16, T).extend(x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for rows in (16, 24):
        cache = CompiledCache(transformer, rows, T)
        found = [cache.extend(part) for part in x.repeat(2, 1, 1)[:rows].split([3, 8], 1)]
        assert torch.equal(torch.cat(found, 1)[:16], expected)


def test_every_option_has_its_limit():
    from tarflowlm.compiled.draw import Limits

    assert ADJUSTMENTS - {"adjust"} <= set(Limits._fields)


def test_a_process_compiles_unless_all_is_ready(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(compiled, "start", START)
    monkeypatch.setattr(compiled.subprocess, "Popen", lambda words, **how: started.append(words))
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path)
    compiled.start()
    assert started == [[sys.executable, "-m", "tarflowlm.compiled"]]
    (tmp_path / compiled.READY).touch()
    compiled.start()
    monkeypatch.setattr(compiled, "is_installed", lambda: False)
    compiled.start()
    assert len(started) == 1


@pytest.mark.slow
def test_another_process_finds_what_one_has_compiled(tmp_path):
    environment = os.environ | {"TARFLOWLM_CACHE": str(tmp_path)}
    ask = "from tarflowlm import compiled; print(compiled.is_due(1))"
    commands = {"before": ["-c", ask], "": ["-m", "tarflowlm.compiled"], "after": ["-c", ask]}
    for when, command in commands.items():
        said = {"before": "False\n", "": "", "after": "True\n"}[when]
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == said
