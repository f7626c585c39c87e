"""Tokens yielded while a text is written are those of the text; parts of many samples are what they
are among all.
"""

import inspect
import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tarflowlm
from helpers import mostly_nightly, tiny_ar, tiny_flow
from tarflowlm.errors import SILENT, Progress
from tarflowlm.flow import numerics
from tarflowlm.flow.cache import KVCache
from tarflowlm.flow.numerics import component_finder
from tarflowlm.generation import Generation, generate
from tarflowlm.generation.generate import row_plans
from tarflowlm.generation.sampling import Gumbel, row_generators
from tarflowlm.generation.write import Writer
from tarflowlm.model import LanguageModel
from tarflowlm.requests import Sampling

MODELS = {
    "ar": {},
    "ar-P2": {"patch": 2, "in_patch": "autoregressive"},
    "mixd": {"couplings": ("mixd",)},
    "mixd-mix1": {"couplings": ("mixd", "mix1"), "log_std": -5.0},
    "mixd-mix1-P4": {"couplings": ("mixd", "mix1"), "patch": 4, "log_std": -5.0},
}
"""All have a context of 8 tokens."""


@pytest.fixture(params=mostly_nightly(MODELS, "ar", "mixd-mix1", "mixd-mix1-P4"))
def model(request) -> LanguageModel:
    name = request.param
    fields = MODELS[name]
    return tiny_ar(**fields) if name.startswith("ar") else tiny_flow(**fields)


def sample(model: LanguageModel, **options) -> Generation:
    return generate(model, **({"num": 2, "generator": torch.Generator().manual_seed(0)} | options))


def streams(rows) -> list[torch.Generator]:
    return row_generators(rows, torch.Generator().manual_seed(0))


def steps_of(
    model: LanguageModel, num_tokens: int, num: int = 2, *, prompt=None, every=1, end=None, **how
) -> Writer:
    """A text piece by piece, with the streams of `sample`."""
    progress = how.pop("progress", SILENT)
    plans = row_plans(model, prompt, num, Sampling(**how), num_tokens=num_tokens)
    plans = [replace(plan, end=end) for plan in plans]
    return Writer(model, plans, streams(range(num)), progress, every)


def yielded(model: LanguageModel, **options) -> list[Tensor]:
    """The parts of a text, which together are what `generate` writes, as is what they return."""
    writer = steps_of(model, **options)
    parts = list(writer)
    assert all(part.dtype == torch.int64 and part.shape[1] for part in parts)
    options.pop("every", None)
    tokens = sample(model, **options).tokens
    assert torch.equal(torch.cat(parts, 1), tokens)
    assert torch.equal(writer.result.tokens, tokens)
    return parts


