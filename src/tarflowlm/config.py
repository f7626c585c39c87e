"""The configuration of a run, as frozen dataclasses.

No torch here: the command line reads configurations without it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from tarflowlm.errors import UserError, counted
from tarflowlm.model_config import BaselineConfig, FlowConfig
from tarflowlm.registry import Plugged, Registry
from tarflowlm.schema import (
    Below1,
    Checked,
    Count,
    Million,
    NotNegative,
    Positive,
    Seed,
    Share,
    TopP,
    Whole,
    check_type,
)

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
"""Where to run; `device.pick_device` resolves auto."""

Decoder = Literal["steps", "sweeps", "auto"]
"""How a text is written: token by token, by inverting noise in parallel sweeps, or by the cheapest
way; also how a block is inverted.
"""

Unit = Literal["sentences", "words"]
"""What a text can have a given number of."""
Pick = Literal["random", "unlikely"]
"""Words that an edit resamples: random ones, or the ones that cost most in block 1."""

Precision = Literal["float32", "bfloat16"]

Normalization = Literal["none", "text8"]

TEXT8_ALPHABET = " abcdefghijklmnopqrstuvwxyz"
"""The 27 characters of text8: single spaces and `a`-`z`."""


def check_alphabet(alphabet: str) -> None:
    """UserError unless `alphabet` has two characters or more, each once, and no lone surrogates."""
    check_type(alphabet, "alphabet", str, "give its characters, a str")
    repeats = len(set(alphabet)) < len(alphabet)
    if len(alphabet) < 2 or repeats or any(0xD800 <= ord(c) <= 0xDFFF for c in alphabet):
        remedy = "list two characters or more, each once, and no surrogates"
        raise UserError(f"alphabet {alphabet!r:.80}: {remedy}")


TOKENIZERS = Registry("tokenizer", "char", "byte", "bpe", needs="encode_each")
"""The tokenizers; those of users are a `data.Tokenizer`."""
OPTIMIZERS = Registry("optimizer", "adamw", "muon")
"""The optimisers; those of users are a function (`optimizer`)."""
SCHEDULES = Registry("schedule", "wsd")
"""The courses of the learning rate; those of users are a function (`schedule`)."""


def tokenizer(name: str) -> Callable[[type[Plugged]], type[Plugged]]:
    """Register a `data.Tokenizer` under a name, for `TokenizerConfig.kind` (docs/data.md).

    UserError for a name that is taken.
    """

    def register(kind: type[Plugged]) -> type[Plugged]:
        TOKENIZERS.own(name)(kind)
        kind.kind = name  # type: ignore[attr-defined]
        return kind

    return register


def optimizer(name: str) -> Callable[[Plugged], Plugged]:
    """Register a function under a name, for `OptimConfig.optimizer` (docs/training.md).

    From an `OptimConfig` and the parameters that train, by name, it makes a torch.optim.Optimizer,
    or a list of them. A group of parameters has the rate of the run, times its `lr_scale`, if any.
    UserError for a name that is taken.
    """
    return OPTIMIZERS.own(name)


def schedule(name: str) -> Callable[[Plugged], Plugged]:
    """Register a function under a name, for `OptimConfig.schedule` (docs/training.md).

    From an `OptimConfig`, a step (0-based) and the number of steps of its stage, it gives the
    learning rate as a share of the peak. UserError for a name that is taken.
    """
    return SCHEDULES.own(name)


LARGEST_BPE = 1 << 22
"""The most tokens of a BPE: the library allocates memory for all up front, or aborts."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Checked):
    """The tokenizer of a run."""

    kind: Annotated[str, TOKENIZERS] = "char"
    """Units of text: characters of `alphabet`, UTF-8 bytes, or byte-pair encoding. Or a tokenizer
    of your own, by its name (--import MODULE).
    """
    alphabet: str = TEXT8_ALPHABET
    """The characters of kind char, or from which a BPE trained here on text8 text starts."""
    vocab_size: Whole = 0
    """Number of tokens of a BPE trained here, or of your own tokenizer; 0 for every other one."""
    source: str = ""
    """A tokenizer.json, or a hub name such as gpt2. Empty: train a BPE here."""
    normalize: Literal["none", "text8", "auto"] = "text8"
    """Applied to the text: none, or text8 (a-z and spaces; digits are spelled out). auto: none for
    your own text, whose characters then are the alphabet, and text8 for the corpora by name.
    """

    def rules(self) -> Iterator[tuple[str, str]]:
        unused = f"has no effect with kind={self.kind!r} and source={self.source!r}: leave it out"
        if self.source and self.kind in ("char", "byte"):
            yield "source", unused
        least = len(self.alphabet) + 1 if self.uses_alphabet else 258
        is_bpe = self.needs_training and self.kind == "bpe"
        if is_bpe and not least <= self.vocab_size <= LARGEST_BPE:
            rule = f"a BPE trained here needs {least} to {LARGEST_BPE:,}, or give a source"
            yield "vocab_size", rule
        if self.vocab_size and not self.needs_training:
            yield "vocab_size", unused
        if not self.uses_alphabet:
            if self.alphabet != TEXT8_ALPHABET:
                yield "alphabet", unused
            return
        check_alphabet(self.alphabet)
        missing = "".join(sorted(set(TEXT8_ALPHABET) - set(self.alphabet)))
        if missing and self.normalize == "text8":
            yield "alphabet", f"lacks {missing!r}, which text8 can produce: set normalize to none"

    @property
    def normalization(self) -> Normalization:
        """The meaning of `normalize`; auto is text8 until `infer_tokenizer` has seen the text."""
        return "text8" if self.normalize == "auto" else self.normalize

    @property
    def uses_alphabet(self) -> bool:
        """Whether tokens are, or start from, the characters of `alphabet`."""
        is_bpe = self.kind == "bpe" and not self.source
        return self.kind == "char" or (is_bpe and self.normalization == "text8")

    @property
    def needs_training(self) -> bool:
        """Whether `build_tokenizer` must be given training text."""
        return self.kind not in ("char", "byte") and not self.source


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """Text and tokens."""

    source: str = "tales"
    """tales, stories, text8, openwebtext, a text file or a folder of them, hf:OWNER/NAME, or a
    directory made by `tarflowlm data`.
    """
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(normalize="auto"))
    """How text becomes tokens."""
    unwrap: bool = False
    """Join the lines of every paragraph, for a text of your own that is wrapped by hand."""


