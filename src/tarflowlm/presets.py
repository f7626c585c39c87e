"""Named run configurations.

Members of a family share Transformer size, data, optimiser, schedule, and the tokens that block 1
sees.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import NamedTuple

from tarflowlm.config import DataConfig, OptimConfig, RunConfig, TokenizerConfig, TrainConfig
from tarflowlm.errors import UserError, guess
from tarflowlm.model_config import (
    Affine,
    BaselineConfig,
    BlockConfig,
    FlowConfig,
    Mix1,
    MixD,
    TransformerConfig,
)
from tarflowlm.schema import Count, Positive, check_type, checked, from_dict, to_dict

# a convolution of the inputs helps models of letters; block 1 of a flow over word pieces gains by
# reading tokens (docs/log.md)
MINI_TRUNK = TransformerConfig(width=128, num_heads=2, input_taps=4)
MINI_TRAIN = TrainConfig(stage_steps=(2600,), test_windows=4096)
"""Steps of 8 sequences of 256 tokens each: 5.3 M tokens."""
MIXD_OPTIM = OptimConfig(codebook_lr_scale=0.5)
"""If block 1 is tied to the codebook, the codebook moves at half of the rate (docs/log.md)."""
PLAIN_OPTIM = OptimConfig(lr=1.2e-2, codebook_lr_scale=1.0)
"""Twice the usual rate, which is better on validation for both families (docs/log.md)."""
CALM = 0.8
"""Temperature of samples of letters, and of the model of `quickstart`."""


def _quickstart(name: str) -> RunConfig:
    """One block, which learns the whole time."""
    model = FlowConfig(
        context=256,
        latent_dim=16,
        trunk=TransformerConfig(width=128, num_heads=2, layer="qwen3"),
        blocks=(MixD(layers=4),),
        reads_tokens=True,
    )
    pieces = TokenizerConfig(kind="bpe", vocab_size=2048, normalize="none")
    return RunConfig(
        name=name,
        model=model,
        data=DataConfig(source="stories", tokenizer=pieces),
        train=TrainConfig(stage_steps=(1,), minutes=5.0, evaluate_every=200, test_windows=400),
        optim=MIXD_OPTIM,
        temperature=CALM,
    )


def _english_small(name: str) -> RunConfig:
    trunk = TransformerConfig(width=192, num_heads=3)
    pieces = TokenizerConfig(kind="bpe", vocab_size=2048, normalize="none")
    return RunConfig(
        name=name,
        model=FlowConfig(
            context=512,
            latent_dim=16,
            trunk=trunk,
            blocks=(MixD(layers=7),),
            reads_tokens=True,
        ),
        data=DataConfig(tokenizer=pieces),
        train=TrainConfig(stage_steps=(13000,), batch_size=8),
        # eight passes over the text (docs/log.md)
        optim=replace(MIXD_OPTIM, weight_decay=0.5),
        # docs/samples.md has the rule
        temperature=0.9,
        top_p=0.9,
    )


def _stories(name: str) -> RunConfig:
    small = _english_small(name)
    trunk = replace(small.model.trunk, layer="qwen3")
    pieces = replace(small.data.tokenizer, vocab_size=4096)
    return replace(
        small,
        model=replace(small.model, trunk=trunk),
        data=DataConfig(source="stories", tokenizer=pieces),
        train=replace(small.train, stage_steps=(5_000,)),
        # two passes over so many stories want hardly any (docs/log.md)
        optim=replace(small.optim, weight_decay=0.0125),
    )


def _twin(name: str, *, flow: Callable[[str], RunConfig]) -> RunConfig:
    """The baseline with the Transformer, the text and the training of a flow of one block."""
    run = flow(name)
    assert isinstance(run.model, FlowConfig)
    (block,) = run.model.blocks
    model = BaselineConfig(context=run.model.context, trunk=run.model.trunk, layers=block.layers)
    return replace(run, model=model, optim=OptimConfig(weight_decay=run.optim.weight_decay))


def _mini_ar(name: str) -> RunConfig:
    model = BaselineConfig(trunk=MINI_TRUNK, layers=6)
    return RunConfig(name=name, model=model, train=MINI_TRAIN, temperature=CALM)


def _mini_joint(name: str, block: BlockConfig) -> RunConfig:
    """Three blocks with layers in the proportions of the paper's 2, 2, 8."""
    blocks = (block, block, replace(block, layers=4))
    model = FlowConfig(
        trunk=MINI_TRUNK,
        blocks=blocks,
        channel_mix=None,
        # otherwise the seed decides which block of Mix-1 becomes the language model (docs/log.md)
        starts="last" if isinstance(block, Mix1) else "first",
    )
    train = replace(MINI_TRAIN, mode="joint")
    return RunConfig(name=name, model=model, train=train, optim=PLAIN_OPTIM)


