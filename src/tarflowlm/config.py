"""The configuration of a run: data, model, optimiser and schedule, each a frozen dataclass.

No torch here: the command line reads configurations without it.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import zip_longest
from typing import Any, ClassVar, Literal, TypeVar, get_args

from tarflowlm.errors import UserError

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
"""Where to run; `device.pick_device` resolves auto."""

Decoder = Literal["steps", "sweeps", "auto"]
"""How a block is inverted: position by position, in parallel sweeps, or by the cheaper of the two."""

Decoding = Literal["mode", "drawn"]
"""Which token latents become: the most probable one of p(x|z), or one drawn from it."""

Scale = Literal["mini", "paper"]
"""Of `reproduce`: models that a CPU trains, or the published size."""

Precision = Literal["float32", "bfloat16"]
"""Of matrix products."""

RECIPE_NAMES = (
    "table2", "fig2", "fig3", "fig4", "fig5", "fig6", "fig7", "table6", "progressive", "patches", "one-block",
    "frontier",
)  # fmt: skip
"""The recipes of `reproduce`."""

Normalization = Literal["none", "text8"]
NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)

TEXT8_ALPHABET = " abcdefghijklmnopqrstuvwxyz"
"""The 27 characters of text8: single spaces and `a`-`z`."""


def check_alphabet(alphabet: str) -> None:
    """UserError unless `alphabet` has at least two characters, no duplicates and no lone surrogates."""
    if len(alphabet) < 2:
        raise UserError(f"alphabet={alphabet!r} must hold at least two characters")
    duplicates = sorted({c for c in alphabet if alphabet.count(c) > 1})
    if duplicates:
        shown = ", ".join(map(repr, duplicates[:8]))
        raise UserError(f"alphabet holds {shown} more than once: list each character once")
    if any(0xD800 <= ord(c) <= 0xDFFF for c in alphabet):
        raise UserError("alphabet holds half of a surrogate pair, which is no character: remove it")


Kind = Literal["char", "byte", "bpe"]
LARGEST_BPE = 1 << 22
"""Tokens of a BPE at most: the library reserves memory for all of them, and aborts the process where it fails."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer of a run. Contradictions raise UserError and name the field."""

    kind: Kind = "char"
    """Units of text: characters of `alphabet`, UTF-8 bytes, or byte-pair encoding."""
    alphabet: str = TEXT8_ALPHABET
    """The characters of kind char, or those that BPE starts from if it is trained here on text8-normalised text."""
    vocab_size: int = 0
    """Number of tokens of a BPE trained here; 0 for every other tokenizer."""
    source: str = ""
    """BPE only: a tokenizer.json or a hub name such as gpt2. Empty: train one on the training split."""
    normalize: Normalization = "text8"
    """Normalisation of the text: none, or text8 (a-z and single spaces; digits are spelled out)."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("kind", self.kind, get_args(Kind)),
            ("normalize", self.normalize, NORMALIZATIONS),
        ):
            if value not in allowed:
                raise UserError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        if self.kind != "bpe" or self.source:
            self._check_unused_bpe_fields()
        else:
            minimum = len(self.alphabet) + 1 if self.uses_alphabet else 257
            if self.vocab_size < minimum:
                raise UserError(
                    f"vocab_size={self.vocab_size} is too small for a BPE trained here: it needs {minimum} or "
                    "more (or set source to a tokenizer.json or hub name)"
                )
            if self.vocab_size > LARGEST_BPE:
                raise UserError(f"vocab_size={self.vocab_size} is too large for a BPE: at most {LARGEST_BPE:,}")
        if self.uses_alphabet:
            check_alphabet(self.alphabet)
            missing = sorted(set(TEXT8_ALPHABET) - set(self.alphabet))
            if self.normalize == "text8" and missing:
                raise UserError(
                    f"alphabet lacks {''.join(missing)!r}, which normalize='text8' can produce: "
                    "add them or set normalize to none"
                )
        elif self.alphabet != TEXT8_ALPHABET:
            raise UserError(
                f"alphabet={self.alphabet!r} has no effect here (kind={self.kind!r}, source={self.source!r}, "
                f"normalize={self.normalize!r}): leave it out"
            )

    def _check_unused_bpe_fields(self) -> None:
        if self.kind != "bpe" and self.source:
            raise UserError(f"source={self.source!r} has no effect with kind={self.kind!r}: set kind to bpe")
        if self.vocab_size != 0:
            why = f"source={self.source!r}" if self.source else f"kind={self.kind!r}"
            raise UserError(f"vocab_size={self.vocab_size} has no effect with {why}, which fixes it: leave it out")

    @property
    def uses_alphabet(self) -> bool:
        """Whether tokens are, or start from, the characters of `alphabet`."""
        if self.kind == "char":
            return True
        return self.kind == "bpe" and not self.source and self.normalize == "text8"

    @property
    def needs_training(self) -> bool:
        """Whether `build_tokenizer` must be given training text."""
        return self.kind == "bpe" and not self.source


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text and tokens."""

    source: str = "english"
    """A corpus name (english, text8, openwebtext), a text file, or a directory made by `tarflowlm data`."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """How text becomes tokens."""


C = TypeVar("C", bound="LanguageModelConfig")
CouplingName = Literal["affine", "token-affine", "mix1", "mixd"]
"""affine and token-affine: one Gaussian, autoregressive over channels or over tokens. mix1: a mixture per channel.
mixd: a mixture per token over one codebook (docs/math.md, section 3)."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a Transformer; the number of layers is set per block."""

    width: int = 128
    """Features per position, D."""
    num_heads: int = 2
    """Attention heads H; the width must be a multiple of 2 H."""
    mlp_ratio: int = 4
    """Hidden width of the MLP, as a multiple of the width."""
    rotary_base: float = 10_000.0
    """Base of the rotary frequencies: the longest wavelength is near 2 pi times this many positions."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.num_heads < 1 or self.width % (2 * self.num_heads):
            raise UserError(
                f"width {self.width} with num_heads {self.num_heads}: the width must be a positive multiple of "
                f"2 * num_heads (rotary positions rotate pairs of channels)"
            )
        if self.mlp_ratio < 1:
            raise UserError(f"mlp_ratio {self.mlp_ratio}: must be at least 1")
        if not 0 < self.rotary_base < math.inf:
            raise UserError(f"rotary_base {self.rotary_base}: must be above 0 and finite")


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """The fields that both models share."""

    family: ClassVar[str]
    """The kind of model, as written to config.json."""
    model: ClassVar[str]
    """module:class of the model, imported when one is built: a shape needs no torch."""
    vocab_size: int = 0
    """Token types V; 0 takes it from the tokenizer."""
    context: int = 256
    """Tokens T per training sequence; generated sequences are at most as long."""
    patch: int = 1
    """Tokens P per position; P divides the context."""
    trunk: TransformerConfig = field(default_factory=TransformerConfig)
    """Shape of the Transformer; every block of a flow has its own weights."""

    def __post_init__(self) -> None:
        self.check_at_least("context", self.context, 2)
        self.check_at_least("patch", self.patch, 1)
        self.check_at_least("vocab_size", self.vocab_size, 0)
        if self.context % self.patch:
            raise UserError(
                f"patch {self.patch} does not divide context {self.context}: choose a patch that does, "
                f"or a context that is a multiple of {self.patch}"
            )

    @staticmethod
    def check_at_least(name: str, value: int, least: int) -> None:
        """UserError, naming the field, for a value below `least`."""
        if value < least:
            raise UserError(f"model.{name} {value}: must be at least {least}")

    @property
    def num_blocks(self) -> int:
        """Flow blocks L, at most one training stage each; 1 for the baseline."""
        return 1

    @property
    def has_token_weights(self) -> bool:
        """Whether a token is drawn by weights of tokens, which a temperature, top-k and top-p change as they are."""
        return True

    def first_blocks(self: C, num_blocks: int) -> C:
        """The configuration of the first `num_blocks` blocks, the model of a progressive stage."""
        assert num_blocks >= self.num_blocks
        return self

    @abstractmethod
    def deepened(self: C, factor: int) -> C:
        """The same configuration with `factor` times the Transformer layers."""

    def describe(self, block: int) -> str:
        """A short description of block `block` (0-based)."""
        return "baseline"

    def build(self) -> Any:
        """A new model of this shape, initialised from PyTorch's global generator (see `language_model.seeded`).

        UserError without a vocabulary size.
        """
        module, name = self.model.split(":")
        return getattr(import_module(module), name)(self)


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(LanguageModelConfig):
    """Shape of the baseline."""

    family: ClassVar[str] = "ar"
    model: ClassVar[str] = "tarflowlm.baseline:TokenLM"
    in_patch: Literal["autoregressive", "independent"] = "independent"
    """Tokens of a patch: independent given the earlier patches (as in the paper), or each given those before it."""
    layers: int = 6
    """Transformer layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least("layers", self.layers, 1)

    def deepened(self, factor: int) -> "BaselineConfig":
        """The same configuration with `factor` times the Transformer layers."""
        return replace(self, layers=factor * self.layers)


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One block of the stack."""

    coupling: CouplingName = "mix1"
    """The map of a position, given the positions before it."""
    layers: int = 1
    """Transformer layers."""
    start: Literal["codebook", "flattened", "plain"] = "codebook"
    """Of a mix1 block 1 with K = V: as the Mix-d coupling of the codebook; as that, its weights seeing a tenth of the
    evidence; or plain, without knowledge of the codebook, as every other block starts."""
    sees_channels: bool = True
    """Let the head of a channel see the channels before it; without, a mixture per channel given the past alone."""
    components: int = 2
    """Mixture components K; 0 ties those of mixd to the encoder's codebook; 1 for affine couplings."""


