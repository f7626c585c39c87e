"""The configuration of a run: data, model, optimiser and schedule."""

import math
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

from tarflowlm.choices import Precision
from tarflowlm.data import DataConfig
from tarflowlm.errors import UserError
from tarflowlm.shapes import BaselineConfig, FlowConfig

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