def _mini_mixd(name: str, *, layers: int = 4, patch: int = 1) -> RunConfig:
    blocks = (MixD(layers=layers), Mix1(), Mix1())
    model = FlowConfig(trunk=MINI_TRUNK, patch=patch, blocks=blocks, reads_tokens=True)
    train = replace(MINI_TRAIN, stage_steps=(2600, 300, 300))
    return RunConfig(name=name, model=model, train=train, optim=MIXD_OPTIM, temperature=CALM)


def _mini_passes(name: str) -> RunConfig:
    model = FlowConfig(
        trunk=MINI_TRUNK,
        blocks=(MixD(certainty=0.991), MixD(layers=5)),
        channel_mix=None,
        alternate=False,
        reads_tokens=True,
    )
    train = replace(MINI_TRAIN, stage_steps=(600, 2600))
    return replace(_mini_mixd(name), model=model, train=train)


def _paper_baseline(name: str) -> RunConfig:
    """At CPU size, or on text8 or OpenWebText, on 65,536 tokens at once, for a GPU of 80 GB."""
    if name.startswith("paper-mini"):
        model = BaselineConfig(trunk=replace(MINI_TRUNK, input_taps=0), layers=6)
        return RunConfig(name=name, model=model, train=MINI_TRAIN)
    is_text8 = name.startswith("text8")
    pieces = TokenizerConfig(kind="bpe", source="gpt2", normalize="none")
    train = TrainConfig(
        mode="joint",
        stage_steps=(100_000 if is_text8 else 200_000,),
        batch_size=512 if is_text8 else 256,
        tokens_at_once=65_536,
        precision="bfloat16",
        # text8 is seen a hundred times
        dropout=0.1 if is_text8 else 0.0,
        evaluate_every=2000,
        evaluate_windows=512,
        checkpoint_every=2000,
        log_every=50,
    )
    return RunConfig(
        name=name,
        model=BaselineConfig(
            context=256 if is_text8 else 1024,
            trunk=TransformerConfig(width=768, num_heads=12),
            layers=12,
        ),
        data=DataConfig(source="text8")
        if is_text8
        else DataConfig(source="openwebtext", tokenizer=pieces),
        optim=OptimConfig(lr=1e-3, warmup=0.01),
        train=train,
    )


def _paper_flow(name: str) -> RunConfig:
    """A flow as the paper words it, trained as its baseline.

    docs/reproduce.md lists the values that the paper leaves open. The recipe is ours: Muon, a rate
    that falls to zero, and on a GPU short stages for the blocks above Mix-d. At CPU size these may
    take as many steps as block 1, until the bound stabilises.
    """
    corpus, _, kind = name.rpartition("-")
    is_mini = corpus == "paper-mini"
    baseline = _paper_baseline(name)
    latent_dim, components, upper = (16, 64, 64) if corpus == "owt" else (5, 27, 2)
    least = 1 if is_mini else 2
    shares = (least, least, 4 * least)
    blocks: dict[str, tuple[BlockConfig, ...]] = {
        "affine": tuple(Affine(layers=layers) for layers in shares),
        "mix1": tuple(Mix1(layers=layers, components=components) for layers in shares),
        "mixd": (MixD(layers=4 * least), *(Mix1(layers=least, components=upper),) * 2),
    }
    model = FlowConfig(
        context=baseline.model.context,
        latent_dim=latent_dim,
        trunk=baseline.model.trunk,
        blocks=blocks[kind],
        head="paper",
        input_map="linear",
        channel_mix=None,
        starts="last" if kind == "mix1" else "first",
    )
    optim = MIXD_OPTIM if kind == "mixd" else PLAIN_OPTIM
    if not is_mini:
        optim = replace(baseline.optim, codebook_lr_scale=optim.codebook_lr_scale)
    train = replace(baseline.train, mode="joint")
    if kind == "mixd":
        steps = train.num_steps
        upper_steps = steps if is_mini else steps // 25
        stages = (steps, upper_steps, upper_steps)
        train = replace(train, mode="progressive", stage_steps=stages)
        if is_mini:
            train = replace(train, evaluate_every=100, patience=3)
    return replace(baseline, model=model, optim=optim, train=train)


class Preset(NamedTuple):
    """A named run configuration."""

    help: str
    make: Callable[[str], RunConfig]
    """Makes the configuration from its name."""


