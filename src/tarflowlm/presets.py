"""Named run configurations.

Members of a family share Transformer size, data, optimiser, schedule, and the tokens that block 1
sees.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
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

# a convolution of the inputs helps letters; block 1 of a flow over word pieces gains by reading
# tokens (docs/log.md)
MINI_TRUNK = TransformerConfig(width=128, num_heads=2, input_taps=4)
MINI_STEPS = 2600
"""Steps of 8 sequences of 256 tokens each: 5.3 M tokens."""
PAPER_SHARES = (1, 1, 4)
"""Layers of the blocks in the proportions of the paper's 2, 2, 8."""
MINI_TRAIN = TrainConfig(stage_steps=(MINI_STEPS,), test_windows=4096)

SMALL_TRUNK = TransformerConfig(width=192, num_heads=3)
SMALL_DATA = DataConfig(tokenizer=TokenizerConfig(kind="bpe", vocab_size=2048, normalize="none"))
SMALL_TRAIN = TrainConfig(stage_steps=(100,), minutes=110.0, batch_size=16)

MIXD_CODEBOOK = 0.5
"""Learning rate of a codebook that is tied to block 1, over the rate of the rest (docs/log.md)."""
PLAIN_CODEBOOK = 1.0
"""The same where nothing starts from the codebook."""
MIXD_OPTIM = OptimConfig(codebook_lr_scale=MIXD_CODEBOOK)
PLAIN_OPTIM = OptimConfig(lr=1.2e-2, codebook_lr_scale=PLAIN_CODEBOOK)
"""Twice the rate of the rest, better on validation for both families, seed 0 (docs/log.md)."""

CALM = 0.8
"""Temperature of samples of small models that have token weights."""

PAPER_TRUNK = TransformerConfig(width=768, num_heads=12)
"""The size of GPT-2 small."""
TOKENS_AT_ONCE = 65_536
"""Tokens of the paper's presets that one GPU of 80 GB trains on at once (`train.accumulate`)."""


def quickstart() -> RunConfig:
    """A few minutes on two CPU cores: a Mix-d block and two Mix-1 blocks on the built-in corpus."""
    trunk = replace(MINI_TRUNK, input_taps=0)
    model = FlowConfig(context=128, latent_dim=16, trunk=trunk, reads_tokens=True)
    words = TokenizerConfig(kind="bpe", vocab_size=2048, normalize="auto")
    data = DataConfig(tokenizer=words)
    train = TrainConfig(stage_steps=(85, 8, 7), minutes=5.0, evaluate_every=200, test_windows=1000)
    return RunConfig(
        name="quickstart", model=model, data=data, train=train, optim=MIXD_OPTIM, temperature=CALM
    )


def english_small() -> RunConfig:
    """Fairy tales with capitals and signs, that begin and end: two hours of one fast CPU core."""
    blocks = (MixD(layers=6), Mix1())
    return RunConfig(
        name="english-small",
        model=FlowConfig(latent_dim=16, trunk=SMALL_TRUNK, blocks=blocks, reads_tokens=True),
        data=SMALL_DATA,
        train=replace(SMALL_TRAIN, stage_steps=(96, 4)),
        optim=MIXD_OPTIM,
        temperature=CALM,
    )


def english_small_ar() -> RunConfig:
    """The discrete twin of `english-small`, with as many Transformer layers, trained as long."""
    model = BaselineConfig(trunk=SMALL_TRUNK, layers=7)
    return RunConfig(
        name="english-small-ar", model=model, data=SMALL_DATA, train=SMALL_TRAIN, temperature=CALM
    )


def mini_ar() -> RunConfig:
    """The discrete baseline at CPU size."""
    model = BaselineConfig(trunk=MINI_TRUNK, layers=6)
    return RunConfig(name="mini-ar", model=model, train=MINI_TRAIN, temperature=CALM)


def mini_affine() -> RunConfig:
    """Three affine blocks with as many Transformer layers together as the baseline."""
    blocks = tuple(Affine(layers=layers) for layers in PAPER_SHARES)
    return _mini_joint("mini-affine", blocks, PLAIN_OPTIM)


def mini_mix1() -> RunConfig:
    """Three Mix-1 blocks in the paper's shares of layers, with as many together as the baseline."""
    blocks = tuple(Mix1(layers=layers, components=27) for layers in PAPER_SHARES)
    return _mini_joint("mini-mix1", blocks, PLAIN_OPTIM)


def mini_mixd() -> RunConfig:
    """A tied Mix-d block of four Transformer layers, then two Mix-1 blocks of one layer."""
    return _mini_mixd("mini-mixd")


def mini_mixd_deep() -> RunConfig:
    """`mini-mixd` with six layers in block 1: two more than the baseline has over the stack."""
    return _mini_mixd("mini-mixd-deep", layers=6)


