"""Every preset runs where there is no CPU path: on a device that knows shapes and refuses what a GPU refuses."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import standin_cases as cases

from tarflowlm.evaluation.flops import training_flops


@pytest.fixture(scope="module")
def elsewhere():
    """elsewhere(function, *args): its result from another process, which has the device."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:

        def call(function: Callable[..., Any], *args: Any) -> Any:
            return process.submit(cases.told, function, *args).result(timeout=300)

        yield call


@pytest.mark.parametrize(("name", "stage"), cases.stages())
def test_a_training_step_stays_on_the_device(elsewhere, name, stage):
    assert elsewhere(cases.train, name, stage, "muon", False) == {"standin"}


@pytest.mark.parametrize("name", ["text8-ar", "text8-mixd"])
def test_adamw_alone_and_recomputed_layers(elsewhere, name):
    assert elsewhere(cases.train, name, 0, "adamw", True) == {"standin"}


@pytest.mark.parametrize(("name", "stage"), cases.stages())
def test_an_evaluation_stays_on_the_device(elsewhere, name, stage):
    assert elsewhere(cases.evaluate, name, stage) == {"standin"}


@pytest.mark.parametrize("name", cases.PRESETS)
def test_a_sampling_step_stays_on_the_device(elsewhere, name):
    assert elsewhere(cases.sample, name) == {"standin"}


def test_a_tensor_in_the_wrong_place_is_found(elsewhere):
    with pytest.raises(Exception, match=r"standin:0 and cpu|cpu and standin:0"):
        elsewhere(cases.train, "mini-mixd", 0, "muon", False, True)


def test_a_number_that_the_host_reads_is_found(elsewhere):
    with pytest.raises(Exception, match="_local_scalar_dense"):
        elsewhere(cases.read_a_number)


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("name", ["text8-ar", "text8-mixd"])
def test_what_is_held_between_steps(elsewhere, name, world):
    model = cases.small(name).model_of_stage(0).build()
    muon = sum(p.numel() for n, p in model.named_parameters() if "transformer.layers." in n and p.ndim == 2)
    count = sum(p.numel() for p in model.parameters())
    held = elsewhere(cases.held, name, world)
    assert held["parameters"] == count
    # a first axis that does not divide leaves some processes, the first among them, a row more
    assert held["weights"] == pytest.approx(4 * count / world, rel=0.05)
    assert held["gradients"] == held["weights"]
    # momentum of Muon, two moments of AdamW; and AdamW's step counts, a number for every parameter
    assert held["optimizer"] == pytest.approx(4 * (muon + 2 * (count - muon)) / world, rel=0.06)
    between = held["weights"] + held["optimizer"]
    assert between <= held["end"] <= between + 512 * 200
    assert held["peak"] > held["end"]


def test_a_row_of_sizes(elsewhere):
    row = elsewhere(cases.row, "text8-mixd")
    model = cases.small("text8-mixd").model_of_stage(0)
    assert (row["name"], row["stage"], row["stages"]) == ("text8-mixd", 1, 3)
    assert row["training_flops"] == training_flops(model) / model.context
    alone, _, four = row["worlds"]
    for on in row["worlds"]:
        assert on["batch"] * on["accumulate"] * on["gpus"] == 512
        assert on["peak_gb"] <= 0.02
        assert on["batch"] <= on["largest_batch"]
    assert four["largest_batch"] == pytest.approx(alone["largest_batch"], rel=0.05)
    assert alone["accumulate"] > four["accumulate"] == 1
    assert row["checkpointed_gb_per_sequence"] < row["gb_per_sequence"]
    assert row["largest"]["sequences"] == 256
    assert row["largest"]["shape"][0] % 256 == 0


def test_the_command_refuses_what_it_does_not_know(refused):
    refused("bench", "sizes", "--presets", "mini-ar", names=["mini-ar", "owt-mixd"])
    refused("bench", "sizes", "--utilisation", "2", names=["utilisation 2.0"])
