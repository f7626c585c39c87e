"""A run beside the published one of its preset: validation after as many tokens.

    python -m reproduction.beside runs/a    # also while it trains

The curves are those of published.json; `reproduction.published` makes them.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from reproduction.published import CURVES
from tarflowlm.config import RunConfig
from tarflowlm.errors import UserError
from tarflowlm.presets import PRESETS, preset
from tarflowlm.runs.records import read_record
from tarflowlm.terminal.bars import print_table
from tarflowlm.training.configure import settled


def published(config: RunConfig) -> dict[int, float]:
    """Tokens -> validation after them, in bits per character, of the published run of a preset.

    Empty without one, and where `config` trains another model, text, length or schedule.
    """
    curves = json.loads(CURVES.read_text(encoding="utf-8"))
    if config.name not in curves or config.name not in PRESETS:
        return {}
    own = settled(preset(config.name))
    model = replace(config.model, vocab_size=own.model.vocab_size)  # which the text decides
    names = ("stage_steps", "minutes", "mode", "batch_size", "dropout", "ema")
    is_same = all(getattr(config.train, name) == getattr(own.train, name) for name in names)
    asked = (model, config.data, config.optim, config.parent)
    is_same &= asked == (own.model, own.data, own.optim, own.parent)
    return dict(curves[config.name]) if is_same else {}


def beside(directory: Path) -> list[tuple[int, float, float]]:
    """Tokens, and the validation of the run and of the published one after them.

    UserError where no published run is like it.
    """
    record = read_record(directory)
    theirs = published(record.run)
    if not theirs:
        what = "no published run has its model, text, length and schedule"
        raise UserError(f"{directory}: {what}; train a preset with its own values")
    ours = zip(record.valid["tokens"].astype(int), record.valid["bpc"], strict=True)
    return [(int(at), float(bpc), theirs[at]) for at, bpc in ours if at in theirs]


def main() -> None:
    for name in sys.argv[1:]:
        found = beside(Path(name))
        rows = [(f"{at:,}", f"{ours:.4f}", f"{theirs:.4f}") for at, ours, theirs in found]
        print_table(name, rows, ("tokens", "this run", "published"))


if __name__ == "__main__":
    main()
