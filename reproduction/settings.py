"""The choices of a user. No torch here, so that --help answers quickly."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from tarflowlm.cli.options import OnDevice
from tarflowlm.config import Precision, RunConfig
from tarflowlm.model_config import FlowConfig, LanguageModelConfig
from tarflowlm.options import Integer, arg
from tarflowlm.presets import preset, with_steps
from tarflowlm.schema import Count

Scale = Literal["mini", "paper"]
Kind = Literal["ar", "affine", "mix1", "mixd"]
Corpus = Literal["text8", "owt"]


@dataclass(frozen=True, kw_only=True)
class Settings(OnDevice):
    """The user's choices, which are options of the command."""

    scale: Scale = "mini"
    """mini runs on a CPU; paper is the published size, on TEXT8 and OpenWebText."""
    out: Annotated[Path, arg("PATH")] = Path("reproduced")
    """Directory of runs and results. Recipes share its runs, and finished work is not repeated."""
    data: Annotated[str | None, arg("SOURCE")] = None
    """Text for mini scale: corpus name or file; the default is the built-in corpus."""
    judge_data: Annotated[str, arg("SOURCE")] = "tales"
    """Text on which the judge of samples is trained at mini scale."""
    second_text: Annotated[str | None, arg("SOURCE")] = None
    """table2: also measure the likelihood of this text."""
    seeds: Count = 1
    """Train each model this many times, with seeds 0, 1, ..."""
    steps: Integer = None
    """Optimiser steps of every training instead of the recipe's, for a quick look."""
    recipe: Literal["muon", "mdlm"] = "muon"
    """paper: the presets' optimiser, or the million steps of AdamW of MDLM."""
    precision: Annotated[Precision | None, arg()] = None
    """Precision of matrix products in training; densities are in float32 either way."""

    def preset(self, kind: Kind, corpus: Corpus) -> RunConfig:
        """The preset of a kind of model: the mini one, or the paper's on `corpus`."""
        if self.scale == "mini":
            return preset(f"mini-{kind}")
        run = preset(f"{corpus}-{kind}")
        return run if self.recipe == "muon" else as_mdlm_trains(run)

    def adapt(self, run: RunConfig) -> RunConfig:
        """The run with the user's text, precision and steps. The paper scale keeps its texts.

        Idle blocks stay: figures measure what every block does.
        """
        if run.num_stages > 1:
            run = replace(run, train=replace(run.train, keep_idle=True))
        if self.data is not None and self.scale == "mini":
            run = replace(run, data=replace(run.data, source=self.data))
        if self.precision is not None:
            run = replace(run, train=replace(run.train, precision=self.precision))
        return run if self.steps is None else with_steps(run, self.steps)


def as_mdlm_trains(run: RunConfig) -> RunConfig:
    """A preset of the paper's set-up with the recipe of D3PM, MDLM and MD4.

    The paper refers to it: a constant rate and averaged weights over a million steps. Each block
    above Mix-d takes a seventh of them.
    """
    is_joint = run.num_stages == 1
    steps = 1_000_000 if is_joint else 714_286
    train = replace(
        run.train,
        stage_steps=(steps,) if is_joint else (steps, steps // 5, steps // 5),
        batch_size=512,
        dropout=0.1,
        ema=0.9999,
    )
    optim = replace(
        run.optim,
        optimizer="adamw",
        lr=3e-4,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        warmup=2500 / steps,
        decay=0.0,
    )
    return replace(run, name=f"{run.name}-adamw", train=train, optim=optim)


def as_flow_config(config: LanguageModelConfig) -> FlowConfig:
    """`config`, narrowed to FlowConfig; AssertionError for another configuration."""
    assert isinstance(config, FlowConfig), config
    return config
