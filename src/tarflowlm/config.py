"""The configuration of a run, as frozen dataclasses.

No torch here: the command line reads configurations without it.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from tarflowlm.checks import check_type
from tarflowlm.errors import UserError, counted
from tarflowlm.model_config import BaselineConfig, Config, FlowConfig

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
"""Where to run; `device.pick_device` resolves auto."""

Decoder = Literal["steps", "sweeps", "auto", "draw"]
"""How a block is inverted: position by position, in parallel sweeps, or by the cheaper one;
"draw" draws the latents of the last block from its mixtures instead.
"""

Pick = Literal["random", "unlikely"]
"""Words that an edit draws anew: at random, or those that cost most in block 1."""

Precision = Literal["float32", "bfloat16"]

Normalization = Literal["none", "text8"]

TEXT8_ALPHABET = " abcdefghijklmnopqrstuvwxyz"
"""The 27 characters of text8: single spaces and `a`-`z`."""


def check_alphabet(alphabet: str) -> None:
    """UserError unless `alphabet` has two characters or more, each once, and no lone surrogates."""
    check_type(alphabet, "alphabet", str, "give its characters, a str")
    repeats = len(set(alphabet)) < len(alphabet)
    if len(alphabet) < 2 or repeats or any(0xD800 <= ord(c) <= 0xDFFF for c in alphabet):
        raise UserError(f"alphabet {alphabet!r:.80}: list two characters or more, each once")


Kind = Literal["char", "byte", "bpe"]
LARGEST_BPE = 1 << 22
"""Tokens of a BPE: the library reserves memory for all, and aborts where that fails."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Config):
    """The tokenizer of a run."""

    kind: Kind = "char"
    """Units of text: characters of `alphabet`, UTF-8 bytes, or byte-pair encoding."""
    alphabet: str = TEXT8_ALPHABET
    """The characters of kind char, or from which a BPE trained here on text8 text starts."""
    vocab_size: int = 0
    """Number of tokens of a BPE trained here; 0 for every other tokenizer."""
    source: str = ""
    """A tokenizer.json, or a hub name such as gpt2. Empty: train a BPE here."""
    normalize: Literal["none", "text8", "auto"] = "text8"
    """Applied to the text: none, or text8 (a-z and spaces; digits are spelled out). auto: none for
    your own text, whose characters are the alphabet then, and text8 for the corpora by name.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        unused = f"has no effect with kind={self.kind!r} and source={self.source!r}: leave it out"
        self.require("source", self.kind == "bpe" or not self.source, unused)
        if self.needs_training:
            least = len(self.alphabet) + 1 if self.uses_alphabet else 258
            rule = f"a BPE trained here needs {least} to {LARGEST_BPE:,}, or give a source"
            self.require("vocab_size", least <= self.vocab_size <= LARGEST_BPE, rule)
        else:
            self.require("vocab_size", self.vocab_size == 0, unused)
        if not self.uses_alphabet:
            self.require("alphabet", self.alphabet == TEXT8_ALPHABET, unused)
            return
        check_alphabet(self.alphabet)
        missing = "".join(sorted(set(TEXT8_ALPHABET) - set(self.alphabet)))
        rule = f"lacks {missing!r}, which normalize=text8 can produce: set normalize to none"
        self.require("alphabet", self.normalize != "text8" or not missing, rule)

    @property
    def normalization(self) -> Normalization:
        """The meaning of `normalize`; auto is text8 until `data.suited` has seen the text."""
        return "text8" if self.normalize == "auto" else self.normalize

    @property
    def uses_alphabet(self) -> bool:
        """Whether tokens are, or start from, the characters of `alphabet`."""
        return self.kind == "char" or (self.needs_training and self.normalization == "text8")

    @property
    def needs_training(self) -> bool:
        """Whether `build_tokenizer` must be given training text."""
        return self.kind == "bpe" and not self.source


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Text and tokens."""

    source: str = "tales"
    """tales, text8, openwebtext, a text file or a folder of them, hf:OWNER/NAME, or
    a directory made by `tarflowlm data`.
    """
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(normalize="auto"))
    """How text becomes tokens."""
    unwrap: bool = False
    """Join the lines of every paragraph: of a text of your own that is wrapped by hand."""


