"""Presets: the paper's models block for block, and families of one size."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from tarflowlm.errors import UserError
from tarflowlm.flow.channelwise import AffineCoupling, Mix1Coupling
from tarflowlm.flow.couplings import Coupling
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.model import TarFlowLM
from tarflowlm.model_config import FlowConfig, TransformerConfig
from tarflowlm.presets import PRESETS, preset, with_fields

CORPORA = ("text8", "owt")
VOCAB, CHANNELS, COMPONENTS = (
    {"text8": 27, "owt": 50_257},
    {"text8": 5, "owt": 16},
    {"text8": 27, "owt": 64},
)
CONTEXT = {"text8": 256, "owt": 1024}
PAPER_FLOWS = [f"{corpus}-{kind}" for corpus in CORPORA for kind in ("affine", "mix1", "mixd")]


@cache
def built(name: str, **fields) -> TarFlowLM:
    """The model of a preset with its vocabulary: shapes without values."""
    with torch.device("meta"):
        return replace(preset(name).model, vocab_size=VOCAB[name.split("-")[0]], **fields).build()


def couplings_of(model: TarFlowLM) -> list[Coupling]:
    return [block.coupling for block in model.prior.blocks]


def depth(name: str) -> int:
    model = preset(name).model
    return (
        sum(block.layers for block in model.blocks)
        if isinstance(model, FlowConfig)
        else model.layers
    )


@pytest.mark.parametrize("family", ["mini", "paper-mini", "english-small", "stories", *CORPORA])
def test_members_of_a_family_differ_by_the_model_alone(family):
    runs = [preset(name) for name in PRESETS if name.startswith(family)]
    # the baseline has no codebook, and how fast one may move depends on whether its coupling is
    # tied to it; the plain couplings of the mini size have a rate of their own
    plain = [run for run in runs if run.name.removeprefix("paper-") in ("mini-affine", "mini-mix1")]
    assert {run.optim.lr for run in plain} <= {1.2e-2}
    others = [run for run in runs if run not in plain]
    assert len({replace(run.optim, codebook_lr_scale=1.0) for run in others}) == 1
    assert len({replace(run.optim, codebook_lr_scale=1.0, lr=1.0) for run in runs}) == 1
    assert (
        len({(run.data, run.model.trunk, run.model.context, run.train.batch_size) for run in runs})
        == 1
    )


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("mini", 6),
        ("paper-mini", 6),
        ("english-small", 7),
        ("stories", 7),
        ("text8", 12),
        ("owt", 12),
    ],
)
def test_members_of_a_family_have_one_depth(family, layers):
    depths = {name: depth(name) for name in PRESETS if name.startswith(family)}
    assert len(depths) >= (2 if family in ("english-small", "stories") else 4)
    deeper = {"mini-mixd-deep": layers + 2} if family == "mini" else {}
    assert depths == dict.fromkeys(depths, layers) | deeper


@pytest.mark.parametrize("name", PAPER_FLOWS)
def test_flows_of_the_paper_share_their_shape(name):
    """Width, heads, channels per token, codebook, alternating directions, and channel mixing only
    for P > 1.
    """
    corpus = name.split("-")[0]
    model, config = built(name), preset(name).model
    assert config.trunk == TransformerConfig(width=768, num_heads=12)
    assert (config.patch, config.context) == (1, CONTEXT[corpus])
    assert (config.input_map, config.reads_tokens) == ("linear", False)
    assert model.codebook.mean.shape == (VOCAB[corpus], CHANNELS[corpus])
    assert [block.order.reverse for block in model.prior.blocks] == [False, True, False]
    assert len(model.prior.blocks) == 3
    assert [block.order.mixes for block in model.prior.blocks] == [False, False, False]
    assert [block.order.mixes for block in built(name, patch=2).prior.blocks] == [False, True, True]


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize(
    ("name", "kind", "outputs"), [("mix1", Mix1Coupling, 3), ("affine", AffineCoupling, 2)]
)
def test_mix1_and_affine_are_the_papers(corpus, name, kind, outputs):
    """Weights, means and scales of K components per channel, or one mean and scale, from the
    channels before.
    """
    run, model = preset(f"{corpus}-{name}"), built(f"{corpus}-{name}")
    assert [len(block.transformer.layers) for block in model.prior.blocks] == [2, 2, 8]
    channels, components = CHANNELS[corpus], COMPONENTS[corpus] if name == "mix1" else 1
    for coupling in couplings_of(model):
        assert type(coupling) is kind
        assert [tuple(bias.shape) for bias in coupling.head.biases] == [
            (channels, components)
        ] * outputs
        assert coupling.head.num_known == channels - 1
    assert run.train.mode == "joint"


@pytest.mark.parametrize(("name", "count"), [("owt-mix1", 3_146_448), ("text8-mix1", 887_199)])
def test_heads_of_the_paper_have_its_masked_layers_and_nothing_else(name, count):
    """Its outer layers are block-diagonal; dense ones would have 12.0 M on OpenWebText."""
    model = built(name)
    heads = [coupling.head for coupling in couplings_of(model)]
    assert sum(p.numel() for head in heads for p in head.parameters()) == count
    assert all(head.embed_bias is not None and head.evidence is None for head in heads)


@pytest.mark.parametrize(("corpus", "upper"), [("text8", 2), ("owt", 64)])
def test_mixd_is_the_papers(corpus, upper):
    """Block 1 is tied to the codebook (K = V), the others are Mix-1, and training goes block by
    block.
    """
    model, run = built(f"{corpus}-mixd"), preset(f"{corpus}-mixd")
    tied, *others = couplings_of(model)
    assert isinstance(tied, MixDCoupling)
    assert tied.uses_encoder_codebook
    for coupling in others:
        assert type(coupling) is Mix1Coupling
        assert [tuple(bias.shape) for bias in coupling.head.biases] == [
            (CHANNELS[corpus], upper)
        ] * 3
    assert (run.train.mode, run.num_stages) == ("progressive", 3)


def block_1(name: str) -> tuple[TarFlowLM, Mix1Coupling]:
    """A preset of little width and depth, and the coupling of its block 1."""
    config = preset(name).model
    model = replace(
        config,
        vocab_size=27,
        trunk=TransformerConfig(width=8, num_heads=2),
        blocks=tuple(replace(block, layers=1) for block in config.blocks),
    ).build()
    return model, model.prior.block(0).coupling


@pytest.mark.parametrize("name", ["mini-affine", "mini-mix1", "paper-mini-mix1"])
@pytest.mark.parametrize("starts", ["first", "last"])
def test_one_block_starts_by_reading_the_past(name, starts):
    trunk = TransformerConfig(width=8, num_heads=2)
    model = replace(preset(name).model, vocab_size=27, trunk=trunk, starts=starts).build()
    heads = [block.coupling.head for block in model.prior.blocks]
    # the others are near the identity, whatever the features
    reads = [bool(head.weights[0].any()) for head in heads]
    assert reads == [starts == "first", False, starts == "last"]


@pytest.mark.parametrize("name", ["text8-mix1", "mini-mix1"])
def test_a_plain_block_1_knows_nothing_of_the_codebook(name):
    model, coupling = block_1(name)
    other = block_1(name)[0]
    assert not torch.equal(model.codebook.mean, other.codebook.mean)
    head = coupling.head
    # channels have the same means, and another codebook gives no others
    assert torch.equal(head.biases[1], head.biases[1][:1].expand_as(head.biases[1]))
    assert torch.equal(head.biases[1], other.prior.block(0).coupling.head.biases[1])
    assert not head.biases[0].any()
    assert head.evidence is None if name == "text8-mix1" else not head.evidence.any()


def test_a_coupling_is_a_field_of_a_block_alone():
    assert with_fields(preset("mini-mixd"), {"model.blocks.1.coupling": "affine"})
    with pytest.raises(UserError, match=r"^model\.coupling: unknown key"):
        with_fields(preset("mini-mixd"), {"model.coupling": "mix1"})
