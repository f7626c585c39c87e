"""Writing on an accelerator, for which `pretend_device` stands in: a CPU's texts, few waits."""

import copy
from functools import partial

import pytest
import torch

from helpers import FILLS, mostly_nightly, tiny_ar, tiny_flow
from pretend_device import pretend
from tarflowlm.data.prompts import Gap
from tarflowlm.flow.numerics import reference
from tarflowlm.generation import Generation, generate
from tarflowlm.model import LanguageModel

pytestmark = pytest.mark.usefixtures("short_search")

FEW_FILL = FILLS | {"couplings": ("mixd",) * 2, "components": (0,) * 2}
MODELS = {
    "ar": tiny_ar,
    "mixd-mix1": partial(tiny_flow, couplings=("mixd", "mix1")),
    "fills": partial(tiny_flow, **FEW_FILL, alternate=False, log_std=-4.0),
}


def written(model: LanguageModel, **options) -> Generation:
    return generate(model, generator=torch.Generator().manual_seed(3), **options)


SOME = torch.tensor([True, False, True, True, False])
REQUESTS = {
    "free": {},
    "steps": {"decoder": "steps"},
    "sweeps": {"decoder": "sweeps"},
    "top-p": {"temperature": 0.8, "top_p": 0.7},
    "top-k": {"top_k": 2},
    "prompt": {"prompt": torch.tensor([2, 0])},
    "window": {"num_tokens": 9},
    "blanks": {"prompt": torch.tensor([2, -1, 3]), "particles": 1},
    "particles": {"prompt": torch.tensor([2, -1, 3, -1, 0]), "particles": 4},
    "gap": {"prompt": [torch.tensor([2]), Gap(2, least=1), torch.tensor([3])], "particles": 3},
    "mask": {"allowed": SOME, "particles": 2},
    "masks": {"allowed": lambda tokens: SOME, "particles": 2},
}
BY_MODEL = {
    "ar": [name for name in REQUESTS if name != "sweeps"],
    "mixd-mix1": ["free", "sweeps", "prompt", "window", "blanks", "particles", "gap", "mask"],
    "fills": ["free", "top-p", "sweeps", "window", "blanks"],
}
"""What a model can do, and others do not show."""
CASES = {
    f"{name} {request_}": (name, request_) for name, some in BY_MODEL.items() for request_ in some
}
LONG = {
    "mixd-mix1 window",
    "mixd-mix1 blanks",
    *(f"fills {name}" for name in BY_MODEL["fills"][1:]),
}


@pytest.mark.parametrize("case", mostly_nightly(CASES, *CASES.keys() - LONG))
def test_a_text_is_that_of_a_cpu(case):
    name, request_ = CASES[case]
    for kind in ("cuda", "mps")[: 1 + (request_ == "free")]:
        model = MODELS[name]().eval()
        if kind == "mps":
            model.float()
        options = {"num_tokens": 5, "num": 2} | REQUESTS[request_]
        expected = written(model, **options)
        with pretend(kind):
            found = written(copy.deepcopy(model).to(kind), **options)
            assert found.tokens.cpu().equal(expected.tokens)
            if expected.evidence is not None:
                theirs = expected.evidence.log_evidence
                torch.testing.assert_close(found.evidence.log_evidence, theirs, rtol=0, atol=1e-5)


WAITS = {
    "free": (0, 0, 2),
    "top-p": (0, 0, 2),
    "prompt": (0, 0, 5),
    "blanks": (0, 0, 2),
    "particles": (0, 4, 12),
    "mask": (3, 3),
    "masks": (4, 4),
}
"""The most waits of the host for one more token, by the models of `MODELS`."""


@pytest.mark.parametrize("request_", WAITS)
def test_a_token_costs_few_waits(request_, monkeypatch):
    monkeypatch.setitem(reference.STEPS, torch.float32, (1, 1))
    for name, most in zip(MODELS, WAITS[request_], strict=False):
        with pretend("cuda") as gpu:
            # as it runs there, in float32 with a cache in half precision
            there = MODELS[name]().float().eval().to("cuda")
            counts = []
            for num_tokens in (5, 6):
                options = {"num_tokens": num_tokens, "num": 2} | REQUESTS[request_]
                with gpu.counting() as counted:
                    written(there, **options)
                counts.append(counted.waits)
        more = counts[1] - counts[0]
        assert more.total() <= most, (name, more)


def test_rows_leave_a_cache_within_its_memory():
    """A copy beside it would not fit on a GPU that is full of keys and values."""
    with pretend("cuda") as gpu:
        model = tiny_ar(context=64, layers=4).float().to("cuda")
        cache = model.allocate_cache(32, 64)
        cache.extend(torch.randn(32, 64, 8, device="cuda"))
        expected = cache.stored[:, :, 8:].cpu()
        before = gpu.alive
        with gpu.counting():
            cache.keep(torch.arange(8, 32, device="cuda"))
        assert cache.stored.cpu().equal(expected)
        assert gpu.peak - before < 0.9 * expected.numel() * 4