PRESETS = {
    "quickstart": Preset(
        "A few minutes on two CPU cores: a Mix-d block that learns short stories.",
        _quickstart,
    ),
    "stories": Preset(
        "Short stories in the words of a four-year-old: an hour and a half of one CPU core.",
        _stories,
    ),
    "stories-ar": Preset(
        "The discrete twin of `stories`, with as many Transformer layers and steps.",
        partial(_twin, flow=_stories),
    ),
    "english-small": Preset(
        "Fairy tales with capitals and signs, that begin and end: five hours of one fast CPU core.",
        _english_small,
    ),
    "english-small-ar": Preset(
        "The discrete twin of `english-small`, with as many Transformer layers and steps.",
        partial(_twin, flow=_english_small),
    ),
    "mini-ar": Preset("The discrete baseline at CPU size.", _mini_ar),
    "mini-affine": Preset(
        "Three affine blocks with as many Transformer layers together as the baseline.",
        partial(_mini_joint, block=Affine()),
    ),
    "mini-mix1": Preset(
        "Three Mix-1 blocks with as many Transformer layers together as the baseline.",
        partial(_mini_joint, block=Mix1(components=27)),
    ),
    "mini-mixd": Preset(
        "A tied Mix-d block of four Transformer layers, then two Mix-1 blocks of one layer.",
        _mini_mixd,
    ),
    "mini-mixd-deep": Preset(
        "`mini-mixd` with six layers in block 1: two more than the baseline has over the stack.",
        partial(_mini_mixd, layers=6),
    ),
    "mini-mixd-p2": Preset(
        "`mini-mixd` with two tokens per position.", partial(_mini_mixd, patch=2)
    ),
    "mini-mixd-p4": Preset(
        "`mini-mixd` with four tokens per position.", partial(_mini_mixd, patch=4)
    ),
    "mini-passes": Preset(
        "Passes that refine a text at little cost (docs/math.md, eq. 9a). The last Mix-d block "
        "writes a text with gaps, which the other block fills in.",
        _mini_passes,
    ),
} | {
    f"{corpus}-{kind}": Preset(
        f"The paper's set-up {place}: {what}.",
        _paper_baseline if kind == "ar" else _paper_flow,
    )
    for corpus, place in {
        "paper-mini": "as worded, at CPU size",
        "text8": "on text8, as large as GPT-2 small",
        "owt": "on owt, as large as GPT-2 small",
    }.items()
    for kind, what in {
        "ar": "the discrete baseline",
        "affine": "three affine blocks",
        "mix1": "three Mix-1 blocks",
        "mixd": "a Mix-d block, then two Mix-1 blocks",
    }.items()
}
FOR_CPU = [name for name in PRESETS if not name.startswith(("text8", "owt"))]
"""The presets that error messages offer: each trains on a CPU."""


def preset(name: str) -> RunConfig:
    """The run configuration of that name."""
    check_type(name, "preset", str, "give a name, a str")
    if name not in PRESETS:
        raise UserError(
            f"preset {name!r} is unknown: {guess(name, PRESETS)}on a CPU choose one of "
            f"{', '.join(FOR_CPU)}; `tarflowlm train --help` describes all {len(PRESETS)}"
        )
    return PRESETS[name].make(name)


def check_time(minutes: object, steps: object) -> None:
    """UserError unless one or none says how long to train: `minutes`, or `steps`."""
    checked(minutes, Positive | None, "minutes")
    checked(steps, Count | None, "steps")
    if minutes is not None and steps is not None:
        raise UserError(f"minutes {minutes} with steps {steps}: leave one of them out")


def with_blocks(run: RunConfig, numbers: Sequence[int]) -> RunConfig:
    """`run` with only these blocks (0-based) of its stack, and their stages."""
    model, steps = run.model, run.train.stage_steps
    if isinstance(model, FlowConfig):
        model = replace(model, blocks=tuple(model.blocks[number] for number in numbers))
    if run.num_stages > 1:
        steps = tuple(steps[number] for number in numbers)
    return replace(run, model=model, train=replace(run.train, stage_steps=steps))


def with_fields(run: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """`run` with fields set by their dotted names, such as "model.blocks.0.layers".

    "model.blocks.0.coupling" gives a block another coupling, with its default options.
    UserError for a name that is not a field.
    """
    changed = to_dict(run)
    for name, value in values.items():
        *parents, last = [int(key) if key.isdigit() else key for key in name.split(".")]
        try:
            place = reduce(operator.getitem, parents, changed)
            if last == BlockConfig.KEY and last in place:
                # without the options of the old coupling
                for key in set(place) - {"layers"}:
                    del place[key]
            place[last] = to_dict(value)
        except (LookupError, TypeError):
            listed = "`tarflowlm train PRESET --help` lists them"
            raise UserError(f"{name}: a run has no such field; {listed}") from None
    return from_dict(RunConfig, changed, where="")


def with_steps(run: RunConfig, num_steps: int) -> RunConfig:
    """`run` with `num_steps` optimiser steps instead of its steps or time.

    Its stages keep their proportions. UserError for fewer steps than stages.
    """
    stages = run.train.stage_steps
    least = sum(map(bool, stages))
    if num_steps < least:
        raise UserError(f"steps {num_steps}: must be at least {least}, one for each stage")
    # a stage without steps adds no block
    scaled = [max(1, round(s * num_steps / sum(stages))) if s else 0 for s in stages]
    while sum(scaled) != num_steps:
        # the longest stage gets the steps that rounding left over, and keeps at least one
        longest = scaled.index(max(scaled))
        scaled[longest] = max(1, scaled[longest] + num_steps - sum(scaled))
    return replace(run, train=replace(run.train, stage_steps=tuple(scaled), minutes=0.0))
