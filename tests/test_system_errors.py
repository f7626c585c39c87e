"""Errors of the system, about memory and files, cost a caller of Python one line, too."""

import errno

import pytest
import torch

import tarflowlm
from helpers import TEXT8, tiny_ar
from tarflowlm.errors import UserError, system_errors
from tarflowlm.training import start

SMALL = {"model.context": 16, "model.trunk.width": 8, "model.layers": 1, "train.batch_size": 2}


@pytest.fixture(scope="module")
def lm() -> tarflowlm.Pretrained:
    return tarflowlm.Pretrained(tiny_ar(vocab_size=27, context=16).float(), TEXT8)


def failing(error: Exception):
    def fail(*args: object, **options: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: you tried"), "a smaller"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: choose a smaller"),
        (MemoryError(), "out of memory: choose a smaller"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/proc/x"), "cannot use /proc/x: No such"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, line):
    with pytest.raises(UserError, match=line), system_errors():
        raise error
    for other in (RuntimeError("shapes differ"), UserError("a line")):
        with pytest.raises(type(other), match=str(other)), system_errors():
            raise other


def test_particles_that_no_memory_holds(lm):
    with pytest.raises(UserError, match=r"out of memory: .* particles"):
        lm.write("the", length=16, particles=2**50)


def test_a_run_that_cannot_be_built_leaves_nothing(tmp_path, corpus_file, monkeypatch):
    no_memory = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    for folder in (tmp_path / "new", tmp_path / "empty"):
        if folder.name == "empty":
            folder.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(start, "build", failing(no_memory))
            with pytest.raises(UserError, match="out of memory"):
                tarflowlm.train("mini-ar", folder, data=corpus_file, steps=1, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert not list((tmp_path / "empty").glob("[!.]*"))


@pytest.mark.parametrize("name", ["/proc/x", "x" * 300, "a\0b"])
def test_a_folder_that_cannot_be_made(name, tmp_path, corpus_file, lm, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"cannot use .*; check the path|has a null character"):
        tarflowlm.train("mini-ar", name, data=corpus_file, steps=1, **SMALL)
    with pytest.raises(UserError, match=r"choose another|has a null character|check the path"):
        lm.save_pretrained(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"model.layers": 10**9}, "model.layers 1000000000: .* at most 4,096"),
        ({"train.batch_size": 10**12}, r"batch_size 10+: .* at most 1,000,000"),
    ],
)
def test_a_run_that_would_never_begin_is_refused(values, line, tmp_path, corpus_file):
    with pytest.raises(UserError, match=line):
        tarflowlm.train("mini-ar", tmp_path / "run", data=corpus_file, **SMALL | values)
    assert not list(tmp_path.iterdir())


CALLS = {
    "tarflowlm.TarFlowLM(5)": "config 5 .*: give a FlowConfig",
    "tarflowlm.TarFlowLM(tarflowlm.BaselineConfig())": "give a FlowConfig",
    "tarflowlm.TokenLM(None)": "config None .*: give a BaselineConfig",
    "tarflowlm.BaselineConfig(foo=1)": "model.foo: unknown key; known keys are context",
    "tarflowlm.BaselineConfig(layer=1)": "model.layer: unknown key; did you mean layers",
    "lm.write('the', length=9, allowed=torch.zeros(27).bool())": "False for every token",
    "tarflowlm.evaluate(lm.model, torch.ones(1, 4).long(), torch.full((27,), -1))": "below 0",
    "tarflowlm.evaluate(lm.model, torch.ones(1, 4).long(), torch.full((27,), torch.nan))": "a NaN",
}


@pytest.mark.parametrize("call", CALLS)
def test_wrong_values_are_named(call, lm):
    with pytest.raises(UserError, match=CALLS[call]):
        eval(call)


@pytest.mark.parametrize("mode", [True, False])
def test_a_model_of_one_s_own_keeps_its_mode(mode, tmp_path):
    model = tiny_ar(vocab_size=27, context=16).float().train(mode)
    model.head.train(not mode)
    before = [module.training for module in model.modules()]
    seen = []
    model.transformer.register_forward_hook(lambda module, *_: seen.append(module.training))
    lm = tarflowlm.Pretrained(model, TEXT8)
    lm.write("the", length=8)
    lm.score("the king")
    lm.evaluate("the king\n")
    lm.fill("the _ing")
    lm.edit("the king", words=1)
    lm.save_pretrained(tmp_path / "own")
    with pytest.raises(UserError):
        lm.write("the", length=-1)
    assert not any(seen)
    for _ in lm.stream("the", length=8):
        assert [module.training for module in model.modules()] == before
    assert [module.training for module in model.modules()] == before