MODEL_TYPE = "tarflowlm"
"""First key of config.json, by which `transformers` knows whose model it is (docs/hub.md)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Checked):
    """Optimiser and learning rate. The schedule restarts in every progressive stage."""

    section: ClassVar[str] = "optim."
    optimizer: Annotated[str, OPTIMIZERS] = "muon"
    """muon: for the matrices of the Transformer, and AdamW for the rest. Or an optimiser of your
    own, by its name (--import MODULE).
    """
    schedule: Annotated[str, SCHEDULES] = "wsd"
    """wsd: the rate rises, is constant, and falls (warm-up, stable, decay; Hu et al. 2024). Or a
    schedule of your own, by its name (--import MODULE).
    """
    lr: Positive = 6e-3
    """Peak learning rate. Muon's updates are scaled to the size of AdamW's, so both use it."""
    codebook_lr_scale: NotNegative = 0.05
    """Learning rate of the codebook, as a multiple of `lr`; small, so that couplings which are not
    tied to it can follow.
    """
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay, on matrices only."""
    beta2: Below1 = 0.98
    """AdamW's second-moment decay."""
    eps: Positive = 1e-10
    """AdamW's term in the denominator."""
    grad_clip: Positive = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    warmup: Share = 0.03
    """Share of a stage's steps in which the rate rises linearly."""
    decay: Share = 0.4
    """Share of a stage's steps in which the rate falls linearly to zero; constant in between."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.warmup + self.decay > 1:
            yield "warmup", f"with decay {self.decay} it is more than the stage: lower one of them"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """Length, batches and stages of training."""

    section: ClassVar[str] = "train."
    stage_steps: tuple[Whole, ...] = (1000,)
    """Optimiser steps of each stage: one entry per block when progressive, one otherwise; 0 adds
    no block. With `minutes`, shares of the time.
    """
    minutes: NotNegative = 0.0
    """Wall-clock time of the run, without compilation; 0 counts steps instead."""
    mode: Literal["progressive", "joint"] = "progressive"
    """Train one block after another on the frozen blocks below, or all blocks at once."""
    batch_size: Million = 8
    """Sequences per optimiser step, over all processes."""
    tokens_at_once: Whole = 0
    """The most tokens that a process works on at once, in whole sequences: fewer need less memory
    and give the same result. 0: all of its share of the batch.
    """
    dropout: Below1 = 0.0
    """Dropout on the outputs of attention and MLP. Useful for several epochs on a small text."""
    ema: Below1 = 0.0
    """Decay of an average of the weights, which is evaluated and saved instead of them; 0: none."""
    keep: Literal["last", "best"] = "best"
    """Keep the last weights of a stage, or the weights with the best validation bound."""
    keep_idle: bool = False
    """Keep a block above the first in the model as it started, even if it gained nothing."""
    patience: Whole = 0
    """End a stage after this many evaluations in a row without a better bound. 0: end it only when
    its steps or its time are over. The paper trains a block until the bound stabilises.
    """
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; auto takes bfloat16 if the device multiplies it natively.
    Densities, log-dets and inverses are always float32 or wider.
    """
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: replicate the model and average gradients, or shard it."""
    checkpoint_activations: bool = False
    """Keep only the inputs of Transformer layers and recompute these in the backward pass."""
    compile: bool | None = None
    """Compile the Transformer layers; None: in bfloat16 on a CUDA GPU with a compiler."""
    log_every: Count = 20
    """Steps between lines of metrics.jsonl."""
    evaluate_every: Count = 500
    """Steps between evaluations on the validation split. With `minutes`, one comes after every
    tenth of the time as well.
    """
    evaluate_windows: Count = 64
    """Sequences of the validation split per evaluation."""
    test_windows: Whole = 0
    """Evenly spaced sequences of the test split in the final evaluation; 0 is all of it."""
    checkpoint_every: Count = 500
    """Steps between checkpoints; every stage ends with one."""
    track: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Trackers that also receive the lines of metrics.jsonl (extra `track`)."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if not any(self.stage_steps[:1]):
            yield "stage_steps", "the first stage needs at least 1 step"

    @property
    def num_steps(self) -> int:
        return sum(self.stage_steps)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """Everything needed to reproduce a run."""

    name: str
    """The preset this run started from."""
    model: FlowConfig | BaselineConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: Seed = 0
    """Seed of the initial weights, the order of the data and the noise of q(z|x)."""
    parent: str = ""
    """NAME@SHA256 of the weights that `train --from` begins with; empty for new ones."""
    temperature: Positive = 1.0
    """Temperature of samples, unless another is given."""
    top_p: TopP = 1.0
    """Top-p of samples without blanks or constraints, unless it or a temperature is given."""

    def rules(self) -> Iterator[tuple[str, str]]:
        given = len(self.train.stage_steps)
        if given != self.num_stages:
            stages = f"{counted(self.num_stages, 'stage')} (one per block when progressive)"
            yield "train.stage_steps", f"{counted(given, 'entry', 'entries')} for {stages}"
        if self.optim.optimizer == "muon" and self.train.parallel == "fsdp":
            rule = "needs whole matrices, which train.parallel fsdp shards: choose adamw"
            yield "optim.optimizer", rule
        is_last = isinstance(self.model, FlowConfig) and self.model.starts == "last"
        if is_last and self.train.mode == "progressive":
            rule = "a block that joins a trained stack starts as the identity: choose first"
            yield "model.starts", rule
        if self.train.mode == "joint" and self.model.fills_in:
            rule = "a block with certainty learns as the last one: train it progressively"
            yield "train.mode", rule

    @property
    def num_stages(self) -> int:
        """One per block in progressive training, otherwise 1."""
        return self.model.num_blocks if self.train.mode == "progressive" else 1

    def model_of_stage(self, stage: int) -> FlowConfig | BaselineConfig:
        """The model of a stage (0-based): in progressive training, the blocks up to its own."""
        return self.model.first_blocks(stage + 1) if self.num_stages > 1 else self.model
