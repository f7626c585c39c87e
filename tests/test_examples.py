"""The examples in docstrings print what they show."""

import doctest
from importlib import import_module

import pytest
import torch

MODULES = {
    "flow.codebook": "Codebook",
    "flow.mixd": "MixDCoupling",
    "flow.stack": "Prior",
    "model": "TarFlowLM",
    "model_config": "FlowConfig",
    "objective": "elbo",
}


@pytest.mark.parametrize(("module", "name"), MODULES.items())
def test_examples_print_what_they_show(module, name):
    found = import_module(f"tarflowlm.{module}")
    example, *_ = doctest.DocTestFinder(recurse=False).find(getattr(found, name), name, found)
    assert example.examples
    with torch.random.fork_rng():
        torch.manual_seed(0)
        runner = doctest.DocTestRunner()
        runner.run(example)
    assert runner.failures == 0
