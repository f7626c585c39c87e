"""Tables about runs, one column for each: their results, and their configurations."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tarflowlm.schema import flatten
from tarflowlm.views.page import table_html
from tarflowlm.views.records import RunRecord

MACHINE = {
    "parameters": "parameters",
    "of them in Transformers": "trunk_parameters",
    "device": "device",
    "threads": "threads",
    "machine": "machine",
    "PyTorch": "torch",
}
"""Rows that show a value of summary.json as it is."""


def summary_table(records: Sequence[RunRecord]) -> str:
    """Results, text, size and machine of every run."""
    return _table(records, [_summary_of(record) for record in records])


def config_table(records: Sequence[RunRecord]) -> str:
    """Every field of the configurations by its dotted name, those that differ first."""
    columns = []
    for record in records:
        fields = flatten(record.run)
        columns.append({name: str(value).strip("[]") for name, value in fields.items()})
    names = dict.fromkeys(name for column in columns for name in column)
    differing = {name: "" for name in names if len({one.get(name) for one in columns}) > 1}
    return _table(records, [differing | column for column in columns])


def _table(records: Sequence[RunRecord], columns: Sequence[Mapping[str, str]]) -> str:
    """One row for each key, in the order of first appearance; a dash for a missing value."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(column.get(name) or "–" for column in columns)) for name in names]
    return table_html(["", *(record.name for record in records)], rows)


def _summary_of(record: RunRecord) -> dict[str, str]:
    """The column of a run: only what is known of it."""
    sign = record.sign
    column = {"status": record.status}
    done = record.summary
    if done is not None:
        test = done["test"]
        column["test, bits per character"] = f"{sign} {test['bpc']:.4f} ({test['bound']})"
        nats = f"{sign} {test['nats_per_token']:.4f}"
        if math.isfinite(test["stderr"]):  # that of a single window is not a number
            nats += f" ± {test['stderr']:.4f}"
        column["test, nats per token, standard error"] = nats
    if len(bpc := record.valid["bpc"]):
        step = int(record.valid["step"][-1])
        column["validation, bits per character"] = f"{sign} {bpc[-1]:.4f} at step {step:,}"
    if done is not None:
        stages = ", ".join(f"{bpc:.4f}" for bpc in done["stage_valid_bpc"])
        column["validation after each stage"] = f"{sign} {stages}"
    column["preset, seed"] = f"{record.run.name}, {record.run.seed}"
    column["text"] = Path(record.run.data.source).name
    if record.has_log:
        train = record.train
        column["steps"] = f"{train['step'][-1]:,.0f}"
        column["tokens"] = f"{train['tokens'][-1]:,.0f}"
        column["training, seconds"] = f"{train['seconds'][-1]:,.0f}"
        column["tokens per second, median"] = f"{np.median(train['tokens_per_second']):,.0f}"
    if done is not None:
        for label, key in MACHINE.items():
            value = done[key]
            column[label] = f"{value:,}" if isinstance(value, int) else str(value)
    return column