TrackerName = Literal["tensorboard", "wandb"]
MODEL_TYPE = "tarflowlm"
"""First key of config.json, by which `transformers` knows whose model it is (docs/hub.md)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Config):
    """Optimiser and learning rate. The schedule restarts in every progressive stage."""

    section: ClassVar[str] = "optim."
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: for the matrices of the Transformer, and AdamW for the rest."""
    lr: float = 6e-3
    """Peak learning rate. Muon's updates are scaled to the size of AdamW's, so both use it."""
    codebook_lr_scale: float = 0.05
    """Learning rate of the codebook, as a multiple of `lr`; small, so that couplings which are not
    tied to it can follow.
    """
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    beta2: float = 0.98
    """AdamW's second-moment decay."""
    eps: float = 1e-10
    """AdamW's term in the denominator."""
    grad_clip: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    warmup: float = 0.03
    """Share of a stage, in steps or time, in which the rate rises linearly."""
    decay: float = 0.4
    """Share of a stage's steps in which the rate falls linearly to zero; constant in between."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.above_zero("lr")
        self.above_zero("eps")
        self.require("grad_clip", self.grad_clip > 0, "must be above 0")
        self.at_least(0, "codebook_lr_scale", "weight_decay")
        self.below_one("beta2")
        for name in ("warmup", "decay"):
            self.require(name, 0 <= getattr(self, name) <= 1, "must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Length, batches and stages of training."""

    section: ClassVar[str] = "train."
    stage_steps: tuple[int, ...] = (1000,)
    """Optimiser steps of each stage: one entry per block when progressive, one otherwise; 0 leaves
    a block as it starts. With `minutes`, shares of the time.
    """
    minutes: float = 0.0
    """Wall-clock time of the run, without compilation; 0 counts steps instead."""
    mode: Literal["progressive", "joint"] = "progressive"
    """One block after another on the frozen ones below, or all blocks at once."""
    batch_size: int = 8
    """Sequences per optimiser step, over all processes and accumulation steps."""
    accumulate: int = 1
    """Parts into which a process cuts its share of the batch, to need less memory."""
    dropout: float = 0.0
    """Dropout on the outputs of attention and MLP. Useful for several epochs on a small text."""
    ema: float = 0.0
    """Decay of an average of the weights, which is evaluated and saved instead of them; 0: none."""
    keep: Literal["last", "best"] = "best"
    """Weights with which a stage ends: the last ones, or the ones of its best validation."""
    patience: int = 0
    """End a stage after this many evaluations in a row without a better bound; 0: when its steps or
    time are over. The paper trains a block until the bound stabilises.
    """
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; auto takes bfloat16 where the device multiplies it natively.
    Densities, log-dets and inverses are always float32 or wider.
    """
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: replicate the model and average gradients, or shard it."""
    checkpoint_activations: bool = False
    """Keep only the inputs of Transformer layers and recompute these in the backward pass."""
    compile: bool | None = None
    """Compile the Transformer layers; None: in bfloat16 on a CUDA GPU with a compiler."""
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
    track: tuple[TrackerName, ...] = ()
    """Trackers that also receive the lines of metrics.jsonl (extra `track`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        first, *later = self.stage_steps or (0,)
        rule = "the first stage needs at least 1 step, and later ones 0 or more"
        self.require("stage_steps", first >= 1 and min(later, default=0) >= 0, rule)
        self.at_least(1, "batch_size", "accumulate", "log_every")
        self.at_least(1, "evaluate_every", "evaluate_windows", "checkpoint_every")
        self.at_least(0, "minutes", "test_windows", "patience")
        self.below_one("dropout", "ema")

    @property
    def num_steps(self) -> int:
        return sum(self.stage_steps)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Everything needed to reproduce a run."""

    name: str
    """The preset this run started from."""
    model: FlowConfig | BaselineConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    """Seed of the initial weights, the order of the data and the noise of q(z|x)."""
    parent: str = ""
    """NAME@SHA256 of the weights that `train --from` begins with; empty for new ones."""
    temperature: float = 1.0
    """Temperature of samples, unless another is given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.above_zero("temperature")
        self.require("seed", 0 <= self.seed < 2**62, "must be at least 0 and below 2^62")
        given = len(self.train.stage_steps)
        stages = counted(self.num_stages, "stage")
        rule = f"{counted(given, 'entry', 'entries')} for {stages} (one per block when progressive)"
        self.train.require("stage_steps", given == self.num_stages, rule)
        rule = "needs whole matrices, which train.parallel fsdp shards: choose adamw"
        is_whole = self.optim.optimizer == "adamw" or self.train.parallel == "ddp"
        self.optim.require("optimizer", is_whole, rule)
        rule = "a block with certainty learns as the last one: train it progressively"
        self.train.require("mode", self.train.mode != "joint" or not self.model.fills_in, rule)

    @property
    def num_stages(self) -> int:
        """One per block in progressive training, otherwise 1."""
        return self.model.num_blocks if self.train.mode == "progressive" else 1

    def model_of_stage(self, stage: int) -> FlowConfig | BaselineConfig:
        """The model of a stage (0-based): in progressive training, the blocks up to its own."""
        return self.model.first_blocks(stage + 1) if self.num_stages > 1 else self.model
