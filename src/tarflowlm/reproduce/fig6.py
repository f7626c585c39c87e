"""Figure 6: text after each pass."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from tarflowlm.generation import Generation, generate
from tarflowlm.generation.generate import num_ticks
from tarflowlm.model import FlowConfig
from tarflowlm.reproduce.fig5 import two_tokens
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings
from tarflowlm.runs.config import RunConfig
from tarflowlm.runs.presets import preset, with_steps

NUM, LENGTH = 8, 128
DEEP_STEPS = 1000


def plan(settings: Settings) -> list[Training]:
    prefix = "mini" if settings.scale == "mini" else "owt"
    runs = {"Mix-d": preset(f"{prefix}-mixd"), "Mix-1": preset(f"{prefix}-mix1")}
    if settings.scale == "mini":
        runs |= more_for_upper_blocks(settings)
    return trainings(settings, runs)


def more_for_upper_blocks(settings: Settings) -> dict[str, RunConfig]:
    """Mini flows whose upper blocks have more to do than in the presets."""
    run = preset("mini-mix1")
    assert isinstance(run.model, FlowConfig)
    # the published proportions; of the presets' blocks the first is the deepest
    model = replace(run.model, layers=(1, 1, 4), components=(27, 27, 27))
    deep = with_steps(replace(run, name="mini-mix1-deep-last", model=model), DEEP_STEPS)
    return {"Mix-1, last block deepest": deep, "Mix-d, P = 2": two_tokens(settings, "independent")}


def _passes(done: Finished) -> tuple[Generation, list[list[str]]]:
    """Samples, and for each sample its text after every pass, noise first."""
    checkpoint = done.load()
    length = min(LENGTH, checkpoint.run.model.context)
    generator = torch.Generator().manual_seed(0)
    result = generate(
        checkpoint.model,
        num_tokens=length,
        num=NUM,
        generator=generator,
        return_passes=True,
        decoder="auto",
        tick=done.ticking("sampling, positions", num_ticks(checkpoint.model, length)),
    )
    decode = checkpoint.tokenizer.decode
    return result, [[decode(state[i].tolist()) for state in result.passes] for i in range(NUM)]


def measure(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    rows = []
    for done in finished:
        result, _ = _passes(done)
        for number, tokens in enumerate(result.passes):
            same = (tokens == result.tokens).double().mean().item()
            name = "noise" if number == 0 else f"block {len(result.passes) - number} inverted"
            seed = done.training.run.seed
            rows.append({"model": done.training.label, "seed": seed, "state": name, "tokens as in the end": same})
    return rows


def text(settings: Settings, finished: Sequence[Finished]) -> str:
    parts = [f"## Samples\n\nThe first of {NUM} samples of each model, seed 0, after every pass, noise first.\n"]
    for done in finished:
        lines = "\n".join(_passes(done)[1][0])
        parts.append(f"{done.training.label}, {done.training.name}:\n\n```\n{lines}\n```\n")
    return "\n".join(parts)


RECIPE = Recipe(
    name="fig6",
    title="Text after each pass",
    claim="The paper: every intermediate state decodes to text, which each pass refines from coarse to fine.",
    plan=plan,
    measure=measure,
    text=text,
)