def stack(
    couplings: Sequence[CouplingName], layers: Sequence[int], components: Sequence[int]
) -> tuple[BlockConfig, ...]:
    """Blocks from their couplings, layers and components, block 1 first. UserError for unequal lengths."""
    if not len(couplings) == len(layers) == len(components):
        raise UserError(
            f"couplings {tuple(couplings)}, layers {tuple(layers)} and components {tuple(components)} need one entry "
            f"per block each"
        )
    return tuple(
        BlockConfig(coupling=name, layers=depth, components=count)
        for name, depth, count in zip(couplings, layers, components, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class FlowConfig(LanguageModelConfig):
    """Shape of a TarFlowLM."""

    family: ClassVar[str] = "flow"
    model: ClassVar[str] = "tarflowlm.model:TarFlowLM"
    latent_dim: int = 8
    """Latent channels d per token."""
    separation: float = 12.0
    """Typical distance between neighbouring codebook means, over sigma, at the start of training."""
    blocks: tuple[BlockConfig, ...] = (
        BlockConfig(coupling="mixd", layers=6, components=0),
        BlockConfig(),
        BlockConfig(),
    )
    """Blocks of the stack, block 1 (next to the tokens) first."""
    head_hidden: int = 64
    """Hidden units per channel of the masked autoregressive head (D_m / 2 in the paper)."""
    channel_mix: bool | None = True
    """Reorder channels to [even, odd] between blocks; None: where P > 1, as in the paper."""
    in_patch: Literal["autoregressive", "independent"] = "autoregressive"
    """Mixture weights inside a patch of a mixd block: given the earlier tokens of the patch, or independent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least("latent_dim", self.latent_dim, 1)
        self.check_at_least("head_hidden", self.head_hidden, 1)
        if not 0 < self.separation < math.inf:
            raise UserError(f"model.separation {self.separation}: must be above 0 and finite")
        if not self.blocks:
            raise UserError("model.blocks (): needs at least one block")
        for index, block in enumerate(self.blocks):
            self.check_at_least(f"blocks.{index}.layers", block.layers, 1)
            self._check_components(index, block)

    def _check_components(self, index: int, block: BlockConfig) -> None:
        where, components = f"model.blocks.{index}.components ({block.coupling})", block.components
        if "affine" in block.coupling and components not in (0, 1):
            raise UserError(f"{where}: {components} has no effect, an affine coupling has one Gaussian; use 1")
        if block.coupling == "mix1" and components < 1:
            raise UserError(f"{where}: {components} must be at least 1")
        if block.coupling == "mixd" and (components < 0 or (components == 0 and index > 0 and self.mixes_channels)):
            raise UserError(
                f"{where}: {components}; 0 (tied to the codebook) needs the codebook's order of channels: use it in "
                f"block 1, turn channel_mix off, or give K >= 1 components of the block's own"
            )

    @property
    def num_blocks(self) -> int:
        """Flow blocks L."""
        return len(self.blocks)

    @property
    def has_token_weights(self) -> bool:
        """Whether the components of block 1 are tokens: those of a Mix-d coupling tied to the codebook."""
        return self.blocks[0].coupling == "mixd" and self.blocks[0].components == 0

    @property
    def mixes_channels(self) -> bool:
        """Whether channels are reordered between blocks."""
        return self.patch > 1 if self.channel_mix is None else self.channel_mix

    @property
    def head_features(self) -> int:
        """Embedding width A of the masked autoregressive head (docs/math.md, eq. 10; paper: appendix H)."""
        channels = self.patch * self.latent_dim
        return min(max(1, int(9 * 2 * self.head_hidden / (16 * max(channels - 1, 1)))), 96)

    def first_blocks(self, num_blocks: int) -> "FlowConfig":
        """The configuration of the first `num_blocks` blocks."""
        return replace(self, blocks=self.blocks[:num_blocks])

    def each_block(self, **fields: Any) -> "FlowConfig":
        """The same configuration with these fields of `BlockConfig` set in every block."""
        return replace(self, blocks=tuple(replace(block, **fields) for block in self.blocks))

    def deepened(self, factor: int) -> "FlowConfig":
        """The same configuration with `factor` times the Transformer layers in every block."""
        return replace(self, blocks=tuple(replace(block, layers=factor * block.layers) for block in self.blocks))

    def describe(self, block: int) -> str:
        """Number and coupling of block `block` (0-based), such as "block 1 mixd"."""
        return f"block {block + 1} {self.blocks[block].coupling}"


def as_flow_config(config: LanguageModelConfig) -> FlowConfig:
    """`config`, narrowed to FlowConfig; AssertionError for another configuration."""
    assert isinstance(config, FlowConfig), config
    return config


TrackerName = Literal["tensorboard", "wandb", "trackio"]
"""Experiment trackers that metrics can be sent to."""


MODEL_TYPE = "tarflowlm"
"""First key of config.json, by which `transformers` knows whose model it is (docs/hub.md)."""


def checked_seed(seed: int) -> int:
    """`seed` itself. UserError outside 0 .. 2^62 - 1, where generators reject a seed or do not keep it distinct."""
    if not 0 <= seed < 2**62:
        raise UserError(f"seed {seed}: must be at least 0 and below 2^62")
    return seed


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and schedule; the schedule restarts in every progressive stage."""

    optimizer: Literal["adamw", "muon"] = "muon"
    """Muon for the matrices of the Transformer and AdamW for the rest, or AdamW for all."""
    muon_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of Muon's matrix products; auto takes the faster one on the device, and config.json records it."""
    muon_qkv: Literal["apart", "together"] = "apart"
    """Whether Muon treats the projections to queries, keys and values as three matrices or as one."""
    lr: float = 6e-3
    """Peak learning rate (Muon's updates are scaled to the size of AdamW's, so both use this rate)."""
    codebook_lr_scale: float = 0.05
    """Learning rate of the codebook, as a multiple of `lr`; small, so that couplings not tied to it can follow."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.98
    """AdamW's second-moment decay."""
    grad_clip: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    warmup: float = 0.03
    """Share of a stage's steps in which the rate rises linearly."""
    schedule: Literal["cosine", "trapezoid"] = "trapezoid"
    """Shape after the warm-up: cosine to zero, or constant and then linear to zero."""
    decay: float = 0.4
    """Trapezoid: share of a stage's steps in which the rate falls linearly."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(f"optim.lr {self.lr}: must be above 0")
        if not self.grad_clip > 0:
            raise UserError(f"optim.grad_clip {self.grad_clip}: must be above 0")
        for name, factor in (("codebook_lr_scale", self.codebook_lr_scale), ("weight_decay", self.weight_decay)):
            if not 0 <= factor < math.inf:
                raise UserError(f"optim.{name} {factor}: must be at least 0 and finite")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise UserError(f"optim.{name} {beta}: must be at least 0 and below 1")
        for name, share in (("warmup", self.warmup), ("decay", self.decay)):
            if not 0 <= share <= 1:
                raise UserError(f"optim.{name} {share}: must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batches and stages of training, and the intervals of logging, evaluation and checkpoints."""

    stage_steps: tuple[int, ...] = (1000,)
    """Optimiser steps of each stage: one entry per block when progressive, one otherwise. With `minutes`, the stages'
    shares of the time."""
    minutes: float = 0.0
    """Wall-clock time of the whole run, checkpoints and evaluation included; 0 counts steps instead."""
    mode: Literal["progressive", "joint"] = "progressive"
    """One block after another on the frozen ones below, or all blocks at once. The baseline has one stage."""
    advance: Literal["budget", "stall"] = "budget"
    """End a stage when its steps are used up, or earlier if the validation bound stalls."""
    stall_evaluations: int = 4
    """With `stall`: evaluations without an improvement of `stall_tolerance` that end a stage."""
    stall_tolerance: float = 0.002
    """With `stall`: nats per token that count as an improvement."""
    batch_size: int = 8
    """Sequences per optimiser step, over all processes and accumulation steps."""
    accumulate: int = 1
    """Parts into which a process cuts its share of the batch; their gradients are accumulated."""
    dropout: float = 0.0
    """Share of what attention and MLPs write that is dropped in training: for several passes over a small text."""
    precision: Precision = "float32"
    """Of matrix products; densities, log-dets and inverses are always float32 or wider."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: replicate the model and average gradients, or shard it."""
    checkpoint_activations: bool = False
    """Keep only the inputs of a Transformer layer and recompute the layer in the backward pass."""
    compile: bool | None = None
    """Compile the loss with torch.compile; None: if `precision` is bfloat16, on a CUDA GPU with a compiler."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 500
    """Steps between evaluations on the validation split."""
    evaluate_windows: int = 64
    """Sequences of the validation split per evaluation."""
    test_windows: int = 0
    """Evenly spaced sequences of the test split in the final evaluation; 0 is all of it."""
    checkpoint_every: int = 500
    """Steps between checkpoints; every stage ends with one."""
    keep_last: int = 2
    """Training states to keep, besides the weights of the best validation bound."""
    max_skipped: int = 3
    """Steps in a row that may be skipped because loss or gradient is not finite; one more stops the run."""
    spike_sigma: float = 6.0
    """A loss this many standard deviations above its running mean is recorded as a spike."""
    track: tuple[TrackerName, ...] = ()
    """Trackers that also receive the lines of metrics.jsonl: tensorboard, wandb, trackio (extra `track`)."""

    def __post_init__(self) -> None:
        if not self.stage_steps or min(self.stage_steps) < 1:
            raise UserError(f"train.stage_steps {self.stage_steps}: every stage needs at least 1 step")
        positive = (
            "batch_size", "accumulate", "log_every", "evaluate_every", "evaluate_windows", "checkpoint_every",
            "keep_last",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} {getattr(self, name)}: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"train.dropout {self.dropout}: must be at least 0 and below 1")
        if not 0 <= self.minutes < math.inf:
            raise UserError(f"train.minutes {self.minutes}: must be above 0 and finite, or 0 to train by steps")
        if self.max_skipped < 0:
            raise UserError(f"train.max_skipped {self.max_skipped}: must be at least 0")
        if not self.spike_sigma > 0:
            raise UserError(f"train.spike_sigma {self.spike_sigma}: must be above 0")
        if self.test_windows < 0:
            raise UserError(f"train.test_windows {self.test_windows}: must be at least 0, which is all of them")

    @property
    def num_steps(self) -> int:
        """Optimiser steps of all stages together."""
        return sum(self.stage_steps)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything needed to reproduce a run."""

    name: str
    """The preset this run started from."""
    model: FlowConfig | BaselineConfig
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text and tokens."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batches and stages."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and the noise of q(z|x)."""

    def __post_init__(self) -> None:
        checked_seed(self.seed)
        stages, given = self.num_stages, len(self.train.stage_steps)
        if given != stages:
            raise UserError(
                f"train.stage_steps {self.train.stage_steps}: {given} entries for {stages} stages; give one entry "
                f"per block for progressive training, a single one for joint training and the baseline"
            )

    @property
    def num_stages(self) -> int:
        """Training stages: one per block in progressive training, otherwise 1."""
        return self.model.num_blocks if self.train.mode == "progressive" else 1

    def model_of_stage(self, stage: int) -> FlowConfig | BaselineConfig:
        """The model of stage `stage` (0-based): in progressive training, the blocks up to and including its own."""
        return self.model.first_blocks(stage + 1) if self.num_stages > 1 else self.model


def current_form(document: Any) -> Any:
    """The run in config.json, in the current format, without `model_type`.

    Earlier versions wrote no `model_type`, and three parallel lists in place of `blocks`. Other documents are
    returned as they are; `from_dict` reports what is wrong with them.
    """
    if isinstance(document, dict) and document.get("model_type") == MODEL_TYPE:
        document = {key: value for key, value in document.items() if key != "model_type"}
    model = document.get("model") if isinstance(document, dict) else None
    old = ("couplings", "layers", "components")
    if not isinstance(model, dict) or not all(isinstance(model.get(name), list) for name in old):
        return document
    rows = zip_longest(*(model[name] for name in old))
    blocks = [dict(zip(("coupling", "layers", "components"), row, strict=True)) for row in rows]
    return document | {"model": {k: v for k, v in model.items() if k not in old} | {"blocks": blocks}}
