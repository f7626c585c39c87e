"""Which models a recipe compares: what the paper says of them, and one depth for all."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tarflowlm.model import FlowConfig
from tarflowlm.reproduce import RECIPES, ablations
from tarflowlm.reproduce.recipe import Settings


def num_layers(model) -> int:
    return sum(block.layers for block in model.blocks) if isinstance(model, FlowConfig) else model.layers


@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_fig4_is_without_the_channels_before_and_beside_it_with_them(scale):
    plan = ablations.plan_fig4(Settings(scale=scale, out=Path("out")))
    found = {}
    for training in plan:
        components, _, head = training.label.partition(", ")
        for block in training.run.model.blocks:
            assert f"K = {block.components}" == components
            assert block.coupling == "mix1"
            assert block.sees_channels is (head != ablations.ALONE)
            assert block.start == ("codebook" if head == ablations.STARTED else "plain")
        found.setdefault(head, []).append(training.run.model.blocks[0].components)
    every = [1, 2, 4, 8, 16, 27]
    assert found == {ablations.ALONE: every, ablations.HEAD: every} | (
        {ablations.STARTED: [27]} if scale == "mini" else {}
    )
    assert len({training.run.optim for training in plan}) == 1
    assert len({training.run.train for training in plan}) == 1


@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_fig5_has_two_tokens_per_position_in_every_model(scale):
    settings = Settings(scale=scale, out=Path("out"))
    runs = {t.label: t.run for t in ablations.plan_fig5(settings) if t.label != "judge"}
    assert {run.model.patch for run in runs.values()} == {2}
    mix1, one_token = runs["Mix-1, head over the patch"], settings.preset("mix1", "owt")
    assert replace(mix1, name=one_token.name, model=replace(mix1.model, patch=1)) == one_token
    with torch.device("meta"):
        heads = replace(mix1.model, vocab_size=27).build().couplings
    # a group per channel of the patch, and each sees all before it
    channels = 2 * mix1.model.latent_dim
    assert [(head.head.groups, head.head.num_known) for head in heads] == [(channels, channels - 1)] * 3
    assert runs["Mix-d, in-patch weights"].model.in_patch == "autoregressive"
    assert runs["Mix-d, independent weights"].model.in_patch == "independent"
    assert runs["two-token AR"].model.in_patch == "independent"


@pytest.mark.parametrize("name", ["fig2", "fig3", "table6", "fig5"])
def test_what_the_paper_did_on_openwebtext_is_done_there(name):
    plan = RECIPES[name].plan(Settings(scale="paper", out=Path("out")))
    assert {training.run.data.source for training in plan} == {"openwebtext"}


@pytest.mark.parametrize(("scale", "layers"), [("mini", 6), ("paper", 12)])
@pytest.mark.parametrize("name", ["fig2", "fig3", "fig4", "table2"])
def test_likelihoods_compare_models_of_one_depth(name, scale, layers):
    plan = RECIPES[name].plan(Settings(scale=scale, out=Path("out")))
    depths = {training.label: num_layers(training.run.model) for training in plan}
    deeper = {"Mix-d with two layers more": 8} if (name, scale) == ("table2", "mini") else {}
    assert depths == dict.fromkeys(depths, layers) | deeper


@pytest.mark.parametrize(("scale", "components"), [("mini", [27, 2, 2, 2, 2, 2]), ("paper", [64] * 6)])
def test_fig3_has_six_blocks_of_either_coupling(scale, components):
    affine, mix1 = ablations.plan_fig3(Settings(scale=scale, out=Path("out")))
    assert [block.components for block in mix1.run.model.blocks] == components
    assert [block.components for block in affine.run.model.blocks] == [1] * 6
    assert {block.coupling for block in affine.run.model.blocks} == {"affine"}
    assert {block.layers for block in mix1.run.model.blocks} == {1 if scale == "mini" else 2}