PROMPTS = {
    "none": None,
    "one": torch.tensor([2, 0, 1]),
    "each": torch.tensor([[2, 0, 1], [3, -1, -1]]),
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("length", [7, pytest.param(19, marks=pytest.mark.slow)])
def test_steps_yield_the_prompt_and_then_every_position(length, prompt, model):
    P = model.config.patch
    parts = yielded(model, num_tokens=length, prompt=prompt, decoder="steps")
    common = 0 if prompt is None else 3 if prompt.dim() == 1 else 1
    if common:
        assert parts[0].shape[1] == common
    assert max(part.shape[1] for part in parts[bool(common) :]) <= P
    assert len(parts) >= (length - common) // P


@pytest.mark.parametrize("decoder", ["sweeps", "auto"])
def test_sweeps_yield_a_window_at_its_end(decoder):
    model = tiny_flow(couplings=("mixd", "mix1"), log_std=-5.0)
    parts = yielded(model, num_tokens=18, decoder=decoder)
    if decoder == "sweeps":
        # the first window is swept, and the others, after given tokens, have a block 1 that goes by
        # steps
        assert [part.shape[1] for part in parts] == [8] + 10 * [1]


@pytest.mark.parametrize(
    "options",
    [
        {"particles": 3, "prompt": torch.tensor([1, 2])},
        {"prompt": torch.tensor([-1, 1, -1, 2])},
        {"prompt": torch.tensor([2, -1, 2]), "temperature": 0.5, "particles": 1},
    ],
    ids=["particles", "blanks", "temperature"],
)
def test_particles_and_blanks_yield_the_text_that_is_written(options, model):
    yielded(model, num_tokens=8, **options)


class Threads(Progress):
    """Notes the threads of every piece of work."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def advance(self, count: int = 1) -> None:
        self.seen.add(torch.get_num_threads())


@pytest.mark.parametrize("num", [1, 2])
def test_one_row_is_written_by_one_thread_and_the_reader_keeps_its_own(num):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        model, threads = tiny_ar(), Threads()
        sample(model, num_tokens=8, num=num, progress=threads)
        assert threads.seen == {1 if num == 1 else 3}
        assert torch.get_num_threads() == 3
        steps = iter(steps_of(model, num_tokens=8, num=num, progress=threads))
        next(steps)
        assert torch.get_num_threads() == 3
        assert torch.is_grad_enabled()
        steps.close()
        assert torch.get_num_threads() == 3
        assert threads.seen == {1 if num == 1 else 3}
    finally:
        torch.set_num_threads(before)


def test_a_closed_text_is_not_written_further(model):
    threads = Threads()
    steps = iter(steps_of(model, num_tokens=30, decoder="steps", progress=threads))
    next(steps)
    steps.close()
    threads.seen.clear()
    assert list(steps) == []
    assert not threads.seen


@pytest.mark.slow
def test_parts_of_many_samples_are_what_they_are_among_all(model):
    all_of_them = sample(model, num_tokens=11, num=5).tokens
    parts = [
        sample(model, num_tokens=11, generator=streams(rows)).tokens
        for rows in (range(1, 3), range(3, 5), [4, 0])
    ]
    assert torch.equal(torch.cat(parts), all_of_them[[1, 2, 3, 4, 4, 0]])


@pytest.mark.slow
def test_prompts_of_different_lengths_do_not_influence_each_other(model):
    prompts = torch.tensor([[2, 0, 1], [3, -1, -1]])
    for length in (8, 14):
        together = sample(model, num_tokens=length, prompt=prompts)
        for row, prompt in enumerate((prompts[0], prompts[1, :1])):
            alone = sample(model, num_tokens=length, num=1, generator=streams([row]), prompt=prompt)
            assert torch.equal(alone.tokens[0], together.tokens[row])
            torch.testing.assert_close(
                alone.evidence.log_evidence[0], together.evidence.log_evidence[row]
            )


def test_parts_can_hold_several_tokens(model):
    """Then they are read less often; a window ends a part."""
    parts = yielded(model, num_tokens=19, decoder="steps", every=6)
    assert all(part.shape[1] >= 6 for part in parts[:1])
    assert len(parts) <= 5


@pytest.mark.parametrize(
    "prompt",
    [None, torch.tensor([2, 0, 1]), torch.tensor([[2, 0, 1], [3, -1, -1]]).repeat(8, 1)],
    ids=PROMPTS.keys(),
)
@pytest.mark.parametrize("length", [8, pytest.param(19, marks=pytest.mark.slow)])
def test_samples_that_have_ended_leave_the_batch(length, prompt, model, monkeypatch):
    """The others are what they are without that, and fewer positions are computed. An end in the
    prompt is none.
    """
    end = 1
    computed = 0
    extend = KVCache.extend

    def counted(cache: KVCache, x: Tensor) -> Tensor:
        nonlocal computed
        computed += x.shape[0] * x.shape[1]
        return extend(cache, x)

    monkeypatch.setattr(KVCache, "extend", counted)
    options = {"num_tokens": length, "num": 16, "prompt": prompt, "decoder": "steps"}
    whole = sample(model, **options).tokens
    without, computed = computed, 0
    steps = steps_of(model, end=end, **options)
    parts = torch.cat(list(steps), 1)
    assert computed < without or model.config.patch == 4
    drawn = torch.full_like(whole, -1) if prompt is None else prompt.expand(16, -1)
    is_drawn = torch.nn.functional.pad(drawn, (0, length - drawn.shape[1]), value=-1) == -1
    is_over = ((whole == end) & is_drawn).cumsum(1) > 0
    assert is_over.any()
    assert torch.equal(parts, whole.masked_fill(is_over, end))
    assert torch.equal(steps.result.tokens, parts)
    assert steps.result.latents == ()


def test_a_stream_makes_the_table_of_the_codebook_once(monkeypatch):
    model = tiny_flow(couplings=("mixd",))
    made = []

    def counted(*arguments):
        made.append(1)
        return component_finder(*arguments)

    monkeypatch.setattr(numerics, "component_finder", counted)
    numbers = []
    for num_tokens in (3, 8):
        made.clear()
        assert len(yielded(model, num_tokens=num_tokens)) == num_tokens
        numbers.append(len(made))
    assert numbers[0] == numbers[1]


def test_whoever_stops_where_a_token_is_drawn_sees_six_frames(monkeypatch):
    found: list[list[str]] = []
    draw = Gumbel.draw

    def watched(*arguments, **options) -> Tensor:
        frames = inspect.stack()[1:]
        found.append([f.function for f in frames if f"src{os.sep}tarflowlm{os.sep}" in f.filename])
        return draw(*arguments, **options)

    monkeypatch.setattr(Gumbel, "draw", watched)
    list(tarflowlm.load("english-mini").stream("once", length=6))
    assert found[0] == ["step", "step", "__iter__", "__iter__", "pieces", "_step_by_step"]
