"""Figure 5: two tokens at a time, the flow against a baseline that predicts both at once."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from tarflowlm.baseline import BaselineConfig
from tarflowlm.data import eval_windows
from tarflowlm.generation import generate
from tarflowlm.generation.generate import num_ticks
from tarflowlm.model import FlowConfig
from tarflowlm.report.style import Figure
from tarflowlm.reproduce.measures import judge_of, judge_training
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings
from tarflowlm.runs.config import RunConfig
from tarflowlm.runs.presets import preset

PREFIXES = (0, 16, 64, 128)
PROMPTS = 32


def plan(settings: Settings) -> list[Training]:
    foil = preset("mini-ar" if settings.scale == "mini" else "owt-ar")
    assert isinstance(foil.model, BaselineConfig)
    foil = replace(foil, name=f"{foil.name}-p2", model=replace(foil.model, patch=2, in_patch="independent"))
    runs = {
        "flow, in-patch weights": two_tokens(settings, "autoregressive"),
        "flow, the paper's": two_tokens(settings, "independent"),
        "two-token AR": foil,
    }
    return trainings(settings, runs) + judge_training(settings)


def two_tokens(settings: Settings, in_patch: Literal["autoregressive", "independent"]) -> RunConfig:
    """Mix-d with two tokens per position; independent given the past in the paper."""
    run = preset("mini-mixd-p2" if settings.scale == "mini" else "owt-mixd")
    assert isinstance(run.model, FlowConfig)
    name = run.name if settings.scale == "mini" else f"{run.name}-p2"
    name += "-paper" if in_patch == "independent" else ""
    return replace(run, name=name, model=replace(run.model, patch=2, in_patch=in_patch))


def measure(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Perplexity under the judge of prefix and continuation, by model and prefix; real text last."""
    judge, models = judge_of(settings, finished)
    rows: list[Row] = []
    for done in models:
        checkpoint = done.load()
        context = checkpoint.run.model.context
        text = eval_windows(done.tokens(checkpoint), context, PROMPTS)
        for prefix in PREFIXES:
            samples = generate(
                checkpoint.model,
                num=len(text),
                num_tokens=context,
                template=text[:, :prefix],
                generator=torch.Generator().manual_seed(0),
                decoder="auto",
                tick=done.ticking(f"prefix {prefix}, positions", num_ticks(checkpoint.model, context)),
            )
            reading = judge.read([checkpoint.tokenizer.decode(row) for row in samples.tokens.tolist()])
            row = {"model": done.training.label, "seed": done.training.run.seed, "prefix": prefix}
            rows.append(row | {"perplexity": reading.perplexity, "judge": judge.name})
        real = judge.read([checkpoint.tokenizer.decode(row) for row in text.tolist()]).perplexity
    rows += [{"model": "real text", "prefix": prefix, "perplexity": real, "judge": judge.name} for prefix in PREFIXES]
    return rows


def draw(figure: Figure, rows: Sequence[Row]) -> None:
    axes = figure.subplots()
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        axes.plot([row["prefix"] for row in of_model], [row["perplexity"] for row in of_model], "o-", label=model)
    axes.set_xlabel("tokens of real text before the continuation")
    axes.set_ylabel("generative perplexity")
    axes.legend()


RECIPE = Recipe(
    name="fig5",
    title="Two tokens at a time",
    claim="The paper: at patch size 2 the flow's generative perplexity stays good over all prefix lengths; a "
    "baseline that predicts two tokens at once breaks down.",
    plan=plan,
    measure=measure,
    draw=draw,
)
