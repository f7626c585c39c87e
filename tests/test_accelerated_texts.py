"""Texts on an accelerator, for which `pretend_device` stands in: written, edited, scored, evaluated
as on a CPU.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import TEXT8, save_run, tiny_ar, tiny_flow
from pretend_device import pretend
from tarflowlm.baseline import TokenLM
from tarflowlm.chunks import written_rows
from tarflowlm.device import pick_device
from tarflowlm.errors import Progress, UserError
from tarflowlm.evaluation.likelihood import evaluate
from tarflowlm.flow.couplings import Coupling
from tarflowlm.flow.numerics import COMPILED, REFERENCE
from tarflowlm.generation.texts import Samples, write_texts
from tarflowlm.objective import importance_weighted_bound
from tarflowlm.presets import preset
from tarflowlm.pretrained import Pretrained
from tarflowlm.processes import Processes
from tarflowlm.requests import Writing
from tarflowlm_apps.studio.catalogue import Catalogue
from tarflowlm_apps.studio.edit import change, rewrite
from tarflowlm_apps.studio.pieces import guarded
from tarflowlm_apps.studio.score import compare
from tarflowlm_apps.studio.write import infill, write

pytestmark = pytest.mark.usefixtures("short_search")

TEXT = "a cat sat"
TOKENS = torch.arange(32).view(2, 16) % 27
FLOW = {"vocab_size": 27, "context": 16, "log_std": -3.0}
MODELS = {
    "flow": lambda: tiny_flow(**FLOW, couplings=("mixd", "affine")),
    "baseline": lambda: tiny_ar(vocab_size=27, context=16),
}
Use = Callable[[Pretrained], Any]
USES: dict[str, Use] = {
    "write": lambda lm: lm.write("a c", length=8, num=3, seed=1),
    "stop": lambda lm: lm.write(length=8, num=4, stop=("e", "a"), seed=2),
    "stream": lambda lm: "".join(lm.stream("a c", length=8)),
    "fill": lambda lm: lm.fill("a ___ b", particles=2, seed=1),
    "gap": lambda lm: lm.fill("a c[...3] b", particles=2, seed=1),
    "contains": lambda lm: lm.write(length=8, contains="b", particles=3),
    "without": lambda lm: lm.write("a", length=6, without="e", particles=2),
    "score": lambda lm: lm.score(TEXT, samples=2).bits,
    "bound": lambda lm: importance_weighted_bound(
        lm.model,
        TOKENS.to(lm.device),
        samples=2,
        generator=torch.Generator(lm.device).manual_seed(0),
    ),
    "evaluate": lambda lm: torch.tensor(
        evaluate(lm.model, TOKENS, torch.ones(27, dtype=torch.long), samples=2).nats_per_token
    ),
}
COMMANDS = {
    "sample": ["--prompt", "the ", "--length", 6, "--num", 2, "--seed", 1],
    "edit": ["--text", TEXT, "--words", 1],
    "score": ["--text", TEXT, "--samples", 2],
    "eval": ["--windows", 2, "--latents", "--json"],
    "info": [],
}
EDITS: dict[str, Use] = {
    "words": lambda lm: lm.edit(TEXT, words=1, num=2, candidates=2),
    "replace": lambda lm: lm.edit(TEXT, replace=("cat", "dog"), candidates=2),
    "noise": lambda lm: lm.edit(TEXT, level=2, strength=0.3, words=1, pick="unlikely"),
}
VIEWS = {
    write: ["flow", "baseline", "the ", 7, 0.8, 0.9, 2, 0, "", ""],
    infill: ["flow", "the ___ saw", 2, 2, 1.0, 0],
    rewrite: ["flow", TEXT, "cat", 1, 0],
    change: ["flow", TEXT, "latents", 0.5, 1, 0],
    compare: [["flow", "baseline"], TEXT],
}
CASES = [(m, u) for m in MODELS for u in USES] + [("flow", u) for u in EDITS]
ALSO_ON_CUDA = {"write", "stop", "contains", "bound", "score", "words"}


@pytest.mark.parametrize(("name", "use"), CASES, ids=map(" ".join, CASES))
def test_it_is_that_of_a_cpu(name, use):
    for kind in ("mps", "cuda")[: 1 + (use in ALSO_ON_CUDA)]:
        model = MODELS[name]()
        lm = Pretrained(model if kind == "cuda" else model.float(), TEXT8)
        act = (USES | EDITS)[use]
        expected = act(lm)
        with pretend(kind):
            found = act(Pretrained(copy.deepcopy(lm.model), TEXT8).to(kind))
            if isinstance(expected, torch.Tensor):
                rtol = 1e-6 if kind == "cuda" else 1e-4
                torch.testing.assert_close(found.cpu(), expected, rtol=rtol, atol=rtol)
            else:
                assert found == expected


def test_a_process_of_several_leaves_the_first_gpu_alone(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pretend("cuda", index=1):
        pick_device("cuda")
        assert torch.cuda.current_device() == 1


@pytest.mark.parametrize("name", MODELS)
def test_moving_a_model_chooses_its_maps(name):
    lm = Pretrained(MODELS[name]().float(), TEXT8)
    couplings = [one for one in lm.model.modules() if isinstance(one, Coupling | TokenLM)]
    with pretend("cuda"):
        lm.to("cuda")
        assert all(one.maps is COMPILED for one in couplings)
        lm.to("cpu")
        assert all(one.maps is REFERENCE for one in couplings)


@pytest.mark.parametrize("gigabytes", [8, 24, 80])
@pytest.mark.parametrize("name", ["owt-ar", "owt-mixd"])
def test_texts_fit_into_a_gpu(name, gigabytes):
    config = replace(preset(name).model, vocab_size=50_257)
    with torch.device("meta"):
        model = config.build()
        caches = [
            block.allocate_cache(1, config.context)
            for block in ([model] if model.is_exact else model.prior.blocks)
        ]
    cached = max(cache.stored.numel() for cache in caches) // config.context
    # the weights of a token in float32, and the integers that its numbers are made of
    each = 4 * cached * config.context + config.vocab_size * (4 + 8)
    with pretend("cuda", memory=gigabytes * 2**30) as gpu:
        sizes = {"cached": cached, "choices": config.vocab_size}
        rows = written_rows(config.context, gpu.device, **sizes)
    assert 0.4 < rows * each / (gigabytes * 2**30) < 0.6


def test_particles_take_memory_as_texts_do():
    with pretend("cuda", memory=2**25):
        lm = Pretrained(MODELS["baseline"]().float(), TEXT8).to("cuda")
        one, four = (
            Samples(Writing(prompt="a c", length=8, num=10_000, particles=particles), lm)
            for particles in (1, 4)
        )
        assert 1 < len(one.own[0]) // 4 == len(four.own[0])


class OfTwo(Processes):
    """The first of two processes; three texts fit into the memory of the other one."""

    def in_turn(self, own):
        return [*own, 3]


def test_processes_write_batches_that_fit_into_the_least_memory():
    lm = Pretrained(MODELS["baseline"]().float(), TEXT8)
    samples = Samples(Writing(length=8, num=12), lm, processes=OfTwo(rank=0, world=2))
    assert samples.own == [range(3), range(6, 9)]


class Count(Progress):
    count = 0

    def advance(self, count: int = 1) -> None:
        self.count += count


def test_a_batch_without_memory_is_halved_and_counted_once(monkeypatch):
    progress = Count()
    with pretend("cuda") as gpu:
        lm = Pretrained(MODELS["baseline"]().float(), TEXT8).to("cuda")
        with gpu.counting():
            expected = lm.write(length=16, num=12)
        room = gpu.memory - gpu.alive
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (room, gpu.memory))
        gpu.memory = gpu.alive + 3 * (gpu.peak - gpu.alive) // 4
        assert write_texts(Writing(length=16, num=12), lm, progress) == expected
        assert progress.count == 16 * 12
        gpu.memory = gpu.alive
        with pytest.raises(UserError, match="out of memory"):
            lm.write(length=16, num=12)


def test_the_studio_s_views_answer(tmp_path):
    save_run(tmp_path / "flow", MODELS["flow"]())
    save_run(tmp_path / "baseline", MODELS["baseline"]())
    with pretend("mps"):
        catalogue = Catalogue([str(tmp_path)], "mps")
        for view, values in VIEWS.items():
            *_, html = guarded(view)(catalogue, *values)
            assert "st-card" in html
            assert "st-notice" not in html
        assert catalogue.load("flow").model.device.type == "mps"


def test_commands_run_there(tmp_path, corpus_file, run):
    folder = save_run(tmp_path / "flow", MODELS["flow"](), source=corpus_file)
    for command, options in COMMANDS.items():
        expected = run(command, folder, *options)
        with pretend("mps"):
            device = () if command == "info" else ("--device", "mps")
            found = run(command, folder, *options, *device)
        assert (found.status, expected.status) == (0, 0), found.err
        if command not in ("eval", "sample"):  # which tell the time or the device
            assert found.out == expected.out