def mini_mixd_p2() -> RunConfig:
    """`mini-mixd` with two tokens per position."""
    return _mini_mixd("mini-mixd-p2", patch=2)


def mini_mixd_p4() -> RunConfig:
    """`mini-mixd` with four tokens per position."""
    return _mini_mixd("mini-mixd-p4", patch=4)


def mini_passes() -> RunConfig:
    """Passes that refine a text at little cost (docs/math.md, eq. 9a).

    The last Mix-d block writes a text with gaps, which the other block fills in.
    """
    run = mini_mixd()
    model = FlowConfig(
        trunk=MINI_TRUNK,
        blocks=(MixD(certainty=0.991), MixD(layers=5)),
        channel_mix=None,
        alternate=False,
        reads_tokens=True,
    )
    train = replace(MINI_TRAIN, stage_steps=(600, MINI_STEPS))
    return replace(run, name="mini-passes", model=model, train=train)


def _mini_joint(name: str, blocks: tuple[BlockConfig, ...], optim: OptimConfig) -> RunConfig:
    model = FlowConfig(trunk=MINI_TRUNK, blocks=blocks, channel_mix=None)
    return RunConfig(name=name, model=model, train=replace(MINI_TRAIN, mode="joint"), optim=optim)


def _mini_mixd(name: str, *, layers: int = 4, patch: int = 1) -> RunConfig:
    blocks = (MixD(layers=layers), Mix1(), Mix1())
    model = FlowConfig(trunk=MINI_TRUNK, patch=patch, blocks=blocks, reads_tokens=True)
    train = replace(MINI_TRAIN, stage_steps=(MINI_STEPS, 300, 300))
    return RunConfig(name=name, model=model, train=train, optim=MIXD_OPTIM, temperature=CALM)


class _Corpus(NamedTuple):
    """The facts that the paper's set-up takes from a corpus."""

    data: DataConfig
    context: int
    latent_dim: int
    steps: int
    batch_size: int
    dropout: float
    """For our recipe: text8 is seen a hundred times."""
    components: int
    """K of Mix-1."""
    upper_components: int
    """K of the Mix-1 blocks above Mix-d."""


PAPER_CORPORA = {
    "text8": _Corpus(
        data=DataConfig(source="text8"),
        context=256,
        latent_dim=5,
        steps=100_000,
        batch_size=512,
        dropout=0.1,
        components=27,
        upper_components=2,
    ),
    "owt": _Corpus(
        data=DataConfig(
            source="openwebtext",
            tokenizer=TokenizerConfig(kind="bpe", source="gpt2", normalize="none"),
        ),
        context=1024,
        latent_dim=16,
        steps=200_000,
        batch_size=256,
        dropout=0.0,
        components=64,
        upper_components=64,
    ),
}
_KINDS = {
    "ar": "the discrete baseline",
    "affine": "three affine blocks",
    "mix1": "three Mix-1 blocks",
    "mixd": "a Mix-d block, then two Mix-1 blocks",
}


def _paper(name: str, corpus: _Corpus, kind: str, *, is_adamw: bool) -> RunConfig:
    """One of the published models.

    docs/reproduce.md lists the values that the paper leaves open. The recipe is ours: Muon, a rate
    that falls to zero, and short stages for the blocks above Mix-d, which gained little at mini
    size. "-adamw" is the recipe of D3PM, MDLM and MD4, to which the paper points: a constant rate
    and averaged weights over a million steps.
    """
    steps, batch_size = corpus.steps, corpus.batch_size
    upper = steps // 25
    optim = OptimConfig(lr=1e-3, warmup=0.01)
    if is_adamw:
        steps, batch_size = (714_286 if kind == "mixd" else 1_000_000), 512
        upper = steps // 5
        optim = OptimConfig(
            optimizer="adamw",
            lr=3e-4,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            warmup=2500 / steps,
            decay=0.0,
        )
    if kind != "ar":
        scale = MIXD_CODEBOOK if kind == "mixd" else PLAIN_CODEBOOK
        optim = replace(optim, codebook_lr_scale=scale)
    train = TrainConfig(
        mode="progressive" if kind == "mixd" else "joint",
        stage_steps=(steps, upper, upper) if kind == "mixd" else (steps,),
        batch_size=batch_size,
        accumulate=batch_size * corpus.context // TOKENS_AT_ONCE,
        precision="bfloat16",
        dropout=0.1 if is_adamw else corpus.dropout,
        ema=0.9999 if is_adamw else 0.0,
        evaluate_every=2000,
        evaluate_windows=512,
        checkpoint_every=2000,
        log_every=50,
    )
    model = _paper_model(corpus, kind)
    return RunConfig(name=name, model=model, data=corpus.data, optim=optim, train=train)


def _paper_model(corpus: _Corpus, kind: str) -> BaselineConfig | FlowConfig:
    if kind == "ar":
        return BaselineConfig(context=corpus.context, trunk=PAPER_TRUNK, layers=12)
    if kind == "mixd":
        upper = Mix1(layers=2, components=corpus.upper_components)
        blocks: tuple[BlockConfig, ...] = (MixD(layers=8), upper, upper)
    elif kind == "mix1":
        blocks = tuple(Mix1(layers=n, components=corpus.components) for n in (2, 2, 8))
    else:
        blocks = tuple(Affine(layers=n) for n in (2, 2, 8))
    return FlowConfig(
        context=corpus.context,
        latent_dim=corpus.latent_dim,
        trunk=PAPER_TRUNK,
        blocks=blocks,
        head="paper",
        channel_mix=None,
    )


def _paper_preset(corpus: str, kind: str, recipe: str) -> Callable[[], RunConfig]:
    def make() -> RunConfig:
        name = f"{corpus}-{kind}{recipe}"
        return _paper(name, PAPER_CORPORA[corpus], kind, is_adamw=bool(recipe))

    how = ", a million steps of AdamW" if recipe else ""
    source = PAPER_CORPORA[corpus].data.source
    make.__doc__ = f"The paper's set-up on {source}, as large as GPT-2 small{how}: {_KINDS[kind]}."
    return make


_OWN = (
    quickstart,
    english_small,
    english_small_ar,
    mini_ar,
    mini_affine,
    mini_mix1,
    mini_mixd,
    mini_mixd_deep,
    mini_mixd_p2,
    mini_mixd_p4,
    mini_passes,
)
PRESETS: dict[str, Callable[[], RunConfig]] = {
    make.__name__.replace("_", "-"): make for make in _OWN
} | {
    f"{corpus}-{kind}{recipe}": _paper_preset(corpus, kind, recipe)
    for corpus in PAPER_CORPORA
    for recipe in ("", "-adamw")
    for kind in _KINDS
}
FOR_CPU = (
    "quickstart",
    "english-small",
    "mini-ar",
    "mini-affine",
    "mini-mix1",
    "mini-mixd",
    "mini-mixd-p2",
    "mini-mixd-p4",
)
"""The presets that error messages offer: each trains on a CPU."""


def preset(name: str) -> RunConfig:
    """The run configuration of that name."""
    check_type(name, "preset", str, "give a name, a str")
    if name not in PRESETS:
        raise UserError(
            f"preset {name!r} is unknown: {guess(name, PRESETS)}on a CPU choose one of "
            f"{', '.join(FOR_CPU)}; `tarflowlm train --help` describes all {len(PRESETS)}"
        )
    return PRESETS[name]()


def check_time(minutes: object, steps: object) -> None:
    """UserError unless one or none says how long to train: `minutes`, or `steps`."""
    checked(minutes, Positive | None, "minutes")
    checked(steps, Count | None, "steps")
    if minutes is not None and steps is not None:
        raise UserError(f"minutes {minutes} with steps {steps}: leave one of them out")


def with_blocks(run: RunConfig, num_blocks: int) -> RunConfig:
    """`run` with the first `num_blocks` blocks of its stack alone, and their stages."""
    steps = run.train.stage_steps[:num_blocks] if run.num_stages > 1 else run.train.stage_steps
    return replace(
        run, model=run.model.first_blocks(num_blocks), train=replace(run.train, stage_steps=steps)
    )


def with_fields(run: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """`run` with fields set by their dotted names, such as "model.blocks.0.layers".

    "model.blocks.0.coupling" gives a block another coupling, with the default options of that.
    UserError for a name that is not a field.
    """
    changed = to_dict(run)
    for name, value in values.items():
        *parents, last = [int(key) if key.isdigit() else key for key in name.split(".")]
        try:
            place = functools.reduce(operator.getitem, parents, changed)
            # options of another coupling than the one before
            for key in set(place) - {"layers"} if last == BlockConfig.KEY else ():
                del place[key]
            place[last] = to_dict(value)
        except (LookupError, TypeError):
            listed = "`tarflowlm train PRESET --help` lists them"
            raise UserError(f"{name}: a run has no such field; {listed}") from None
    return from_dict(RunConfig, changed, "run")


def with_steps(run: RunConfig, num_steps: int) -> RunConfig:
    """`run` with `num_steps` optimiser steps instead of its steps or time.

    Its stages keep their proportions. UserError for fewer steps than stages.
    """
    stages = run.train.stage_steps
    if num_steps < len(stages):
        raise UserError(f"steps {num_steps}: must be at least {len(stages)}, one for each stage")
    # a stage without steps leaves a block as it starts
    scaled = [max(1, round(s * num_steps / sum(stages))) if s else 0 for s in stages]
    while sum(scaled) != num_steps:
        # what rounding left over goes to the longest stage, down to one step
        longest = scaled.index(max(scaled))
        scaled[longest] = max(1, scaled[longest] + num_steps - sum(scaled))
    return replace(run, train=replace(run.train, stage_steps=tuple(scaled), minutes=0.0))
